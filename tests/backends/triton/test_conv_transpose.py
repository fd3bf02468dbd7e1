"""The Triton kernels of transposed convolution, by Triton's interpreter (or on a GPU, where it is off): values,
gradients, layouts and edges against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gpt4fast.backends.reference.conv_transpose import ACTIVATIONS, epilogue
from gpt4fast.backends.triton import availability, tuning
from gpt4fast.backends.triton import conv_transpose as triton_conv_transpose
from gpt4fast.backends.triton import conv_transpose_config as config
from gpt4fast.ops.conv_transpose import prepare

pytest.importorskip("triton")
if not availability.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if availability.INTERPRETED else "cuda"
TORCH = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# name: (batch, C, Cout / groups, sizes, kernel, stride, padding, output_padding, groups, dilation)
CASES = {
    "first layer": (2, 20, 17, (1, 1), (4, 3), (1, 1), (0, 0), (0, 0), 1, (1, 1)),
    "one row": (3, 5, 4, (1, 6), (3, 4), (2, 2), (1, 1), (1, 0), 1, (2, 1)),
    "doubling": (2, 5, 18, (5, 4), (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "kernel is stride": (1, 19, 3, (4, 5), (2, 2), (2, 2), (0, 0), (0, 0), 1, (1, 1)),
    "kernel below stride": (1, 2, 3, (4, 3), (2, 1), (3, 2), (0, 0), (1, 1), 1, (1, 1)),
    "output padding": (1, 4, 3, (5, 4), (3, 5), (2, 3), (1, 2), (1, 2), 1, (1, 1)),
    "dilation": (2, 4, 2, (6, 5), (3, 2), (2, 1), (2, 0), (1, 0), 1, (3, 2)),
    "dilation shares a factor": (1, 3, 2, (5, 4), (3, 3), (4, 2), (2, 1), (5, 0), 1, (6, 2)),
    "groups": (2, 4, 3, (4, 4), (4, 3), (2, 2), (1, 1), (0, 1), 2, (1, 1)),
    "depthwise": (1, 3, 1, (5, 5), (4, 4), (2, 2), (1, 1), (0, 0), 3, (1, 1)),
    "one channel": (2, 1, 1, (5, 3), (3, 3), (2, 1), (1, 1), (0, 0), 1, (1, 2)),
    "padding past the kernel": (1, 2, 2, (9, 9), (1, 2), (1, 1), (3, 2), (0, 0), 1, (1, 1)),
    "1-D": (2, 6, 5, (11,), (8,), (4,), (2,), (0,), 1, (1,)),
    "1-D vocoder": (1, 3, 2, (7,), (16,), (8,), (4,), (0,), 1, (1,)),
    "1-D grouped": (3, 4, 3, (12,), (9,), (4,), (3,), (1,), 2, (1,)),
    "3-D": (1, 4, 3, (3, 2, 4), (3, 4, 2), (2, 1, 2), (1, 1, 0), (1, 0, 0), 1, (1, 1, 1)),
    "3-D grouped": (2, 4, 2, (2, 3, 2), (2, 2, 3), (2, 2, 1), (0, 0, 1), (0, 1, 0), 2, (1, 2, 1)),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def operands(case, dtype, requires_grad=False):
    batch, channels, out_per_group, sizes, kernel, *geometry = CASES[case] if isinstance(case, str) else case
    tensors = [
        torch.randn(batch, channels, *sizes),
        torch.randn(channels, out_per_group, *kernel),
        torch.randn(out_per_group * geometry[3]),
    ]
    return [t.to(DEVICE, dtype).requires_grad_(requires_grad) for t in tensors], geometry


def ours(input, weight, bias, geometry, scale=None, shift=None, activation=None, slope=0.01):
    call = prepare(input.dim() - 2, input, weight, bias, *geometry, scale, shift, activation, slope)
    assert triton_conv_transpose.refusal(call) is None
    return triton_conv_transpose.conv_transpose(**call)


def theirs(input, weight, bias, geometry):
    return TORCH[input.dim() - 2](input, weight, bias, *geometry)


def assert_as_exact(got, torchs, exact):
    """At most twice torch's error in the same dtype, plus one rounding: the interpreter cuts bfloat16 off."""
    assert got.dtype == torchs.dtype and got.shape == exact.shape
    largest = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * (torchs.double() - exact).abs().max().item() + torch.finfo(got.dtype).eps * largest
    assert (got.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, channels_last):
    leaves, geometry = operands(case, dtype)
    if channels_last:
        if leaves[0].dim() == 3:
            pytest.skip("one dimension has no such layout")
        leaves[0] = leaves[0].contiguous(memory_format=LAST[leaves[0].dim()])
    leaves = [t.requires_grad_() for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    outputs = [f(*tensors, geometry) for f, tensors in ((ours, leaves), (theirs, leaves), (theirs, wide))]
    grad = torch.randn(outputs[0].shape, device=DEVICE).to(dtype)
    gradients = [
        torch.autograd.grad(output, tensors, grad.to(output.dtype))
        for output, tensors in zip(outputs, (leaves, leaves, wide), strict=True)
    ]
    assert_as_exact(*outputs)
    for i in range(2):
        assert_as_exact(*(g[i] for g in gradients))
    torch.testing.assert_close(gradients[0][2], gradients[1][2])  # of the bias: torch's sum both


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("given", ["bias", "scale", "shift", "all", "none"])
def test_epilogue(activation, given):
    """Fused where no gradient is wanted; scale and shift may be float32 where the input is not."""
    for dtype in (torch.float32, torch.float16):
        (input, weight, bias), geometry = operands((1, 3, 5, (3, 4), (3, 3), (2, 2), (1, 1), (1, 1), 1, (1, 1)), dtype)
        scale, shift = torch.rand(5, device=DEVICE) + 0.5, torch.randn(5, device=DEVICE)
        bias, scale, shift = (
            t if given in ("all", name) else None for name, t in (("bias", bias), ("scale", scale), ("shift", shift))
        )
        got = ours(input, weight, bias, geometry, scale, shift, activation, 0.2)
        exact = theirs(input.double(), weight.double(), None if bias is None else bias.double(), geometry)
        exact = epilogue(exact, scale, shift, activation, 0.2)
        tolerance = 8 * torch.finfo(dtype).eps
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "silu"])
def test_activations_far_and_near(activation):
    """Relative to the value itself, from 1e-6 to where the functions are flat, and at infinity."""
    x = torch.cat([torch.logspace(-6, 1.3, 200), torch.tensor([float("inf")])])
    x = torch.cat([-x, torch.zeros(1), x]).to(DEVICE)
    one = torch.ones(1, 1, 1, device=DEVICE)
    got = ours(x.view(1, 1, -1), one, None, ((1,), (0,), (0,), 1, (1,)), activation=activation).view(-1)
    exact = ACTIVATIONS[activation](x.double(), 0.0)
    # Torch's own float32 gelu cancels likewise where it goes to zero.
    atol = 1e-6 if activation == "gelu" else 1e-12
    torch.testing.assert_close(got.double(), exact, rtol=4e-6, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_epilogue(dtype):
    """First and second gradients of all five tensors."""
    inputs, geometry = operands("doubling", dtype, requires_grad=True)
    outputs = inputs[2].shape[0]
    scale, shift = torch.rand(outputs, device=DEVICE) + 0.5, torch.randn(outputs, device=DEVICE)
    inputs += [t.to(dtype).requires_grad_() for t in (scale, shift)]
    wide = [t.detach().double().requires_grad_() for t in inputs]

    def derivatives(compute, inputs):
        input, weight, bias, scale, shift = inputs
        output = compute(input, weight, bias, scale, shift)
        grad = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=output.dtype).view(output.shape)
        plain = torch.autograd.grad(output, inputs, grad, retain_graph=True)  # by the kernels
        graph = torch.autograd.grad(output, inputs, grad, create_graph=True)  # by torch
        second = torch.autograd.grad(sum(g.square().sum() for g in graph[:2]), inputs[:2])
        return [*plain, *graph, *second]

    mine = derivatives(lambda i, w, b, *rest: ours(i, w, b, geometry, *rest, "silu"), inputs)
    torchs = derivatives(lambda i, w, b, *rest: epilogue(theirs(i, w, b, geometry), *rest, "silu", 0.0), inputs)
    exact = derivatives(lambda i, w, b, *rest: epilogue(theirs(i, w, b, geometry), *rest, "silu", 0.0), wide)
    for got, same, truth in zip(mine, torchs, exact, strict=True):
        error, allowed = (got.double() - truth).norm(), 2 * (same.double() - truth).norm()
        assert error <= allowed + torch.finfo(dtype).eps * truth.norm()


def test_weight_gradient_in_parts():
    """Long sums over pixels are cut into parts, added up in one order: bitwise the same each time."""
    leaves, geometry = operands((3, 2, 3, (90,), (2,), (2,), (0,), (0,), 1, (1,)), torch.float32, True)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    tile = config.weight_gradient_tile(2, 3, 270, 4, False, (9, 0))
    assert config.pixels_per_program(270, tile["BLOCK_K"], 2, 4) < 270
    exact = torch.autograd.grad(theirs(*wide, geometry).square().sum(), wide)
    first, second = (torch.autograd.grad(ours(*leaves, geometry).square().sum(), leaves) for _ in range(2))
    for one, two, truth in zip(first, second, exact, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-4)


def test_weight_gradient_by_whatever_tile_the_tuner_takes(monkeypatch):
    case = 2, 5, 35, (5, 4), (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)
    leaves, geometry = operands(case, torch.float32, True)
    grad = torch.randn_like(theirs(*leaves, geometry))
    expected = torch.autograd.grad(theirs(*leaves, geometry), leaves[1], grad)
    tried = []

    def fastest(name, shapes, tile, launch, tensor):
        if name == "weight_gradient":
            tried.extend(tuning.variants(tile))
        return min(tuning.variants(tile), key=lambda variant: variant["BLOCK_N"])

    output = ours(*leaves, geometry)
    monkeypatch.setattr(tuning, "fastest", fastest)
    torch.testing.assert_close(torch.autograd.grad(output, leaves[1], grad), expected, rtol=1e-4, atol=1e-4)
    assert {tile["BLOCK_N"] for tile in tried} == {32, 64}


def test_long_sums():
    """Thousands of products an output: float32 errs at most twice as much as torch."""
    (input, weight, _), geometry = operands((1, 300, 20, (4, 4), (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)), DTYPES[0])
    exact = theirs(input.double(), weight.double(), None, geometry)
    errors = [(f(input, weight, None, geometry).double() - exact).norm() for f in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("last", ["neither", "input", "weight", "both"])
@pytest.mark.parametrize("case", ["doubling", "3-D grouped"])
def test_layout_follows_torch(case, last):
    # In 3-D, torch's slow kernel for small inputs ignores the rule; a batch of two goes to its fast one.
    leaves, geometry = operands(case, torch.float32)
    for i, name in enumerate(("input", "weight")):
        if last in (name, "both"):
            leaves[i] = leaves[i].contiguous(memory_format=LAST[leaves[i].dim()])
    leaves = [t.requires_grad_() for t in leaves]
    got, expected = ours(*leaves, geometry), theirs(*leaves, geometry)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_strides():
    """Transposed, sliced, expanded and misaligned storage; an expanded gradient."""
    (input, weight, bias), geometry = operands("kernel below stride", torch.float32)
    misaligned = torch.randn(input.numel() + 1, device=DEVICE)[1:].view(input.shape)
    wide_weight = torch.randn(3, 2, 2, 1, device=DEVICE).transpose(0, 1)
    for odd in (misaligned, input.transpose(2, 3), input[:, :, ::2, 1:], input.expand(3, 2, 4, 3)):
        for w in (weight, wide_weight):
            leaves = [t.detach().requires_grad_() for t in (odd, w, bias)]
            got, expected = ours(*leaves, geometry), theirs(*leaves, geometry)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            for one, other in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (got, expected)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_empty_batch():
    (input, weight, bias), geometry = operands("doubling", torch.float32, requires_grad=True)
    got, expected = ours(input[:0], weight, bias, geometry), theirs(input[:0], weight, bias, geometry)
    assert got.shape == expected.shape
    grads = torch.autograd.grad(got.sum(), (input, weight, bias))
    assert all(g.eq(0).all() for g in grads)


def test_nan_stays_where_it_belongs():
    """A NaN reaches the outputs that its patch covers, and no other; nor the gradient of a tap that misses them."""
    input = torch.zeros(1, 1, 6, device=DEVICE)
    input[0, 0, 0] = float("nan")
    for channels in (1, 2):  # depthwise, and by products of matrices
        many = input.expand(1, channels, 6)
        weight = torch.ones(channels, 1, 3, device=DEVICE, requires_grad=True)
        geometry = (2,), (1,), (0,), 1, (1,)
        got, expected = ours(many, weight, None, geometry), theirs(many, weight, None, geometry)
        assert torch.equal(got.isnan(), expected.isnan())
        # The first tap of the first input lies before the output.
        (grad,) = torch.autograd.grad(got, weight, torch.ones_like(got))
        assert torch.equal(grad.isnan()[0, 0], torch.tensor([False, True, True], device=DEVICE))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compile_fullgraph(activation):
    leaves, geometry = operands("1-D", torch.float32, requires_grad=True)
    torch._dynamo.reset()
    call = prepare(1, *leaves, *geometry, leaves[2], None, activation, 0.0)

    def run(input, weight, bias):
        return triton_conv_transpose.conv_transpose(**(call | {"input": input, "weight": weight, "bias": bias}))

    results = []
    for compute in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        with torch.no_grad():
            finished = compute(*leaves)
        output = compute(*leaves)
        results.append([finished, output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])


def test_opcheck():
    """Schemas and shape rules."""
    (input, weight, bias), geometry = operands("output padding", torch.float32)
    (stride, padding, output_padding, groups, dilation) = geometry
    host = triton_conv_transpose
    utils = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    rest = list(stride), list(padding), list(output_padding), groups, list(dilation), bias, None, "relu", 0.0
    torch.library.opcheck(host._forward, (input, weight, bias, *rest), test_utils=utils)
    grad = torch.randn_like(theirs(input, weight, bias, geometry))
    rest = list(stride), list(padding), groups, list(dilation)
    torch.library.opcheck(host._input_gradient, (grad, input, weight, *rest), test_utils=utils)
    torch.library.opcheck(host._weight_gradient, (grad, input, weight, *rest), test_utils=utils)


def test_refusals(monkeypatch):
    def refusal(input, weight, *geometry):
        dims = input.dim() - 2
        return triton_conv_transpose.refusal(
            prepare(dims, input, weight, None, *(geometry or (1, 0, 0, 1, 1)), None, None, None, 0.0)
        )

    input, weight = torch.ones(1, 2, 3, device=DEVICE), torch.ones(2, 2, 3, device=DEVICE)
    assert refusal(input, weight) is None
    assert "float64" in refusal(input.double(), weight.double())
    assert "meta" in refusal(input.to("meta"), weight.to("meta"))
    assert "32 bits" in refusal(input.expand(2**29, 2, 3), weight)
    assert "32 bits" in refusal(input, weight, 2**28, 0, 0, 1, 1)
    many = torch.ones(1, 2**16, 1, device=DEVICE)
    assert "groups" in refusal(many, torch.ones(2**16, 2, 1, device=DEVICE), 1, 0, 0, 2**16, 1)
    assert "groups" in refusal(many, torch.ones(2**16, 1, 1, device=DEVICE), 1, 0, 0, 2**16, 1)  # depthwise
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in refusal(input, weight)
    monkeypatch.setattr(availability, "INTERPRETED", False)
    assert refusal(input, weight) is None if DEVICE == "cuda" else "CUDA" in refusal(input, weight)
    monkeypatch.setattr(availability, "INSTALLED", False)
    assert "not installed" in refusal(input, weight)


def test_config():
    """Tiles are powers of two that tl.dot takes, and parts of pixels cover all of them."""
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        shared = (227 if capability[0] in (9, 10) else 163 if capability == (8, 0) else 99) * 1024
        for itemsize, tensor_cores in ((2, True), (4, True), (4, False)):
            for size in (1, 3, 16, 65, 5000):
                for tile in (
                    config.convolution_tile(size, size, size, 4, itemsize, tensor_cores, capability, 132),
                    config.weight_gradient_tile(size, size, size, itemsize, tensor_cores, capability),
                ):
                    blocks = [tile[f"BLOCK_{axis}"] for axis in "MNK"]
                    assert all(b >= 16 and b & (b - 1) == 0 for b in blocks)
                    assert (blocks[0] + blocks[1]) * blocks[2] * itemsize * tile["num_stages"] <= shared
                    assert tile["num_stages"] >= 2
    for pixels in (1, 100, 12345):
        for tiles in (1, 16, 4096):
            each = config.pixels_per_program(pixels, 64, tiles, 132)
            assert each % 64 == 0 and each * config.ceil_div(pixels, each) >= pixels
