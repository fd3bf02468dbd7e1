"""Generation against plain loops without a cache, and sampling against plain Python."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gpt4fast.data.tokenizer import Tokenizer
from gpt4fast.generation import continue_text, generate, longest_copy, word_share
from gpt4fast.generation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalise_seen
from gpt4fast.models import GPT, Encoder, EncoderConfig, EncoderDecoder, EncoderDecoderConfig, GPTConfig

SMALL = dict(vocab_size=40, max_length=64, num_layers=2, num_heads=2, embed_dim=16, tie_embeddings=False)


@pytest.fixture(params=["learned", "rotary"])
def gpt(request):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, positions=request.param))
    sharpen(model)
    return model


@pytest.fixture
def encoder_decoder():
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(EncoderConfig(**SMALL)))
    sharpen(model)
    return model


def sharpen(model):
    """Larger weights: a fresh model is close to uniform, where greedy choices would be ties of rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(20)


def greedy_gpt(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -count:]


def test_gpt_with_cache_equals_full_forward(gpt):
    ids = torch.randint(40, (3, 7))
    new = generate(gpt, ids, max_new_tokens=20, temperature=0)
    assert new.shape == (3, 20)
    assert len(new.unique()) > 5
    assert torch.equal(new, greedy_gpt(gpt, ids, 20))


def test_int8_cache(gpt, encoder_decoder):
    ids = torch.randint(40, (3, 7))
    new = generate(gpt, ids, max_new_tokens=6, temperature=0, cache_dtype=torch.int8)
    cache, expected, chunk = gpt.make_cache(3, 13, torch.int8), [], ids
    for _ in range(6):
        chunk = gpt(chunk, cache=cache).logits[:, -1].argmax(-1, keepdim=True)
        expected.append(chunk)
    assert torch.equal(new, torch.cat(expected, 1))
    new = generate(encoder_decoder, ids, max_new_tokens=6, temperature=0, bos_id=1, cache_dtype=torch.int8)
    assert new.shape == (3, 6)
    with pytest.raises(
        ValueError, match="dtype must be one of None, torch.float32, torch.int8, torch.float8_e4m3fn, got torch.float64"
    ):
        generate(gpt, ids, max_new_tokens=6, cache_dtype=torch.float64)


def test_encoder_decoder_with_cache_equals_full_forward(encoder_decoder):
    source = torch.randint(40, (3, 9))
    written = torch.full((3, 1), 1)
    for _ in range(20):
        logits = encoder_decoder(source, written).logits[:, -1]
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    new = generate(encoder_decoder, source, max_new_tokens=20, temperature=0, bos_id=1)
    assert len(new.unique()) > 5
    assert torch.equal(new, written[:, 1:])


def test_encoder_decoder_goes_on_from_what_it_is_given(encoder_decoder):
    source, beginning = torch.randint(40, (2, 9)), torch.randint(40, (2, 3))
    whole = generate(encoder_decoder, source, max_new_tokens=12, temperature=0, decoder_input_ids=beginning)
    later = torch.cat([beginning, whole[:, :5]], 1)
    again = generate(encoder_decoder, source, max_new_tokens=7, temperature=0, decoder_input_ids=later)
    assert torch.equal(again, whole[:, 5:])
    logits = encoder_decoder(source, beginning).logits[:, -1]
    assert torch.equal(whole[:, 0], logits.argmax(-1))


def test_encoder_writes_with_causal_attention():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SMALL))
    sharpen(encoder)
    ids = torch.randint(40, (2, 5))
    expected = ids
    for _ in range(10):
        logits = encoder(expected, is_causal=True).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(encoder, ids, max_new_tokens=10, temperature=0), expected[:, 5:])


def test_left_padding_changes_nothing(gpt):
    rows = [torch.randint(40, (n,)) for n in (3, 8, 5)]
    ids = torch.stack([torch.nn.functional.pad(row, (8 - len(row), 0), value=7) for row in rows])
    mask = torch.stack([torch.arange(8) >= 8 - len(row) for row in rows])
    together = generate(gpt, ids, max_new_tokens=12, attention_mask=mask, temperature=0, repetition_penalty=1.3)
    for row, new in zip(rows, together, strict=True):
        alone = generate(gpt, row[None], max_new_tokens=12, temperature=0, repetition_penalty=1.3)
        assert torch.equal(alone[0], new)


def test_padding_does_not_count_as_seen(gpt):
    row = torch.randint(40, (1, 5))
    alone = generate(gpt, row, max_new_tokens=6, temperature=0, repetition_penalty=50.0)
    # Padded with the very token that would come first: taken as seen, it would be pushed away.
    ids = torch.cat([alone[:, :1].expand(1, 3), row], 1)
    mask = torch.arange(8)[None] >= 3
    padded = generate(gpt, ids, max_new_tokens=6, attention_mask=mask, temperature=0, repetition_penalty=50.0)
    assert torch.equal(padded, alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_padding_changes_nothing(encoder_decoder, side):
    rows = [torch.randint(40, (n,)) for n in (3, 8)]
    pad = [(8 - len(row), 0) if side == "left" else (0, 8 - len(row)) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, p, value=7) for row, p in zip(rows, pad, strict=True)])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones(len(row), dtype=torch.bool), p) for row, p in zip(rows, pad, strict=True)]
    )
    together = generate(encoder_decoder, ids, max_new_tokens=12, attention_mask=mask, temperature=0, bos_id=1)
    for row, new in zip(rows, together, strict=True):
        assert torch.equal(generate(encoder_decoder, row[None], max_new_tokens=12, temperature=0, bos_id=1)[0], new)


def test_seed_repeats_and_leaves_the_global_generator_alone(gpt):
    ids = torch.randint(40, (2, 4))
    before = torch.get_rng_state()
    first = generate(gpt, ids, max_new_tokens=30, temperature=3.0, seed=5)
    assert torch.equal(first, generate(gpt, ids, max_new_tokens=30, temperature=3.0, seed=5))
    assert not torch.equal(first, generate(gpt, ids, max_new_tokens=30, temperature=3.0, seed=6))
    assert not torch.equal(
        generate(gpt, ids, max_new_tokens=30, temperature=3.0), generate(gpt, ids, max_new_tokens=30, temperature=3.0)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_eos_ends_a_row_and_the_batch(gpt):
    ids = torch.randint(40, (4, 5))
    free = generate(gpt, ids, max_new_tokens=20, temperature=0)
    eos = int(free[0, 6])
    ended = generate(gpt, ids, max_new_tokens=20, temperature=0, eos_id=eos, pad_id=39)
    for row, expected in zip(ended, free, strict=True):
        stop = (expected == eos).nonzero().flatten().tolist()
        kept = stop[0] + 1 if stop else 20
        assert torch.equal(row[:kept], expected[:kept][: len(row)])
        assert (row[kept:] == 39).all()
    single = generate(gpt, ids[:1], max_new_tokens=20, temperature=0, eos_id=eos)
    assert single[0, -1] == eos and single.shape[1] <= 7


def test_stop_function_and_streaming(gpt):
    ids = torch.randint(40, (1, 5))
    columns = []
    new = generate(
        gpt, ids, max_new_tokens=20, temperature=0, stop=lambda tokens: len(tokens) == 4, on_token=columns.append
    )
    assert new.shape == (1, 4)
    assert torch.equal(torch.stack(columns, 1), new)


def test_training_mode_is_restored_also_after_an_error(gpt):
    gpt.train()
    generate(gpt, torch.zeros(1, 2, dtype=torch.long), max_new_tokens=1)
    assert gpt.training

    def fail(token):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        generate(gpt, torch.zeros(1, 2, dtype=torch.long), max_new_tokens=1, on_token=fail)
    assert gpt.training


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": math.nan}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("min_p", {"min_p": -0.1}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("input_ids", {"input_ids": torch.zeros(3, dtype=torch.long)}),
        ("input_ids", {"input_ids": torch.zeros(1, 0, dtype=torch.long)}),
        ("input_ids", {"input_ids": torch.zeros(1, 3)}),
        ("attention_mask", {"attention_mask": torch.ones(1, 4, dtype=torch.bool)}),
        ("attention_mask", {"attention_mask": torch.ones(1, 3)}),
        ("bos_id", {}),
        ("decoder_input_ids", {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}),
    ],
)
def test_errors_name_the_argument(encoder_decoder, name, arguments):
    arguments = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=name):
        generate(encoder_decoder, **arguments)


def test_model_of_another_class_is_refused():
    with pytest.raises(TypeError, match="model"):
        generate(torch.nn.Linear(2, 2), torch.zeros(1, 3, dtype=torch.long), max_new_tokens=1)


# -- Filters against plain Python --------------------------------------------------------------------------------------


def kept(logits):
    return [[i for i, value in enumerate(row) if value > -math.inf] for row in logits.tolist()]


def softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("k", [1, 3, 12, 50])
def test_top_k(k):
    logits = torch.randn(6, 12)
    expected = [sorted(sorted(range(12), key=lambda i: -row[i])[:k]) for row in logits.tolist()]
    assert kept(keep_top_k(logits, k)) == expected


@pytest.mark.parametrize("p", [0.01, 0.3, 0.7, 0.95, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(p):
    logits = torch.randn(6, 12, dtype=torch.float64) * 2
    expected = []
    for row in logits.tolist():
        probabilities, total, chosen = softmax(row), 0.0, []
        for i in sorted(range(12), key=lambda i: -row[i]):
            if total >= p:
                break
            chosen.append(i)
            total += probabilities[i]
        expected.append(sorted(chosen))
    assert kept(keep_top_p(logits, p)) == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_min_p(p):
    logits = torch.randn(6, 12, dtype=torch.float64) * 2
    expected = []
    for row in logits.tolist():
        probabilities = softmax(row)
        expected.append([i for i in range(12) if probabilities[i] >= p * max(probabilities)])
    assert kept(keep_min_p(logits, p)) == expected


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_seen(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(20000, 4)
    seen = torch.zeros(20000, 4, dtype=torch.bool)
    tokens = Sampling(temperature=0.5, top_k=3).draw(logits, seen, torch.Generator().manual_seed(0))
    expected = torch.tensor([2.0, 0.0, -torch.inf, 4.0]).softmax(-1)
    assert torch.bincount(tokens, minlength=4).div(20000) == pytest.approx(expected, abs=0.012)


# -- Text --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer():
    tokenizer = Tokenizer.train("the cat sat on the mat and the dog ran. " * 20, 280)
    torch.manual_seed(0)
    shape = SMALL | {"vocab_size": tokenizer.vocab_size, "max_length": 24}
    return EncoderDecoder(EncoderDecoderConfig(EncoderConfig(**shape, positions="rotary"))), tokenizer


def test_continue_text_goes_beyond_the_models_length_and_streams(writer):
    model, tokenizer = writer
    pieces = []
    arguments = dict(max_new_tokens=50, context=10, overlap=4, chunk=12, seed=3)
    text = continue_text(model, tokenizer, "the cat sat on the mat and", on_text=pieces.append, **arguments)
    assert text == continue_text(model, tokenizer, "the cat sat on the mat and", **arguments)
    assert text.startswith("".join(pieces)) and len("".join(pieces)) > len(text) // 2
    assert len(tokenizer.encode(text)) > 24


def test_continue_text_stops_before_the_string(writer):
    model, tokenizer = writer
    arguments = dict(max_new_tokens=60, context=10, chunk=12, seed=4)
    free = continue_text(model, tokenizer, "the cat", **arguments)
    word = free[20:22]
    pieces = []
    stopped = continue_text(model, tokenizer, "the cat", stop=[word], on_text=pieces.append, **arguments)
    assert stopped == free[: free.index(word)]
    assert "".join(pieces) == stopped


def test_a_space_at_the_end_of_the_prompt_is_the_models_to_write(writer):
    model, tokenizer = copy.deepcopy(writer[0]), writer[1]
    arguments = dict(max_new_tokens=12, context=10, temperature=0)
    with torch.no_grad():
        # A model that writes " the" wherever it stands.
        model.head.weight.zero_()
        model.head.weight[int(tokenizer.encode(" the")[0])] = 1
        model.decoder.norm.weight.zero_()
        model.decoder.norm.bias.fill_(1)
    assert continue_text(model, tokenizer, "on", **arguments) == " the" * 12
    pieces = []
    assert continue_text(model, tokenizer, "on ", on_text=pieces.append, **arguments) == "the" + " the" * 11
    assert "".join(pieces) == "the" + " the" * 11


def test_word_share():
    assert word_share("The dog's Cat zzz", "the cat and the dog's bone") == 0.75
    assert word_share("123 ...", "the cat") == 0.0


def test_longest_copy():
    corpus = "to be or not to be, that is the question"
    assert longest_copy("he said not to be, that was all", corpus) == " not to be, that "
    assert longest_copy("ZZZ", corpus) == ""
    assert longest_copy(corpus, corpus) == corpus
