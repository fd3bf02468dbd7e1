"""GPT from GGUF files: written by the gguf package from transformers' models, as llama.cpp's converter does it.

Names are the package's own, and so are the numbers of quantised blocks.
"""

from __future__ import annotations

import struct
import sys
import time

import pytest
import torch
from foreign import close, randomized

transformers = pytest.importorskip("transformers", minversion="5.23")
gguf = pytest.importorskip("gguf")

import numpy as np  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from gpt4fast.generation import generate  # noqa: E402
from gpt4fast.models import GPT, Encoder  # noqa: E402
from gpt4fast.models.convert.gguf import GGUFFile  # noqa: E402

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=96, layer_norm_epsilon=1e-3),
    "llama": lambda: LlamaConfig(**SIZES, rope_theta=100.0),
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama 3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, linear": lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 3.0}),
    "llama, window": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SIZES, rope_theta=1e6),
    "qwen3": lambda: Qwen3Config(
        **SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(
        **SIZES, sliding_window=4, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=4, query_pre_attn_scalar=16),
}


def random_model(name):
    return randomized(AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager"))


def write(path, model, name, quantize=lambda tensor_name, tensor: None, **changes):
    """The model as llama.cpp's convert_hf_to_gguf.py writes it. quantize: a gguf type, None for float32. changes:
    metadata instead, by keys with __ for dots."""
    config, architecture = model.config, name.split(",")[0].split(" ")[0]
    w = gguf.GGUFWriter(path, architecture)
    w.add_name("test")
    w.add_tokenizer_model("none")
    w.add_token_list([f"token {i}" for i in range(96)])
    w.add_token_scores([0.0] * 96)
    rotary = getattr(config, "rope_parameters", None) or {}
    rotary = rotary.get("full_attention", rotary)
    values = {
        "context_length": 64, "embedding_length": 32, "block_count": config.num_hidden_layers,
        "attention.head_count": 4, "feed_forward_length": 128 if architecture == "gpt2" else 64,
    }  # fmt: skip
    if architecture == "gpt2":
        values["attention.layer_norm_epsilon"] = 1e-3
    else:
        values |= {
            "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
            "attention.layer_norm_rms_epsilon": 1e-3, "rope.freq_base": float(rotary["rope_theta"]),
            "rope.dimension_count": 16, "vocab_size": 96,
        }  # fmt: skip
        for key in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key, None):
                values[("attention." if key == "sliding_window" else "") + key] = getattr(config, key)
        if rotary["rope_type"] in ("linear", "yarn"):
            values |= {"rope.scaling.type": rotary["rope_type"], "rope.scaling.factor": rotary["factor"]}
        if rotary["rope_type"] == "yarn":
            values["rope.scaling.original_context_length"] = rotary["original_max_position_embeddings"]
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in values.items():
        if value is None:
            continue
        kind = {int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(w, f"add_{kind}")(f"{architecture}.{key}", value)

    architectures = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    for their_name, tensor in model.state_dict().items():
        if their_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor_name = names.get_name(their_name, try_suffixes=(".weight", ".bias"))
        if architecture == "gpt2" and their_name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if architecture == "llama" and their_name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in their_name else 2  # llama.cpp's permute()
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and their_name.endswith("norm.weight"):
            tensor = tensor + 1
        kind, data = quantize(tensor_name, tensor), tensor.float().contiguous().numpy()
        if kind is None:
            w.add_tensor(tensor_name, data)
        else:
            w.add_tensor(tensor_name, gguf.quantize(data, kind), raw_dtype=kind)
    if rotary.get("rope_type") == "llama3":
        plain = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
        w.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_transformers(tmp_path, name):
    theirs = random_model(name)
    ours = GPT.from_pretrained(write(tmp_path / "model.gguf", theirs, name))
    assert ours.config.tie_embeddings == theirs.config.tie_word_embeddings and not ours.training
    ids = torch.randint(1, 96, (2, 21))
    close(ours(ids).logits, theirs(ids).logits)
    expected = theirs.generate(ids[:, :9], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generate(ours, ids[:, :9], max_new_tokens=8, temperature=0), expected[:, 9:])
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(GPT.from_pretrained(tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_an_output_beside_the_embedding(tmp_path):
    """gpt2's files hold it twice, at times."""
    theirs = random_model("llama")
    theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight)
    ours = GPT.from_pretrained(write(tmp_path / "model.gguf", theirs, "llama"))
    assert ours.config.tie_embeddings and ours.head.weight is ours.stack.tokens.weight


BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*BLOCKS, "F16", "BF16"])
def test_quantised_blocks(tmp_path, kind):
    """Quantised weights are the weights, and what is left of the numbers decides the dtype."""
    kind = gguf.GGMLQuantizationType[kind]

    def quantize(name, tensor):
        return kind if tensor.dim() == 2 else None

    theirs = random_model("llama")
    ours = GPT.from_pretrained(write(tmp_path / "model.gguf", theirs, "llama", quantize))
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)))
    ids = torch.randint(1, 96, (2, 12))
    whole = GPT.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32)
    close(whole(ids).logits, theirs(ids).logits)
    half = GPT.from_pretrained(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert torch.equal(half.stack.blocks[0].mlp.down.weight, whole.stack.blocks[0].mlp.down.weight.bfloat16())


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"])
def test_quantised_blocks_of_256(tmp_path, kind):
    """Bytes at random, since the package does not write these; what they mean is its."""
    kind = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 120, (3, 2 * size), dtype=np.uint8)  # scales that are no NaN
    w = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    w.add_tensor("rows", data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    actual = GGUFFile(tmp_path / "model.gguf").read("rows")
    assert actual.shape == (3, 512) and actual.dtype == torch.float32 and actual.isfinite().all() and actual.std() > 0
    assert torch.equal(actual, torch.from_numpy(gguf.dequantize(data, kind)))


def test_only_quantised_files_need_the_package(tmp_path, monkeypatch):
    theirs = random_model("llama")
    plain = write(tmp_path / "plain.gguf", theirs, "llama")
    quantised = write(
        tmp_path / "quantised.gguf", theirs, "llama",
        lambda name, tensor: gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name else None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "gguf", None)
    GPT.from_pretrained(plain)
    with pytest.raises(ImportError, match=r"tensor blk.0.ffn_up.weight is quantised .* pip install gpt4fast\[hf\]"):
        GPT.from_pretrained(quantised)


def test_a_block_by_hand():
    """One Q8_0 block: a float16 scale and 32 int8 numbers."""
    numbers = np.arange(-16, 16, dtype=np.int8)
    data = np.frombuffer(np.float16(0.5).tobytes() + numbers.tobytes(), dtype=np.uint8)
    assert (gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0) == numbers * 0.5).all()


# -- Files that are not what they should be ----------------------------------------------------------------------------


def string(text):
    return struct.pack("<Q", len(text)) + text


def header(tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def info(name=b"x", shape=(4,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


HUGE = 2**62
BROKEN = {
    b"": "is empty",
    b"GGU": "ends within its magic",
    b"GGML" + bytes(20): "is not a GGUF file",
    header(version=1): "GGUF version 1, which is not supported; it must be 2 or 3",
    b"GGUF" + struct.pack(">IQQ", 3, 0, 0): "GGUF version 50331648",
    header(tensors=HUGE): "ends within its tensor name",
    header(values=HUGE): "ends within its metadata key",
    header(values=1) + struct.pack("<Q", HUGE): f"ends within its metadata key: {HUGE} bytes",
    header(values=1) + string(b"\xff"): "metadata key is not UTF-8",
    header(values=1) + string(b"k") + struct.pack("<I", 99): "metadata k is of type 99",
    header(values=1) + string(b"k") + struct.pack("<IIQ", 9, 0, HUGE): "ends within its k",
    header(values=1) + string(b"k") + struct.pack("<IIQ", 9, 8, HUGE): "ends within its k",
    header(values=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1): "metadata k is an array of type 9",
    header(values=2) + 2 * (string(b"k") + struct.pack("<IB", 0, 1)): "has the metadata key k twice",
    header(tensors=1) + info(shape=(1,) * 9): "tensor x has 9 dimensions",
    header(tensors=1) + info(shape=(0,)): r"tensor x has the shape \(0,\)",
    header(tensors=1) + info(shape=(HUGE, HUGE)): "tensor x has .* past the file's end",
    header(tensors=1) + info(shape=(4,), offset=HUGE): "past the file's end",
    header(tensors=1) + info(shape=(4,), offset=4) + bytes(99): "is not aligned or past",
    header(tensors=1) + info(kind=77): "tensor x is of type 77, which is not supported",
    header(tensors=1) + info(shape=(33,), kind=8): r"the shape \(33,\), of rows not in blocks of 32",
    header(tensors=2) + 2 * info() + bytes(99): "has the tensor x twice",
    header(values=1) + string(b"general.alignment") + struct.pack("<II", 4, 0): "general.alignment is 0",
    header() + bytes(64): "is of the architecture None; GPT reads gpt2, llama",
}


@pytest.mark.parametrize("data", BROKEN, ids=list(range(len(BROKEN))))
def test_broken_files(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=BROKEN[data]):
        GPT.from_pretrained(path)


def test_a_file_cut_anywhere_and_bytes_changed(tmp_path):
    """A clear error or, where only a weight changed, a model; never a crash, never a wait."""
    theirs = random_model("llama 3")
    whole = write(tmp_path / "whole.gguf", theirs, "llama 3").read_bytes()
    path, random = tmp_path / "model.gguf", np.random.default_rng(0)
    start = whole.index(b"rope_freqs.weight")  # the last of the header
    for stop in [*random.integers(1, start, 60), len(whole) - 1]:
        path.write_bytes(whole[:stop])
        with pytest.raises(ValueError, match="model.gguf"):
            GPT.from_pretrained(path)
    refused = 0
    for _ in range(120):
        data = bytearray(whole)
        for place in random.integers(4, start, 3):
            data[place] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            GPT.from_pretrained(path)
        except ValueError as error:
            refused += 1
            assert str(error)
    assert refused > 60


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"expert_count": 8}, "metadata llama.expert_count is 8, which is unknown"),
        ("llama", {"rope__dimension_count": 8}, "rope.dimension_count is 8, which is not supported; it must be .* 16"),
        ("llama", {"attention__value_length": 8}, "attention.value_length is 8, which is not supported"),
        ("llama", {"rope__scaling__type": "longrope"}, "rope_type is 'longrope', which is not supported"),
        ("llama", {"attention__head_count": [4, 4, 4, 4, 2, 2]}, r"attention.head_count is \[4, 4, 4, 4, 2, 2\]"),
        ("llama", {"attention__head_count": "four"}, "attention.head_count is 'four'"),
        ("llama", {"attention__head_count": 0}, "num_attention_heads must be a positive int, got 0"),
        ("llama", {"attention__head_count_kv": 4}, r"k_proj.weight \(32, 32\) .* should make .* \(192, 32\)"),
        ("llama", {"block_count": 7}, "missing layers.6"),
        ("llama", {"block_count": 2**31}, "block_count is 2147483648, more than there are tensors"),
        ("gpt2", {"block_count": 2**31}, "block_count is 2147483648, more than there are tensors"),
        ("llama", {"embedding_length": 2**31, "feed_forward_length": 2**31}, "makes no model|should make"),
        ("llama", {"attention__head_count": 2**31}, "makes no model|should make"),
        ("llama", {"embedding_length": None}, "metadata for hidden_size must be a positive int, got None"),
        ("gpt2", {"feed_forward_length": 100}, r"should make .*mlp.up.weight \(100, 32\)"),
    ],
)
def test_what_we_do_not_honour_is_named(tmp_path, name, changes, message):
    path = write(tmp_path / "model.gguf", random_model(name), name, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(path)


def test_other_classes_and_missing_files(tmp_path):
    path = write(tmp_path / "model.gguf", random_model("llama"), "llama")
    with pytest.raises(ValueError, match="describes a 'llama', which GPT.from_pretrained reads"):
        Encoder.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="nothing.gguf"):
        GPT.from_pretrained(tmp_path / "nothing.gguf")


def test_a_large_vocabulary_is_passed_over_quickly(tmp_path):
    """150,000 tokens, as Qwen has them: a moment, where an array of each takes seconds."""
    w = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    w.add_token_list([f"token {i}" for i in range(150_000)])
    w.add_tensor("x", np.zeros(4, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    begin = time.process_time()
    assert GGUFFile(tmp_path / "model.gguf").read("x").tolist() == [0.0] * 4
    assert time.process_time() - begin < 1
