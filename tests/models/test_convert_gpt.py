"""GPT from transformers' folders: logits, cached steps and greedy tokens are those of transformers' eager attention.

Tiny models of every family. All parameters are random, since transformers begins norms with ones and biases with zeros;
windows are shorter than the sequences and soft caps bite.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from foreign import change_config, change_weights, close, randomized
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from gpt4fast.generation import generate  # noqa: E402
from gpt4fast.models import GPT  # noqa: E402

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 99, "eos_token_id": None}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "gpt2": lambda: GPT2Config(**GPT2, n_inner=40, layer_norm_epsilon=1e-3),
    "gpt2, scaled by layer": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2, no scale": lambda: GPT2Config(**GPT2, scale_attn_weights=False, activation_function="relu"),
    "llama": lambda: LlamaConfig(**SIZES, rms_norm_eps=1e-3, rope_theta=100.0),
    "llama, biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, biases of attention": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "llama 3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama, linear": lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 3.0}),
    "llama, yarn": lambda: LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "mistral, no window": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2, windows": lambda: Qwen2Config(
        **SIZES, sliding_window=4, use_sliding_window=True, max_window_layers=1, rope_theta=1e6
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, attention_bias=True),
    "qwen3, yarn": lambda: Qwen3Config(**SIZES, rope_parameters=YARN),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(
        **SIZES, **SLIDING, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=9
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, **SLIDING, query_pre_attn_scalar=9, attention_bias=True,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        },
    ),
}  # fmt: skip


def random_model(config):
    return randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def pair(request, tmp_path):
    """transformers' model, and ours from its folder."""
    theirs = random_model(CONFIGS[request.param]())
    theirs.save_pretrained(tmp_path)
    assert theirs.config._attn_implementation == "eager"
    return theirs, GPT.from_pretrained(tmp_path)


@torch.no_grad()
def test_logits_are_transformers(pair, tmp_path):
    theirs, ours = pair
    ids = torch.randint(1, 99, (3, 21))
    expected = theirs(ids).logits
    assert not ours.training and expected.std() > 0.1
    close(ours(ids).logits, expected)
    if "GPT2" in type(theirs).__name__:  # rotary frequencies are float32 in transformers, whatever the dtype
        close(GPT.from_pretrained(tmp_path, dtype=torch.float64)(ids).logits, theirs.double()(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair, side):
    theirs, ours = pair
    ids, real = torch.randint(1, 99, (3, 17)), torch.ones(3, 17, dtype=torch.bool)
    for row, n in enumerate((0, 5, 9)):
        real[row, :n] = False
    if side == "right":
        real = real.flip(1)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
    close(ours(ids, attention_mask=real).logits[real], expected[real])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [7, 1, 4]], ids=["token by token", "chunks"])
def test_cached_steps_equal_the_whole(pair, chunks):
    theirs, ours = pair
    ids = torch.randint(1, 99, (2, 12))
    cache = ours.make_cache(2, 20)
    steps = torch.cat([ours(chunk, cache=cache).logits for chunk in ids.split(chunks, 1)], 1)
    close(steps, theirs(ids).logits)


@torch.no_grad()
def test_greedy_tokens(pair):
    theirs, ours = pair
    ids, real = torch.randint(1, 99, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    expected = theirs.generate(
        ids, attention_mask=real.long(), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    actual = generate(ours, ids, attention_mask=real, max_new_tokens=12, temperature=0)
    assert torch.equal(actual, expected[:, 9:])
    assert len(set(expected[:, 9:].flatten().tolist())) > 2


@torch.no_grad()
def test_half_precision_errs_no_more_than_twice_as_much_as_transformers(pair, tmp_path):
    theirs, _ = pair
    theirs.bfloat16().save_pretrained(tmp_path / "half")
    ids = torch.randint(1, 99, (4, 21))
    exact = GPT.from_pretrained(tmp_path / "half", dtype=torch.float64)(ids).logits
    actual = GPT.from_pretrained(tmp_path / "half")(ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).pow(2).mean() <= 4 * (theirs(ids).logits - exact).pow(2).mean()


@torch.no_grad()
def test_our_own_format_afterwards(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    ids = torch.randint(1, 99, (2, 12))
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert (ours.head.weight is ours.stack.tokens.weight) == ours.config.tie_embeddings
    assert len(list(again.parameters())) == len(list(ours.parameters()))


# -- What folders look like --------------------------------------------------------------------------------------------


def small(tmp_path, config=None, **save):
    theirs = random_model(config or LlamaConfig(**SIZES))
    theirs.save_pretrained(tmp_path, **save)
    return theirs


@torch.no_grad()
def test_shards(tmp_path):
    theirs = small(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    ids = torch.randint(1, 99, (2, 12))
    close(GPT.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}, which model.safetensors.index.json lists"):
        GPT.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="names '../elsewhere.safetensors', which is not a file of this folder"):
        GPT.from_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        GPT.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    "config, scaling",
    [
        (LlamaConfig(**SIZES, rope_theta=77.0), None),
        (LlamaConfig(**SIZES, rope_parameters=LLAMA3), {k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}),
            {"type": "linear", "factor": 3.0},
        ),
    ],
    ids=["base", "llama3", "linear"],
)
def test_rotary_fields_as_transformers_4_wrote_them(tmp_path, config, scaling):
    theirs = small(tmp_path, config)
    base = config.rope_parameters["rope_theta"]
    change_config(tmp_path, rope_parameters="drop", rope_theta=base, rope_scaling=scaling)
    ids = torch.randint(1, 99, (2, 30))
    close(GPT.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_gemma3_as_transformers_4_wrote_it(tmp_path):
    theirs = small(tmp_path, CONFIGS["gemma3"]())
    change_config(
        tmp_path, rope_parameters="drop", rope_theta=1e5, rope_local_base_freq=50.0, layer_types="drop",
        rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=2,
    )  # fmt: skip
    ids = torch.randint(1, 99, (2, 30))
    close(GPT.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_gemma3_with_pictures(tmp_path, prefix):
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Gemma3Config(text_config=CONFIGS["gemma3"](), vision_config=vision, mm_tokens_per_image=4)
    theirs = randomized(Gemma3ForConditionalGeneration(config))
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)

    def rename(name):
        for old in ("language_model.model.", "model.language_model."):
            name = name.replace(old, prefix)
        return name

    change_weights(tmp_path, lambda old: {rename(name): tensor for name, tensor in old.items()})
    ids = torch.randint(1, 90, (2, 12))
    close(GPT.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
    change_config(tmp_path, text_config="drop")
    with pytest.raises(ValueError, match="text_config must be an object, got None"):
        GPT.from_pretrained(tmp_path)


@torch.no_grad()
def test_gpt2_of_the_first_releases(tmp_path):
    """Names without a prefix, no head, and the causal masks among the weights."""
    theirs = small(tmp_path, GPT2Config(**GPT2))
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    change_weights(tmp_path, lambda old: {k.removeprefix("transformer."): v for k, v in old.items()} | masks)
    ids = torch.randint(1, 99, (2, 12))
    close(GPT.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding(tmp_path, same):
    """The file decides, as in transformers."""
    small(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=True))
    change_weights(
        tmp_path, lambda old: old | {"lm_head.weight": old["model.embed_tokens.weight"] * (1.0 if same else 0.5)}
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.tie_embeddings == same
    ids = torch.randint(1, 99, (2, 12))
    close(ours(ids).logits, theirs(ids).logits)


def test_dtypes(tmp_path):
    small(tmp_path, CONFIGS["gemma2"]()).bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    before = torch.get_rng_state()
    model = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    # The one that is added to a norm's weight is added before the rounding.
    assert torch.equal(model.stack.blocks[0].attention_norm.weight, 1 + stored.float())
    model.save_pretrained(tmp_path / "ours")
    half = GPT.from_pretrained(tmp_path / "ours", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    for wrong in (torch.int8, "float32"):
        with pytest.raises(ValueError, match="dtype must be a floating-point torch.dtype or None"):
            GPT.from_pretrained(tmp_path, dtype=wrong)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rounded_caches(tmp_path, cache_dtype):
    theirs = small(tmp_path, CONFIGS["gemma3"]())
    ours = GPT.from_pretrained(tmp_path)
    ids = torch.randint(1, 99, (2, 12))
    cache = ours.make_cache(2, 12, cache_dtype)
    actual = torch.cat([ours(chunk, cache=cache).logits for chunk in ids.split([7, 1, 4], 1)], 1)
    expected = theirs(ids).logits
    # Of the largest number, an int8 keeps 1 / 254, a float8 1 / 16.
    bound = 0.05 if cache_dtype == torch.int8 else 0.3
    assert (actual - expected).abs().max() < bound * expected.abs().max()
    assert (actual - expected).abs().max() > 1e-5 * expected.abs().max()


def test_training_goes_on(tmp_path):
    small(tmp_path, CONFIGS["gemma3"]())
    model = GPT.from_pretrained(tmp_path).train()
    ids = torch.randint(1, 99, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# -- Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama", {"model_type": "mamba"}, "describes a 'mamba'; of others' models GPT reads: gpt2, llama, mistral"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which is not supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', which is not supported; it must be 'silu' or 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' needs 'factor', which is missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama, yarn", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, "mscale is 0.7"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "a value that makes no frequencies"),
        ("llama", {"rope_parameters": {"rope_theta": "large"}}, "rope_theta must be a number, 0 or more, got 'large'"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps must be a number, 0 or more, got 'small'"),
        ("llama", {"hidden_size": "drop"}, "config.json: the field hidden_size is missing"),
        ("llama", {"hidden_size": 32.0}, "hidden_size must be a positive int, got 32.0"),
        ("llama", {"num_key_value_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ("gpt2", {"activation_function": "swish"}, "activation_function is 'swish'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types is 'chunked_attention'"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None, which is not supported; it must be an int"),
        ("gemma2", {"sliding_window": -4}, "windows must be 3 ints, one per layer and none negative"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "windows must be 3 ints, one per layer"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}, "full_attention": {}}},
            "rope_parameters is .*'default' in rope_type of sliding_attention",
        ),
        ("llama", {"num_hidden_layers": 4}, r"missing layers.3.input_layernorm.weight.* and \d+ more"),
        ("llama", {"num_hidden_layers": 2}, "unexpected model.layers.2."),
        (
            "llama",
            {"intermediate_size": 50},
            r"mlp.gate_proj.weight \(48, 32\) torch.float32 and layers.0.mlp.up_proj.weight \(48, 32\) .* should make "
            r"stack.blocks.0.mlp.up.weight \(100, 32\)",
        ),
        ("llama", {"attention_bias": True}, "missing layers.0.self_attn.q_proj.bias"),
        ("llama, biases", {"tie_word_embeddings": False}, "missing lm_head.weight"),
        ("llama", {"model_type": "bert"}, "describes a 'bert', which Encoder.from_pretrained reads"),
        ("llama, biases", {"attention_bias": False}, "unexpected model.layers.0.self_attn.k_proj.bias"),
    ],
)  # fmt: skip
def test_what_we_do_not_honour_is_named(tmp_path, family, changes, message):
    small(tmp_path, CONFIGS[family]())
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(32, 31), torch.zeros(32), torch.zeros(32, 32, dtype=torch.int8)], ids=str
)
def test_tensors_that_do_not_fit(tmp_path, wrong):
    small(tmp_path)
    change_weights(tmp_path, lambda old: old | {"model.layers.1.self_attn.k_proj.weight": wrong})
    shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"k_proj.weight {shape} {wrong.dtype} and .*blocks.1.attention.qkv.weight"):
        GPT.from_pretrained(tmp_path)


def test_files_that_are_no_safetensors(tmp_path):
    small(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        GPT.from_pretrained(tmp_path)
    os.unlink(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor model.safetensors.index.json"):
        GPT.from_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, .* save the model as safetensors first"):
        GPT.from_pretrained(tmp_path)
