"""affine_activation, y = activation(scale * (x + bias) + shift) per channel, against float64, on CPU and GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("needs_native")

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
X = torch.zeros(2, 3, 4)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Odd sizes, one element, planes shorter than a 16-byte vector, and sizes that several threads share.
SHAPES = [(2, 3), (5, 1), (1, 7), (3, 5, 1), (2, 3, 17), (2, 8, 5, 7), (3, 65, 33, 9), (1, 2, 3, 5, 7), (2, 4, 1, 1, 3)]
LARGE = (3, 37, 41, 29)  # 131,979 elements: several threads, whose parts end in the middle of a plane


def affine_activation(x, bias=None, scale=None, shift=None, activation="none", negative_slope=0.2):
    return torch.ops.gpt4fast.affine_activation(x, bias, scale, shift, activation, negative_slope)


def formula(x, bias, scale, shift, activation):
    """The definition in torch's own operators, in the dtype of its arguments."""
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    if bias is not None:
        x = x + bias.view(per_channel)
    if scale is not None:
        x = x * scale.view(per_channel)
    if shift is not None:
        x = x + shift.view(per_channel)
    return ACTIVATIONS[activation](x)


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check(x, bias, scale, shift, activation):
    actual = affine_activation(x, bias, scale, shift, activation)
    expected = formula(*double(x, bias, scale, shift), activation)
    assert actual.dtype == x.dtype and actual.device == x.device and actual.stride() == x.stride()
    # float32 arithmetic, then one rounding to the dtype: half a unit in the last place, and float32's own error where
    # the sum cancels or the activation saturates.
    info = torch.finfo(x.dtype)
    slack = 32 * torch.finfo(torch.float32).eps
    bound = (info.eps / 2 + slack) * expected.abs() + slack * (1 + x.double().abs()) + info.smallest_normal
    assert ((actual.double() - expected).abs() <= bound).all()
    in_dtype = [None if tensor is None else tensor.to(x.dtype) for tensor in (bias, scale, shift)]
    ours = (actual.double() - expected).abs().max()
    torchs = (formula(x, *in_dtype, activation).double() - expected).abs().max()
    assert ours <= 2 * torchs + slack


def layouts(shape):
    yield torch.contiguous_format
    if len(shape) == 4:
        yield torch.channels_last
    if len(shape) == 5:
        yield torch.channels_last_3d


def parameters(channels, device="cpu", dtype=torch.float32):
    return [torch.randn(channels, device=device).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(activation, dtype, device):
    for shape in [*SHAPES, LARGE]:
        for layout in layouts(shape):
            x = (3 * torch.randn(shape, device=device)).to(dtype).contiguous(memory_format=layout)
            check(x, *parameters(shape[1], device), activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
def test_every_subset_of_parameters_in_every_dtype(parameter_dtype, device):
    for dtype, given in itertools.product(DTYPES, itertools.product((True, False), repeat=3)):
        x = torch.randn(2, 5, 7, 3, device=device).to(dtype)
        chosen = [p if keep else None for p, keep in zip(parameters(5, device, parameter_dtype), given, strict=True)]
        check(x, *chosen, "silu")
        check(x.contiguous(memory_format=torch.channels_last), *chosen, "silu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_start_that_is_not_aligned_and_every_tail(dtype, device):
    for offset, length in itertools.product((0, 1, 3), range(1, 20)):
        storage = torch.randn(offset + 2 * 3 * length, device=device).to(dtype)
        x = storage[offset:].view(2, 3, length)
        check(x, *parameters(3, device), "leaky_relu")


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_in_one_spatial_dimension(device):
    check(torch.randn(2, 7, 3, device=device).mT, *parameters(3, device), "silu")


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_that_are_strided(device):
    x = torch.randn(2, 4, 6, device=device)
    strided = [torch.randn(4, 3, device=device)[:, 1] for _ in range(3)]
    check(x, *strided, "relu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0)])
def test_empty(shape, device):
    x = torch.randn(shape, device=device)
    assert affine_activation(x, *parameters(shape[1], device), "gelu").shape == shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_like_the_formula(activation, dtype, device):
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 80.0, -80.0]], device=device, dtype=dtype)
    x = x.repeat(2, 3).view(2, 3, 7)
    expected = ACTIVATIONS[activation](x.double()).to(dtype)  # torch's own gelu(inf) in float32 is NaN
    torch.testing.assert_close(affine_activation(x, activation=activation), expected, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bitwise_whatever_the_threads(device):
    x = torch.randn(LARGE, device=device)
    arguments = (*parameters(LARGE[1], device), "tanh")
    first = affine_activation(x, *arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(first, affine_activation(x, *arguments))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_parameter_on_another_device_is_named():
    with pytest.raises(RuntimeError, match="shift"):
        affine_activation(X.cuda(), shift=torch.zeros(3))


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    x = torch.zeros(1 << 24, device="cuda").view(1, 2, -1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(2.0)
        y = affine_activation(x, shift=torch.tensor([1.0, -5.0], device="cuda"), activation="relu")
    stream.synchronize()
    assert (y[0, 0] == 3).all() and (y[0, 1] == 0).all()


BAD = {
    "one dimension": ((torch.zeros(3),), {}, "input"),
    "no dimension": ((torch.zeros(()),), {}, "input"),
    "float64": ((X.double(),), {}, "input"),
    "int64": ((X.long(),), {}, "input"),
    "bool": ((X.bool(),), {}, "input"),
    "transposed": ((torch.zeros(2, 3, 4).transpose(0, 2),), {}, "input"),
    "a slice": ((torch.zeros(2, 6, 4)[:, ::2],), {}, "input"),
    "expanded": ((torch.zeros(1, 1, 1).expand(2, 3, 4),), {}, "input"),
    "bias of another length": ((X, torch.zeros(4)), {}, "bias"),
    "bias with two dimensions": ((X, torch.zeros(3, 1)), {}, "bias"),
    "scale in float64": ((X, None, torch.zeros(3).double()), {}, "scale"),
    "scale that is a number": ((X, None, torch.zeros(())), {}, "scale"),
    "shift in int32": ((X, None, None, torch.zeros(3).int()), {}, "shift"),
    "unknown activation": ((X,), {"activation": "relu6"}, "activation"),
    "empty activation": ((X,), {"activation": ""}, "activation"),
}


@pytest.mark.parametrize(("arguments", "options", "name"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_raise_and_are_named(arguments, options, name):
    with pytest.raises(RuntimeError, match=name):
        affine_activation(*arguments, **options)
