"""EncoderDecoder from transformers' folders of T5, BART and Whisper: logits, cached steps and greedy tokens."""

from __future__ import annotations

import pytest
import torch
from foreign import change_config, change_weights, close, randomized

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import (  # noqa: E402
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from gpt4fast.generation import generate  # noqa: E402
from gpt4fast.models import EncoderDecoder  # noqa: E402

T5 = {
    "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 99,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "layer_norm_epsilon": 1e-3,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None,
}  # fmt: skip
HALVES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "vocab_size": 99,
}  # fmt: skip
BART = {
    **HALVES, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
WHISPER = {
    **HALVES, "num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 40, "pad_token_id": 1,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": [],
    "begin_suppress_tokens": [],
}  # fmt: skip
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5 1.1": lambda: untied(
        T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "bart, scaled": lambda: BartForConditionalGeneration(
        BartConfig(**BART, scale_embedding=True, activation_function="relu")
    ),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
}


def untied(model):
    model.lm_head.weight = torch.nn.Parameter(torch.randn(99, 32) * 0.3)
    return model


def random_model(name):
    model = randomized(MODELS[name]())
    model.set_attn_implementation("eager")
    if "bart" in name:  # a buffer
        model.final_logits_bias.normal_(std=0.2)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("Attention.q.weight"):  # unscaled scores of large weights magnify every rounding
            parameter.data *= 0.3
    return model


@pytest.fixture(params=MODELS, ids=list(MODELS))
def pair(request, tmp_path):
    """transformers' model, and ours from its folder."""
    theirs = random_model(request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, EncoderDecoder.from_pretrained(tmp_path)


def is_whisper(model):
    return isinstance(model, WhisperForConditionalGeneration)


def read(model):
    """What the encoder reads: ids, or features of sound."""
    return torch.randn(3, 10, 24) if is_whisper(model) else torch.randint(3, 99, (3, 15))


@torch.no_grad()
def test_logits_are_transformers(pair, tmp_path):
    theirs, ours = pair
    source, target = read(theirs), torch.randint(3, 99, (3, 17))
    expected = theirs(source, decoder_input_ids=target)
    output = ours(source, target)
    close(output.encoder_output, expected.encoder_last_hidden_state)
    close(output.logits, expected.logits)
    if "T5" not in type(theirs).__name__:  # whose norm is float32, whatever the dtype
        source = source.double() if is_whisper(theirs) else source
        exact = EncoderDecoder.from_pretrained(tmp_path, dtype=torch.float64)
        close(exact(source, target).logits, theirs.double()(source, decoder_input_ids=target).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair, side):
    theirs, ours = pair
    if is_whisper(theirs):
        with pytest.raises(ValueError, match="attention_mask must be None for sound"):
            ours(read(theirs), torch.ones(3, 2, dtype=torch.long), attention_mask=torch.ones(3, 12))
        return
    source, target = read(theirs), torch.randint(3, 99, (3, 8))
    real = torch.ones(3, 15, dtype=torch.bool)
    real[1, :4], real[2, :9] = False, False
    if side == "right":
        real = real.flip(1)
    actual = ours(source, target, attention_mask=real).logits
    if side == "right" or "T5" in type(theirs).__name__:
        close(actual, theirs(source, attention_mask=real.long(), decoder_input_ids=target).logits)
    for row in range(3):  # BART counts positions from the padding; we give each row what it would get alone
        alone = theirs(source[row : row + 1, real[row]], decoder_input_ids=target[row : row + 1]).logits
        close(actual[row], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [7, 1, 4]], ids=["token by token", "chunks"])
def test_cached_steps_equal_the_whole(pair, chunks):
    theirs, ours = pair
    source, target = read(theirs), torch.randint(3, 99, (3, 12))
    cache = ours.make_cache(3, 20)
    steps = [ours(source, chunk, cache=cache).logits for chunk in target.split(chunks, 1)]
    close(torch.cat(steps, 1), theirs(source, decoder_input_ids=target).logits)


@torch.no_grad()
def test_cached_rows_of_different_lengths(pair):
    """Decoder prompts that are padded on either side, then steps."""
    theirs, ours = pair
    source, texts = read(theirs), [torch.randint(3, 99, (1, n)) for n in (9, 5, 7)]
    for side in ("left", "right"):
        prompt, real = torch.full((3, 7), 5), torch.zeros(3, 7, dtype=torch.bool)
        for row, text in enumerate(texts):
            n = text.shape[1] - 2
            place = slice(7 - n, 7) if side == "left" else slice(0, n)
            prompt[row, place], real[row, place] = text[0, :n], True
        cache = ours.make_cache(3, 9)
        ours(source, prompt, decoder_attention_mask=real, cache=cache)
        for step in (-2, -1):
            ids = torch.stack([text[0, step : step + 1 or None] for text in texts])
            logits = ours(None, ids, cache=cache).logits[:, -1]
            for row, text in enumerate(texts):
                whole = text[:, : text.shape[1] + step + 1]
                close(logits[row], theirs(source[row : row + 1], decoder_input_ids=whole).logits[0, -1])


@torch.no_grad()
def test_greedy_tokens(pair):
    theirs, ours = pair
    source, start = read(theirs), theirs.config.decoder_start_token_id
    if is_whisper(theirs):  # its own generate has rules for time stamps
        expected = torch.full((3, 1), start)
        for _ in range(12):
            logits = theirs(source, decoder_input_ids=expected).logits[:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), 1)
        mask = None
    else:
        mask = torch.ones(3, 15, dtype=torch.bool)
        mask[1, 9:] = False
        # Without its cache, which counts the encoder's layers where T5's decoder has more.
        expected = theirs.generate(
            source, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False
        )
    actual = generate(ours, source, attention_mask=mask, max_new_tokens=12, bos_id=start, temperature=0)
    assert torch.equal(actual, expected[:, 1:])
    assert len(set(actual.flatten().tolist())) > 1


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rounded_caches(pair, cache_dtype):
    theirs, ours = pair
    source, target = read(theirs), torch.randint(3, 99, (3, 12))
    cache = ours.make_cache(3, 12, cache_dtype)
    actual = torch.cat([ours(source, chunk, cache=cache).logits for chunk in target.split([7, 1, 4], 1)], 1)
    expected = theirs(source, decoder_input_ids=target).logits
    bound = 0.05 if cache_dtype == torch.int8 else 0.3
    assert 1e-5 < (actual - expected).abs().mean() / expected.abs().mean() < bound


@torch.no_grad()
def test_our_own_format_afterwards(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again = EncoderDecoder.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert len(list(again.parameters())) == len(list(ours.parameters()))
    source, target = read(theirs), torch.randint(3, 99, (3, 12))
    assert torch.equal(again(source, target).logits, ours(source, target).logits)


def test_training_goes_on(pair):
    theirs, ours = pair
    ours.train()
    source, target = read(theirs), torch.randint(3, 99, (3, 12))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = ours(source, target[:, :-1], target[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_t5_beyond_the_length_it_was_trained_at(tmp_path):
    """Relative positions have no end."""
    theirs = random_model("t5")
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, n_positions=16)
    ours = EncoderDecoder.from_pretrained(tmp_path)
    source, target = torch.randint(3, 99, (1, 1100)), torch.randint(3, 99, (1, 3))
    close(ours(source, target).logits, theirs(source, decoder_input_ids=target).logits)


@torch.no_grad()
def test_flan_t5_as_transformers_4_wrote_it(tmp_path):
    """Scaled or not is what tie_word_embeddings says; and the shared embedding stands there three times."""
    theirs = random_model("t5 1.1")
    theirs.save_pretrained(tmp_path)
    change_config(tmp_path, scale_decoder_outputs="drop", tie_word_embeddings=False)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    change_weights(tmp_path, lambda old: old | {name: old["shared.weight"].clone() for name in copies})
    ours = EncoderDecoder.from_pretrained(tmp_path)
    assert not ours.config.decoder.tie_embeddings
    source, target = torch.randint(3, 99, (2, 9)), torch.randint(3, 99, (2, 3))
    close(ours(source, target).logits, theirs(source, decoder_input_ids=target).logits)


def test_wrong_sound(tmp_path):
    random_model("whisper").save_pretrained(tmp_path)
    ours = EncoderDecoder.from_pretrained(tmp_path)
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(TypeError, match="input_ids must be floating-point features of audio, got torch.int64"):
        ours(ids, ids)
    for shape in ((1, 10, 25), (1, 11, 24), (10, 24), (1, 10, 0)):
        with pytest.raises(ValueError, match=r"input_ids must be features \(batch, 10, 1 to 24 frames\), got"):
            ours(torch.zeros(shape), ids)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("t5", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj is 'gated-relu', which is not supported"),
        ("t5", {"relative_attention_num_buckets": 6}, "relative_buckets must be a positive multiple of 4, got 6"),
        ("t5", {"d_kv": 8}, r"should make decoder.blocks.0.attention.qkv.weight \(96, 32\)"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings is False, which is not supported"),
        ("bart", {"activation_function": "swish"}, "activation_function is 'swish'"),
        ("whisper", {"num_mel_bins": 0}, "num_mel_bins must be a positive int, got 0"),
        ("whisper", {"model_type": "marian"}, "EncoderDecoder reads: t5, bart, whisper"),
    ],
)
def test_what_we_do_not_honour_is_named(tmp_path, name, changes, message):
    random_model(name).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        EncoderDecoder.from_pretrained(tmp_path)
