"""Values and gradients against float64: at most twice the error of torch's own op in the same dtype."""

from __future__ import annotations

import pytest
import torch

import gpt4fast
from gpt4fast.backends.dispatch import BATCH_NORM

from .comparison import DEVICE, assert_as_exact, decoding_step, error, heads, normal, rotary_tables

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TF32 = 2**-9  # relative error of products of numbers with 10 bits behind the first
CONVOLUTIONS = {1: gpt4fast.conv_transpose1d, 2: gpt4fast.conv_transpose2d, 3: gpt4fast.conv_transpose3d}

# Attention

# (batch, query heads, key heads, queries, keys), options
ATTENTIONS = {
    "full": ((2, 4, 4, 1000, 1531), {}),
    "causal": ((2, 4, 4, 1024, 1024), {"is_causal": True}),
    "grouped, aligned at the end": ((1, 8, 2, 777, 1900), {"is_causal": True, "query_offset": 1900 - 777}),
    "window": ((1, 8, 2, 1500, 1500), {"is_causal": True, "window": (200, -1)}),
}


def attend(tensors, options, impl):
    return gpt4fast.attention(*tensors, **options, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, dim, dtype, impl):
    shape, options = ATTENTIONS[name]
    tensors = heads(*shape, dim, dtype)
    exact = attend([t.double() for t in tensors], options, "reference")
    assert_as_exact(attend(tensors, options, impl), attend(tensors, options, "torch"), exact)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_on_hopper(name, dim, dtype, needs_cuda, monkeypatch):
    """By wgmma, which is not what runs otherwise: sums are in another order."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    shape, options = ATTENTIONS[name]
    tensors = heads(*shape, dim, dtype)
    otherwise = attend(tensors, options, "cuda")
    monkeypatch.setenv("GPT4FAST_WGMMA", "1")
    out = attend(tensors, options, "cuda")
    assert not torch.equal(out, otherwise)
    exact = attend([t.double() for t in tensors], options, "reference")
    assert_as_exact(out, attend(tensors, options, "torch"), exact)
    assert torch.equal(attend(tensors, options, "cuda"), out)


@pytest.mark.parametrize("name", ["causal", "window"])
def test_attention_in_tf32(name, impl):
    shape, options = ATTENTIONS[name]
    tensors = heads(*shape, 128, torch.float32)
    exact = attend([t.double() for t in tensors], options, "reference")
    torch.backends.cuda.matmul.allow_tf32 = True  # until the test ends: a fixture
    assert error(attend(tensors, options, impl), exact) <= TF32


def mask_like(tensors, learned: bool):
    """Of every head, and a learned one, which hides nothing, of all rows of the batch."""
    query, key, _ = tensors
    scores = query.shape[1], query.shape[2], key.shape[2]
    return normal(*scores) if learned else torch.rand(len(query), *scores, device=DEVICE) > 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("learned", [False, True], ids=["bool", "float"])
def test_masks(learned, dim, dtype, impl):
    tensors = heads(2, 4, 2, 500, 777, dim, dtype)
    mask = mask_like(tensors, learned)
    mask = mask.to(dtype) if learned else mask  # torch takes no other float
    exact = attend([t.double() for t in tensors], {"attn_mask": mask.double() if learned else mask}, "reference")
    options = {"attn_mask": mask}
    assert_as_exact(attend(tensors, options, impl), attend(tensors, options, "torch"), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "dim"), [("full", 64), ("grouped, aligned at the end", 128), ("window", 64), ("causal", 256)]
)
def test_gradients_of_attention(name, dim, dtype, impl):
    shape, options = ATTENTIONS[name]
    tensors = heads(*shape, dim, dtype)
    grad = normal(*tensors[0].shape, dtype=dtype)

    def gradients(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(attend(leaves, options, impl), leaves, grad.to(dtype))

    results = gradients(impl, dtype), gradients("torch", dtype), gradients("reference", torch.float64)
    for ours, theirs, exact in zip(*results, strict=True):
        # The sums over keys and queries pass through one more rounded product than those of the output.
        assert_as_exact(ours, theirs, exact, roundings=1 if dtype != torch.float32 else 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("learned", [False, True], ids=["bool", "float"])
def test_gradients_with_mask_and_dropout(learned, dim, dtype, impl):
    """Against the reference, which drops the same weights: torch drops others."""
    tensors = heads(2, 4, 2, 333, 500, dim, dtype)
    tensors.append(mask_like(tensors, learned))
    grad = normal(*tensors[0].shape, dtype=dtype)

    def gradients(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors[:3]]
        mask = tensors[3]
        if learned:
            mask = mask.to(torch.promote_types(mask.dtype, dtype)).requires_grad_()
        torch.manual_seed(11)
        out = attend(leaves, {"attn_mask": mask, "dropout_p": 0.2}, impl)
        return torch.autograd.grad(out, [*leaves, mask] if learned else leaves, grad.to(dtype))

    results = gradients(impl, dtype), gradients("reference", dtype), gradients("reference", torch.float64)
    for ours, theirs, exact in zip(*results, strict=True):
        roundings = 2 if dtype != torch.float32 else 32  # of dtype, in the gradient of a float32 mask too
        assert_as_exact(ours, theirs, exact, roundings * torch.finfo(dtype).eps / torch.finfo(ours.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_packed_sequences(dtype, impl):
    starts = torch.tensor([0, 300, 300, 900, 1000], device=DEVICE)
    tensors = [normal(1000, count, 64, dtype=dtype) for count in (8, 2, 2)]
    grad = normal(1000, 8, 64, dtype=dtype)

    def gradients(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = gpt4fast.attention_varlen(*leaves, starts, starts, 600, 600, is_causal=True, impl=impl)
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    results = gradients(impl, dtype), gradients("torch", dtype), gradients("reference", torch.float64)
    for ours, theirs, exact in zip(*results, strict=True):
        assert_as_exact(ours, theirs, exact, roundings=1 if dtype != torch.float32 else 16)


# Decoding

CAPACITY = 2048
CACHES = {
    "contiguous": {},
    "several new": {"new": 5},
    "paged": {"block": 16},
    "int8": {"int8": True},
    "int8, paged": {"int8": True, "block": 64},
    "float8": {"float8": True},
    "float8, paged": {"float8": True, "block": 16},
}


def decode(call, impl, dtype, **options):
    """Output, and the caches that were written to, in ``dtype`` where they were floating point."""
    rounded = torch.float32, torch.float16, torch.bfloat16
    call = {name: t.to(dtype) if t.dtype in rounded and "scales" not in name else t for name, t in call.items()}
    call = {name: t.clone() for name, t in call.items()}
    out = gpt4fast.attention_decode(**call, **options, impl=impl)
    return out, {name: t for name, t in call.items() if name.endswith(("cache", "scales"))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotates", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("name", CACHES)
def test_decoding(name, rotates, dtype, impl):
    call = decoding_step(dtype, capacity=CAPACITY, **CACHES[name])
    options = {"rotary": rotary_tables(CAPACITY, 128)} if rotates else {}
    (ours, caches), (theirs, expected), (exact, _) = (
        decode(call, impl, dtype, **options),
        decode(call, "torch", dtype, **options),
        decode(call, "reference", torch.float64, **options),
    )
    assert_as_exact(ours, theirs, exact)
    for kind, cache in caches.items():
        if cache.dtype == torch.int8:  # a rotation rounded otherwise may end in the next integer
            assert (cache.int() - expected[kind].int()).abs().max() <= 1
        elif cache.dtype == torch.float8_e4m3fn:
            torch.testing.assert_close(cache.float(), expected[kind].float(), rtol=1 / 8, atol=1 / 512)
        else:
            torch.testing.assert_close(cache, expected[kind], equal_nan=True)


# Transposed convolution

# (batch, channels, output channels / groups, sizes, kernel, stride, padding, groups)
LAYERS = {
    "DCGAN, first": (16, 100, 512, (1, 1), 4, 1, 0, 1),
    "DCGAN": (16, 512, 256, (8, 8), 4, 2, 1, 1),
    "DCGAN, image": (16, 64, 3, (32, 32), 4, 2, 1, 1),
    "HiFi-GAN": (4, 256, 128, (400,), 16, 8, 4, 1),
    "video": (2, 128, 64, (6, 8, 8), 4, 2, 1, 1),
    "depthwise": (8, 256, 1, (28, 28), 4, 2, 1, 256),
    "groups": (4, 128, 32, (20, 20), 3, 2, 1, 4),
}
ACTIVATIONS = {"DCGAN, image": "tanh", "HiFi-GAN": "leaky_relu", "groups": "gelu"}  # relu elsewhere
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
KINDS = [  # of one layer: its name, dtype and whether channels lie last, which one dimension has no layout for
    (name, dtype, channels_last)
    for name, (_, _, _, sizes, *_) in LAYERS.items()
    for dtype in DTYPES
    for channels_last in (False, True)[: len(sizes)]
]


def layer(name, dtype, channels_last):
    """Input, weight and bias, and the geometry."""
    batch, channels, outputs, sizes, kernel, stride, padding, groups = LAYERS[name]
    input = normal(batch, channels, *sizes, dtype=dtype)
    if channels_last:
        input = input.contiguous(memory_format=LAYOUTS[len(sizes)])
    weight = normal(channels, outputs, *(kernel,) * len(sizes)) / (channels // groups) ** 0.5
    bias = normal(outputs * groups, dtype=dtype)
    return [input, weight.to(dtype), bias], {"stride": stride, "padding": padding, "groups": groups}


def convolve(tensors, options, impl):
    return CONVOLUTIONS[tensors[0].dim() - 2](*tensors, **options, impl=impl)


@pytest.mark.parametrize(("name", "dtype", "channels_last"), KINDS)
@pytest.mark.parametrize("finishes", [False, True], ids=["bias", "all"])
def test_conv_transpose(name, dtype, channels_last, finishes, impl):
    tensors, options = layer(name, dtype, channels_last)
    if finishes:
        channels = len(tensors[2])
        options["scale"], options["shift"] = torch.rand(channels, device=DEVICE) + 0.5, normal(channels)
        options |= {"activation": ACTIVATIONS.get(name, "relu"), "negative_slope": 0.1}
    exact = convolve(
        [t.double() for t in tensors],
        options | {name: t.double() for name, t in options.items() if isinstance(t, torch.Tensor)},
        "reference",
    )
    ours, theirs = convolve(tensors, options, impl), convolve(tensors, options, "torch")
    assert_as_exact(ours, theirs, exact)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", ["DCGAN", "HiFi-GAN"])
def test_conv_transpose_in_tf32(name, impl):
    tensors, options = layer(name, torch.float32, channels_last=False)
    exact = convolve([t.double() for t in tensors], options, "reference")
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # until the test ends: a fixture
    assert error(convolve(tensors, options, impl), exact) <= TF32


def gradients_of(tensors, options, impl, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(convolve(leaves, options, impl), leaves, grad)


@pytest.mark.parametrize(("name", "dtype", "channels_last"), KINDS)
def test_gradients_of_conv_transpose(name, dtype, channels_last, impl):
    tensors, options = layer(name, dtype, channels_last)
    grad = torch.randn_like(convolve(tensors, options, "torch"))
    exact = gradients_of([t.double() for t in tensors], options, "reference", grad.double())
    results = [gradients_of(tensors, options, chosen, grad) for chosen in (impl, "torch")]
    for ours, theirs, expected in zip(*results, exact, strict=True):
        assert_as_exact(ours, theirs, expected)


def test_gradients_of_conv_transpose_in_tf32(impl):
    tensors, options = layer("DCGAN", torch.float32, channels_last=False)
    grad = torch.randn_like(convolve(tensors, options, "torch"))
    exact = gradients_of([t.double() for t in tensors], options, "reference", grad.double())
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # until the test ends: a fixture
    for ours, expected in zip(gradients_of(tensors, options, impl, grad), exact, strict=True):
        assert error(ours, expected) <= TF32


# Batch norm in training


@pytest.mark.parametrize(
    ("shape", "dtype", "channels_last"),
    [
        *((shape, dtype, False) for shape in ((64, 256, 16, 16), (16, 100, 6401)) for dtype in DTYPES),
        *(((64, 256, 16, 16), dtype, True) for dtype in DTYPES),
    ],
    ids=str,
)
def test_batch_norm(shape, dtype, channels_last, impl):
    """Norm and activation by the batch's statistics, and their gradients."""
    input = normal(*shape).mul(3).add(5).to(dtype)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    tensors = [input, normal(shape[1], dtype=dtype), normal(shape[1], dtype=dtype)]
    grad = torch.randn_like(input)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def plain(x, weight, bias):
        return torch.nn.functional.silu(torch.nn.functional.batch_norm(x, None, None, weight, bias, True))

    results = run(lambda *t: BATCH_NORM[impl](*t, 1e-5, "silu", 0.0)[0], dtype), run(plain, dtype)
    for ours, theirs, exact in zip(*results, run(plain, torch.float64), strict=True):
        assert_as_exact(ours, theirs, exact)
