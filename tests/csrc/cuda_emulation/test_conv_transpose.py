"""The CUDA kernel of transposed convolution, emulated, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ..test_affine_activation import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONVOLUTIONS = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}

# (N, C, *sizes), (Cout / groups, *kernel), stride, padding, output padding, groups, dilation. Between them they have
# every tile with and without splits: see test_conv_transpose_plan.py.
SHAPES = {
    "doubling": ((2, 16, 5, 6), (40, 4, 4), 2, 1, 0, 1, 1),
    "vocoder": ((1, 24, 17), (12, 16), 8, 4, 0, 1, 1),
    "video": ((1, 8, 2, 3, 3), (9, 3, 4, 4), 2, 1, 0, 1, 1),
    "odd channels": ((1, 5, 4, 7), (3, 3, 2), (1, 3), (0, 1), (0, 1), 1, 1),
    "groups": ((2, 12, 6), (7, 3), 2, 1, 1, 3, 1),
    "dilated": ((1, 6, 9), (5, 4), 4, 2, 1, 1, 6),
    "dilated in step": ((1, 6, 9), (5, 3), 3, 1, 0, 1, 2),
    "stride over kernel": ((1, 8, 5), (4, 2), 3, 0, 1, 1, 1),
    "many taps": ((1, 3, 40), (2, 25), 1, 12, 0, 1, 1),
    "padding over kernel": ((1, 8, 9), (4, 2), 1, 4, 0, 1, 1),
    "one pixel": ((3, 24, 1, 1), (18, 4, 4), 1, 0, 0, 1, 1),
    "a line of one pixel": ((2, 12, 1, 5), (9, 3, 4), 2, 1, 1, 1, 2),
    "large tiles": ((2, 40, 8, 16), (66, 2, 2), 2, 0, 0, 1, 1),
    "medium tiles": ((1, 8, 101), (64, 2), 2, 0, 0, 1, 1),
    "small tiles": ((1, 40, 9), (5, 2), 1, 0, 0, 1, 1),
    "narrow tiles": ((1, 40, 6, 50), (3, 2, 1), 1, 0, 0, 1, 1),
    "splits of large tiles": ((1, 8, 8), (66, 16), 1, 0, 0, 1, 1),
    "splits of medium tiles": ((2, 8, 9), (3, 16), 1, 0, 0, 1, 1),
    "splits of small tiles": ((1, 136, 2, 3), (40, 3, 3), 1, 0, 0, 1, 1),
    "splits of narrow tiles": ((1, 72, 97), (16, 4), 1, 0, 0, 1, 1),
    "splits of a phase without taps": ((1, 72, 6), (7, 20), 2, 0, 0, 1, 2),
}


def lists(geometry, dims):
    """Stride, padding, output padding, groups and dilation, a number for each dimension."""
    return [x if i == 3 or isinstance(x, tuple) else (x,) * dims for i, x in enumerate(geometry)]


def convolve(cuda_ops, input, weight, bias, geometry, epilogue=(None, None, "none"), channels_last=False, tf32=False):
    return cuda_ops.conv_transpose_forward(
        input, weight, bias, *lists(geometry, input.dim() - 2), *epilogue, 0.2, channels_last, None, False, tf32
    )


def with_statistics(cuda_ops, input, weight, bias, geometry, eps, channels_last=False):
    return cuda_ops.conv_transpose_with_statistics(
        input, weight, bias, *lists(geometry, input.dim() - 2), channels_last, eps, False
    )


def gradients(cuda_ops, grad, input, weight, geometry, channels_last=False, needed=(True, True), tf32=False):
    return cuda_ops.conv_transpose_backward(
        grad, input, weight, *lists(geometry, input.dim() - 2), channels_last, *needed, False, tf32
    )


def operands(name, dtype):
    sizes, (outputs, *kernel), *geometry = SHAPES[name]
    channels = outputs * geometry[3]
    return (
        torch.randn(sizes).to(dtype),
        torch.randn(sizes[1], outputs, *kernel).to(dtype),
        torch.randn(channels),
        geometry,
    )


def check(output, input, weight, bias, geometry, unit=None):
    """Against float64: twice torch's error, or `unit` of the sum of all terms' magnitudes."""
    function = CONVOLUTIONS[input.dim()]
    expected = function(input.double(), weight.double(), bias.double(), *geometry)
    terms = function(input.double().abs(), weight.double().abs(), bias.double().abs(), *geometry)
    assert output.dtype == input.dtype and output.shape == expected.shape
    error = (output.double() - expected).abs()
    roundings = 8 if input.dtype == torch.float32 else 2  # float32 rounds each of some 64 sums, half types once
    assert (error <= (unit or roundings * torch.finfo(input.dtype).eps) * terms + 1e-30).all()
    if unit is None:
        torchs = (function(input, weight, bias.to(input.dtype), *geometry).double() - expected).norm()
        assert error.norm() <= 2 * torchs + torch.finfo(input.dtype).eps * terms.norm() / 4


def check_gradients(grads, grad, input, weight, geometry, unit=None):
    """As ``check``."""
    function = CONVOLUTIONS[input.dim()]

    def exact(dtype, *tensors):
        grad, *leaves = (t.to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_() for t in leaves]
        return torch.autograd.grad(function(leaves[0], leaves[1], None, *geometry), leaves, grad)

    given = grad, input, weight
    results = (
        exact(torch.float64, *given),
        exact(torch.float64, *(t.abs() for t in given)),
        exact(input.dtype, *given),
    )
    for ours, like, expected, terms, torchs in zip(grads, (input, weight), *results, strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        eps = torch.finfo(input.dtype).eps
        error = (ours.double() - expected).abs()
        assert (error <= (unit or (16 if input.dtype == torch.float32 else 2) * eps) * terms + 1e-30).all()
        if unit is None:
            assert error.norm() <= 2 * (torchs.double() - expected).norm() + eps * terms.norm() / 4


def check_unequal_phases(cuda_ops):
    """Statistics of an output of which one phase has a pixel less than the other, and with it a tile."""
    input, weight, bias = torch.randn(1, 8, 65), torch.randn(8, 40, 1), torch.randn(40)
    output, mean, _, variance = with_statistics(cuda_ops, input, weight, bias, (2, 0, 0, 1, 1), 0.0)
    exact = torch.var_mean(output.double(), (0, 2), correction=0)
    torch.testing.assert_close((variance.double(), mean.double()), exact, rtol=1e-4, atol=1e-5)


def test_statistics_of_unequal_phases(cuda_ops):
    check_unequal_phases(cuda_ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_float64(cuda_ops, name, dtype):
    input, weight, bias, geometry = operands(name, dtype)
    check(convolve(cuda_ops, input, weight, bias, geometry), input, weight, bias, geometry)
    if input.dim() > 3:
        layout = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        input = input.contiguous(memory_format=layout)
        for same in (weight, weight.contiguous(memory_format=layout)):  # brought into rows, or read as it is
            output = convolve(cuda_ops, input, same, bias, geometry, channels_last=True)
            assert output.is_contiguous(memory_format=layout)
            check(output, input, weight, bias, geometry)


@pytest.mark.parametrize("name", ["doubling", "odd channels", "groups", *(name for name in SHAPES if "tiles" in name)])
def test_tf32(cuda_ops, name):
    input, weight, bias, geometry = operands(name, torch.float32)
    check(convolve(cuda_ops, input, weight, bias, geometry, tf32=True), input, weight, bias, geometry, unit=2**-10)
    input, weight = input.half().float(), weight.half().float()  # of which TF32 loses nothing
    check(convolve(cuda_ops, input, weight, bias, geometry, tf32=True), input, weight, bias, geometry)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["doubling", "splits of small tiles"])
def test_epilogue(cuda_ops, name, activation, channels_last):
    input, weight, bias, geometry = operands(name, torch.float32)
    for given in itertools.product((True, False), repeat=2):
        scale, shift = (torch.randn(40).to(torch.bfloat16) if keep else None for keep in given)
        output = convolve(cuda_ops, input, weight, bias, geometry, (scale, shift, activation), channels_last)
        expected = F.conv_transpose2d(input.double(), weight.double(), bias.double(), *geometry)
        if scale is not None:
            expected = expected * scale.double().view(-1, 1, 1)
        if shift is not None:
            expected = expected + shift.double().view(-1, 1, 1)
        torch.testing.assert_close(output.double(), ACTIVATIONS[activation](expected), rtol=1e-4, atol=1e-4)
        again = convolve(cuda_ops, input, weight, bias, geometry, (scale, shift, activation), channels_last)
        assert torch.equal(again, output)


def test_any_strides_and_misaligned_starts(cuda_ops):
    input, weight, bias, geometry = operands("doubling", torch.float16)
    expected = convolve(cuda_ops, input, weight, bias, geometry)
    rows = input.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    storage = torch.empty(input.numel() + 1, dtype=input.dtype)
    misaligned = storage[1:].view(rows.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(input)
    stepped = torch.empty(2, 32, 10, 6, dtype=input.dtype)[:, ::2, ::2].copy_(input)
    for same in (rows, misaligned, stepped, input.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(convolve(cuda_ops, same, weight.mT.contiguous().mT, bias, geometry), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients(cuda_ops, name, dtype):
    input, weight, bias, geometry = operands(name, dtype)
    grad = torch.randn(CONVOLUTIONS[input.dim()](input, weight, bias.to(dtype), *geometry).shape).to(dtype)
    check_gradients(gradients(cuda_ops, grad, input, weight, geometry), grad, input, weight, geometry)
    if input.dim() > 3:
        layout = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        tensors = [t.contiguous(memory_format=layout) for t in (grad, input, weight)]
        grads = gradients(cuda_ops, *tensors, geometry, channels_last=True)
        assert grads[0].is_contiguous(memory_format=layout) and grads[1].is_contiguous()
        check_gradients(grads, grad, input, weight, geometry)


@pytest.mark.parametrize("name", ["doubling", "groups"])
def test_gradients_in_tf32(cuda_ops, name):
    input, weight, bias, geometry = operands(name, torch.float32)
    grad = torch.randn(CONVOLUTIONS[input.dim()](input, weight, bias, *geometry).shape)
    grads = gradients(cuda_ops, grad, input, weight, geometry, tf32=True)
    check_gradients(grads, grad, input, weight, geometry, unit=2**-10)
    grad, input, weight = (t.half().float() for t in (grad, input, weight))  # of which TF32 loses nothing
    check_gradients(gradients(cuda_ops, grad, input, weight, geometry, tf32=True), grad, input, weight, geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_of_the_weight_in_parts_and_tiles(cuda_ops, dtype):
    """Of more pixels than one block takes, and of more channels: bitwise the same each time, and alone."""
    for sizes, outputs, kernel in (((3, 9, 401), 11, 2), ((1, 70, 50), 66, 1)):
        input, weight = torch.randn(sizes).to(dtype), torch.randn(sizes[1], outputs, kernel).to(dtype)
        geometry = (2, 0, 1, 1, 1)
        grad = torch.randn(sizes[0], outputs, 2 * sizes[2] - 1 + kernel).to(dtype)
        first = gradients(cuda_ops, grad, input, weight, geometry)
        check_gradients(first, grad, input, weight, geometry)
        for needed in ((True, False), (False, True)):
            alone = gradients(cuda_ops, grad, input, weight, geometry, needed=needed)
            for is_needed, one, both in zip(needed, alone, first, strict=True):
                assert torch.equal(one, both) if is_needed else one.numel() == 0


def test_gradients_of_any_strides(cuda_ops):
    input, weight, bias, geometry = operands("doubling", torch.float16)
    grad = torch.randn(CONVOLUTIONS[4](input, weight, bias.half(), *geometry).shape).half()
    expected = gradients(cuda_ops, grad, input, weight, geometry)
    expanded = torch.randn(1, 1, 1, 1).half().expand_as(grad)
    for same in (grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), grad.mT.contiguous().mT):
        for other in (weight.mT.contiguous().mT, weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)):
            grads = gradients(cuda_ops, same, input.mT.contiguous().mT, other, geometry)
            assert all(torch.equal(*pair) for pair in zip(grads, expected, strict=True))
    grads = gradients(cuda_ops, expanded, input, weight, geometry)  # as a sum's gradient is
    check_gradients(grads, expanded, input, weight, geometry)


def test_sizes_of_zero_and_bad_arguments(cuda_ops):
    input, weight, bias, geometry = operands("groups", torch.float32)
    assert convolve(cuda_ops, input[:0], weight, bias, geometry).shape == (0, 21, 12)
    for change, name in (({1: weight.half()}, "weight"), ({2: bias[:5]}, "bias"), ({0: input.double()}, "input")):
        arguments = [change.get(i, value) for i, value in enumerate((input, weight, bias, geometry))]
        with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
            convolve(cuda_ops, *arguments)
    grad = torch.randn(2, 21, 12)
    empty, none = gradients(cuda_ops, grad[:0], input[:0], weight, geometry)
    assert empty.shape == (0, 12, 6) and none.shape == weight.shape and not none.any()
    for wrong in (grad.half(), grad[:, :20], grad[..., :11]):
        with pytest.raises(RuntimeError, match="grad_out"):
            gradients(cuda_ops, wrong, input, weight, geometry)
