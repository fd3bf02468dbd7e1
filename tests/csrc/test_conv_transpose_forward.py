"""The native transposed convolution kernel, called directly, against torch in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TORCHS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}


def convolve(input, weight, **options) -> Tensor:
    """The op with defaults for what a test does not care about; a number stands for every spatial dimension."""
    defaults = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "output_padding": 0,
        "groups": 1,
        "dilation": 1,
        "scale": None,
        "shift": None,
        "activation": "none",
        "negative_slope": 0.2,
        "channels_last": False,
        "packed": None,
        "winograd": False,
    }
    assert options.keys() <= defaults.keys()
    options = defaults | options
    for name in ("stride", "padding", "output_padding", "dilation"):
        if isinstance(options[name], int):
            options[name] = [options[name]] * (input.dim() - 2)
    return torch.ops.gpt4fast.conv_transpose_forward(input, weight, *options.values())


def definition(input, weight, dtype=torch.float64, **options) -> Tensor:
    """activation(scale * (conv_transpose + bias) + shift) by torch, computed in dtype."""
    tensors = {name: options.get(name) for name in ("bias", "scale", "shift")}
    tensors = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
    shape = {
        name: options[name] for name in ("stride", "padding", "output_padding", "groups", "dilation") if name in options
    }
    out = TORCHS[input.dim() - 2](input.to(dtype), weight.to(dtype), tensors["bias"], **shape)
    per_channel = (-1, *[1] * (input.dim() - 2))
    if tensors["scale"] is not None:
        out = out * tensors["scale"].view(per_channel)
    if tensors["shift"] is not None:
        out = out + tensors["shift"].view(per_channel)
    return ACTIVATIONS[options.get("activation", "none")](out)


def assert_close(input, weight, times=2, **options):
    """At most twice as far from float64 as torch in the same dtype, or within its rounding where torch is exact."""
    out = convolve(input, weight, **options)
    channels_last = options.pop("channels_last", False)
    packed = torch.ops.gpt4fast.conv_transpose_pack(weight, options.get("groups", 1), options.get("winograd", False))
    assert torch.equal(out, convolve(input, weight, **options, channels_last=channels_last, packed=packed))
    expected = definition(input, weight, **options)
    plain = definition(input, weight, input.dtype, **options)
    assert out.dtype == input.dtype and out.shape == expected.shape
    assert out.is_contiguous(memory_format=CHANNELS_LAST[input.dim() - 2] if channels_last else torch.contiguous_format)
    error = (out.double() - expected).norm().item()
    allowed = times * (plain.double() - expected).norm().item() + torch.finfo(input.dtype).eps * expected.norm().item()
    if (
        input.dtype == torch.float32
    ):  # torch's errors in few sums may happen to be next to nothing: by the size of terms
        geometry = {name: x for name, x in options.items() if name not in ("bias", "scale", "shift", "activation")}
        terms = definition(input.abs(), weight.abs(), **geometry)
        if terms.count_nonzero() < 256:
            scale = 1 if options.get("scale") is None else options["scale"].abs().max().item()
            allowed += scale * torch.finfo(torch.float32).eps * terms.norm().item()
    assert error <= allowed, f"{error} from float64, allowed {allowed}"


def make_inputs(batch, groups, inputs, outputs, size, kernel, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Channels are those of one group."""
    return torch.randn(batch, groups * inputs, *size).to(dtype), torch.randn(groups * inputs, outputs, *kernel).to(
        dtype
    )


# batch, groups, channels of a group in and out, size, kernel, options. Each way of computing, each with its tails.
CASES = {
    "dcgan, first layer": (2, 1, 100, 37, (1, 1), (4, 4), {}),
    "dcgan, middle layer": (2, 1, 24, 20, (8, 8), (4, 4), {"stride": 2, "padding": 1}),
    "dcgan, last layer": (3, 1, 21, 3, (16, 16), (4, 4), {"stride": 2, "padding": 1}),
    "one pixel, most taps outside": (1, 1, 33, 17, (1, 1), (4, 4), {"stride": 2, "padding": 1}),
    "one pixel, many images": (40, 1, 10, 5, (1, 1), (4, 4), {"stride": 2, "padding": 1}),
    "one pixel, groups": (3, 3, 5, 4, (1, 1), (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "few pixels": (2, 1, 9, 11, (2, 3), (4, 4), {"stride": 2, "padding": 1}),
    "kernel = stride": (2, 1, 6, 9, (5, 7), (2, 2), {"stride": 2}),
    "kernel < stride": (2, 1, 6, 9, (5, 7), (2, 1), {"stride": (3, 4), "output_padding": (2, 1)}),
    "1x1 kernel": (2, 1, 5, 8, (6, 6), (1, 1), {}),
    "depthwise": (2, 13, 1, 1, (9, 9), (4, 4), {"stride": 2, "padding": 1}),
    "depthwise, many channels": (1, 83, 1, 1, (20, 37), (4, 4), {"stride": 2, "padding": 1}),
    "depthwise, gaps": (2, 20, 1, 1, (5, 7), (2, 3), {"stride": (4, 5), "dilation": (1, 2), "output_padding": 3}),
    "depthwise, wide dilation": (
        1,
        17,
        1,
        1,
        (6, 30),
        (3, 5),
        {"stride": (1, 2), "dilation": (2, 9), "padding": (1, 7)},
    ),
    "depthwise, long line": (1, 18, 1, 1, (1500,), (25,), {"stride": 4, "padding": 11, "output_padding": 1}),
    "depthwise, one pixel": (40, 16, 1, 1, (1, 1), (4, 4), {"stride": 2, "padding": 1}),
    "depthwise, many taps": (1, 16, 1, 1, (9, 9), (12, 12), {"stride": 3, "padding": 4}),
    "depthwise, two outputs": (2, 5, 1, 2, (9, 9), (3, 3), {"stride": 2, "padding": 1}),
    "depthwise, very wide dilation": (1, 64, 1, 1, (130, 130), (3, 3), {"dilation": 64, "padding": 120}),
    "groups": (2, 3, 4, 6, (5, 9), (3, 2), {"stride": (1, 2)}),
    "dilation": (2, 1, 5, 6, (7, 8), (3, 3), {"stride": 2, "dilation": (3, 2), "output_padding": (2, 1), "padding": 2}),
    "dilation = stride": (2, 1, 5, 6, (7, 8), (3, 3), {"stride": 2, "dilation": 2}),
    "padding larger than the kernel": (2, 1, 5, 6, (11, 12), (3, 2), {"stride": 2, "padding": (5, 4)}),
    "wide dilation": (1, 2, 33, 20, (70, 60), (3, 2), {"dilation": (50, 40), "padding": (30, 3)}),
    "wide dilation, stride": (2, 1, 70, 5, (50, 60), (2, 3), {"stride": (1, 2), "dilation": (50, 60), "padding": 20}),
    "line": (2, 1, 7, 10, (130,), (5,), {"stride": 3, "padding": 2}),
    "wavegan": (1, 1, 16, 8, (60,), (25,), {"stride": 4, "padding": 11, "output_padding": 1}),
    "long line": (1, 1, 4, 4, (1500,), (8,), {"stride": 4, "padding": 2}),
    "stride longer than a task": (1, 1, 3, 4, (3,), (3,), {"stride": 5000}),
    "one output channel": (2, 1, 6, 1, (50,), (6,), {"stride": 2, "padding": 2}),
    "few output channels, long line": (1, 1, 70, 2, (400,), (4,), {"stride": 2, "padding": 1}),
    "few output channels, small images": (9, 1, 35, 4, (5, 4), (4, 4), {"stride": 2, "padding": 1}),
    "few output channels, even padding": (2, 1, 20, 3, (12, 33), (4, 4), {"stride": 2, "padding": 2}),
    "few output channels, no stride": (2, 1, 20, 3, (12, 33), (7, 7), {"padding": 3}),
    "few output channels, gaps": (2, 1, 9, 2, (5, 40), (2, 4), {"stride": (3, 7), "dilation": (1, 2)}),
    "few output channels, padding larger than the input": (2, 1, 9, 3, (4, 3), (9, 9), {"stride": 2, "padding": 6}),
    "few output channels, volume": (2, 1, 9, 3, (3, 4, 17), (4, 4, 4), {"stride": 2, "padding": 1}),
    "few output channels, wide dilation": (1, 1, 20, 3, (70, 60), (3, 3), {"dilation": 150, "padding": 100}),
    "few output channels, dilation without end": (1, 1, 6, 3, (3, 4), (3, 3), {"dilation": 2**29, "padding": 2**29}),
    "two output channels of a group": (2, 2, 3, 2, (20,), (6,), {"stride": 2, "padding": 2}),
    "volume": (2, 1, 5, 9, (3, 4, 5), (4, 3, 4), {"stride": (2, 1, 2), "padding": 1}),
    "volume, one pixel": (2, 1, 5, 9, (1, 1, 1), (4, 4, 4), {"stride": 2, "padding": 1}),
    "volume, depthwise": (1, 9, 1, 1, (3, 4, 5), (3, 3, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0, 1)}),
    "one channel": (2, 1, 1, 1, (6, 7), (3, 3), {"stride": 2}),
    "winograd": (3, 1, 64, 70, (8, 8), (4, 4), {"stride": 2, "padding": 1, "winograd": True}),
    "winograd, odd sizes": (2, 1, 37, 20, (5, 7), (4, 4), {"stride": 2, "output_padding": 1, "winograd": True}),
    # Many images: of 2, one draw in 300 has a ratio of errors past the bound, of 40 none is past 0.8 of it.
    "winograd, one pixel": (40, 1, 40, 20, (1, 1), (4, 6), {"stride": (2, 3), "padding": (1, 2), "winograd": True}),
    "winograd, groups": (2, 3, 33, 18, (6, 5), (6, 4), {"stride": (3, 2), "padding": 1, "winograd": True}),
    "winograd, line": (2, 1, 130, 40, (700,), (16,), {"stride": 8, "padding": 4, "winograd": True}),
    "winograd, a line of lines": (
        1,
        1,
        64,
        24,
        (5, 60),
        (1, 8),
        {"stride": (1, 4), "padding": (1, 2), "winograd": True},
    ),
    "winograd, larger volume": (1, 1, 64, 32, (12, 12, 12), (4, 4, 4), {"stride": 2, "padding": 1, "winograd": True}),
    "winograd, volume": (1, 1, 96, 24, (3, 6, 5), (4, 4, 4), {"stride": 2, "padding": 1, "winograd": True}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, dtype, level):
    *sizes, options = CASES[name]
    input, weight = make_inputs(*sizes, dtype)
    groups = sizes[1]
    dims = input.dim() - 2
    bias = torch.randn(weight.shape[1] * groups).to(dtype)
    for channels_last in {False, dims > 1}:
        assert_close(input, weight, groups=groups, channels_last=channels_last, **options)
        assert_close(input, weight, groups=groups, channels_last=channels_last, bias=bias, **options)
    if dims > 1:
        assert_close(
            *(x.contiguous(memory_format=CHANNELS_LAST[dims]) for x in (input, weight)), groups=groups, **options
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, dtype):
    for name in ("groups", "one pixel, groups", "depthwise", "two output channels of a group"):
        batch, groups, inputs, outputs, size, kernel, options = CASES[name]
        input, weight = make_inputs(batch, groups, inputs, outputs, size, kernel, dtype)
        weight /= inputs**0.5
        for names in ((), ("bias",), ("scale",), ("bias", "scale", "shift")):
            tensors = {name: torch.randn(outputs * groups).to(dtype) for name in names}
            assert_close(input, weight, groups=groups, activation=activation, **options, **tensors)


def test_epilogue_tensors_of_any_dtype_and_stride():
    input, weight = make_inputs(2, 1, 5, 6, (4, 4), (3, 3), torch.bfloat16)
    bias, scale, shift = torch.randn(6), torch.randn(12).half()[::2], torch.randn(1).bfloat16().expand(6)
    out = convolve(input, weight, bias=bias, scale=scale, shift=shift)
    expected = definition(input, weight, bias=bias, scale=scale, shift=shift)
    assert (out - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Storage of any order, misaligned starts, steps and expanded channels: the bits of contiguous inputs."""

    def misaligned(x):
        storage = torch.empty(x.numel() + 1, dtype=dtype)
        return storage[1:].view(x.shape).copy_(x)

    def stepped(x):
        storage = torch.empty(*(2 * size for size in x.shape), dtype=dtype)
        return storage[1::2, ::2, 1::2, ::2].copy_(x)

    def reversed_order(x):
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    def batch_inside(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    for sizes in ((2, 2, 4, 6, (5, 6), (3, 4)), (2, 2, 4, 2, (9, 6), (3, 4)), (2, 16, 1, 1, (5, 6), (3, 4))):
        input, weight = make_inputs(*sizes, dtype)
        options = {"groups": sizes[1], "stride": 2, "padding": 1}
        expected = convolve(input, weight, **options)
        for layout in (misaligned, stepped, reversed_order, batch_inside):
            torch.testing.assert_close(convolve(layout(input), weight, **options), expected, rtol=0, atol=0)
            torch.testing.assert_close(convolve(input, layout(weight), **options), expected, rtol=0, atol=0)
        one = input[:, :1, :, :1]
        expanded = convolve(one.expand(input.shape), weight, **options)
        expected = convolve(one.expand(input.shape).contiguous(), weight, **options)
        torch.testing.assert_close(expanded, expected, rtol=0, atol=0)
    # Images of few pixels, where the weight is read as it lies in memory.
    input, weight = make_inputs(3, 1, 5, 7, (1, 2), (3, 4), dtype)
    expected = convolve(input, weight)
    torch.testing.assert_close(convolve(input, misaligned(weight)), expected, rtol=0, atol=0)
    for layout in (stepped, reversed_order):
        torch.testing.assert_close(convolve(layout(input), weight), expected, rtol=0, atol=0)
        torch.testing.assert_close(convolve(input, layout(weight)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        for sizes in (
            (4, 1, 64, 64, (8, 8), (4, 4)),
            (1, 1, 256, 128, (1, 1), (4, 4)),
            (1, 1, 64, 3, (32, 32), (4, 4)),
            (1, 64, 1, 1, (64, 64), (4, 4)),
            (3, 1, 64, 40, (33, 70), (4, 4), True),
        ):
            sizes, winograd = sizes[:6], len(sizes) > 6
            input, weight = make_inputs(*sizes, dtype)
            results = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                results.append(convolve(input, weight, stride=2, padding=1, groups=sizes[1], winograd=winograd))
            for result in results[1:]:
                assert torch.equal(result, results[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "size", "kernel", "options"),
    [
        (1, 4, 6, (9, 9), (3, 3), {"stride": 2}),
        (1, 5, 2, (9, 9), (3, 3), {"stride": 2}),
        (1, 6, 3, (5, 20), (4, 4), {"stride": 2, "padding": 1}),
        (2, 3, 1, (4, 5), (3, 5), {"stride": (1, 3), "dilation": (2, 1), "padding": 2}),
        (1, 5, 4, (40,), (7,), {"padding": 3}),
        (1, 3, 2, (3, 4, 5), (3, 2, 4), {"stride": 2, "padding": 1}),
        (10, 1, 1, (9, 9), (3, 3), {"stride": 2, "padding": 1}),
    ],
)
def test_infinities_and_nan_spread_no_further_than_their_taps(
    groups, inputs, outputs, size, kernel, options, dtype, level
):
    """Of a pixel, and of a weight: not even to outputs beside the image, where its tap has nothing to multiply."""
    tensors = make_inputs(2, groups, inputs, outputs, size, kernel, dtype)
    bad = [float("inf"), -float("inf"), float("nan")]
    for changed, place, value in itertools.product((0, 1), (0, 0.5, 1), bad):
        input, weight = (x.clone() for x in tensors)
        x = (input, weight)[changed].view(-1)
        x[int(place * (x.numel() - 1))] = value
        expected = definition(input, weight, groups=groups, **options)
        out = convolve(input, weight, groups=groups, **options)
        packed = torch.ops.gpt4fast.conv_transpose_pack(weight, groups, False)
        assert torch.equal(convolve(input, weight, groups=groups, **options, packed=packed).isnan(), out.isnan())
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert torch.equal(out[out.isinf()].double(), expected[out.isinf()])
        finite = out.isfinite()
        assert finite.any() and not finite.all()
        error = (out[finite].double() - expected[finite]).norm()
        assert error <= 2 * torch.finfo(dtype).eps * expected[finite].norm()


def test_taps_that_a_dilation_brings_together_are_summed_in_short_runs():
    """No further from float64 than torch, or than one rounding more: a single run errs twice as much."""
    input, weight = make_inputs(3, 2, 110, 1, (12, 12), (3, 2))
    for x in (input, input.contiguous(memory_format=torch.channels_last)):
        assert_close(x, weight, times=1, groups=2, stride=(3, 2), dilation=(3, 2))


def test_winograds_infinities_spread_no_further_either():
    """There the difference of two of them is NaN."""
    input, weight = make_inputs(1, 1, 32, 16, (9, 9), (4, 4))
    input[0, 1, 4, 4:6] = float("inf")
    out = convolve(input, weight, stride=2, winograd=True)
    assert torch.equal(out.isfinite(), definition(input, weight, stride=2).isfinite())


def test_winograd_is_refused_where_it_does_not_apply():
    for kernel, options in (
        ((3, 3), {"stride": 2}),
        ((4, 4), {"stride": 1}),
        ((4, 4), {"stride": 2, "dilation": 2}),
        ((1, 4), {"stride": 2}),
        ((1, 1), {}),
        ((2, 2), {}),
        ((2, 4), {"stride": (1, 2)}),
        ((2, 34), {"stride": (1, 17)}),
    ):
        input, weight = make_inputs(1, 1, 4, 4, (3, 3), kernel)
        with pytest.raises(RuntimeError, match="expected winograd to be False"):
            convolve(input, weight, **options, winograd=True)
    for kernel in ((3, 3), (1, 1), (2, 2), (2, 34)):
        with pytest.raises(RuntimeError, match="expected winograd to be False"):
            torch.ops.gpt4fast.conv_transpose_pack(torch.randn(4, 4, *kernel), 1, True)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_empty_batch(dims):
    input, weight = make_inputs(0, 1, 3, 4, (5,) * dims, (4,) * dims)
    assert convolve(input, weight, stride=2).shape == (0, 4, *[12] * dims)


def test_no_channels():
    bias = torch.tensor([1.0, -2.0])
    for size in ((5, 5), (1, 1)):
        out = convolve(torch.zeros(2, 0, *size), torch.zeros(0, 2, 3, 3), bias=bias, activation="relu")
        assert out.shape == (2, 2, size[0] + 2, size[1] + 2)
        assert out[:, 0].eq(1).all() and out[:, 1].eq(0).all()
    assert convolve(torch.zeros(2, 3, 5, 5), torch.zeros(3, 0, 3, 3)).shape == (2, 0, 7, 7)


def bad_calls() -> dict[str, list[tuple[Tensor, Tensor, dict]]]:
    x, w = torch.zeros(2, 4, 5, 5), torch.zeros(4, 6, 3, 3)
    one = torch.zeros(1)
    return {
        "input": [
            (x[0, 0], w[0, 0], {}), (x[None, None], w[None, None], {}), (x.double(), w.double(), {}),
            (x.long(), w.long(), {}), (one.expand(2**24, 4, 2**12, 2**12), w, {}), (x[..., :0], w, {}),
            (torch.zeros(1, 0, 2**29, 2**29), torch.zeros(0, 1, 3, 3), {}),
        ],
        "weight": [
            (x, w[0], {}), (x, w[:3], {}), (x, w.half(), {}), (x, w[..., :0], {}), (x, one.expand(4, 2**40, 3, 3), {}),
            (torch.zeros(1, 0, 1, 1), torch.zeros(0, 1, 2**29, 2**29), {}),
        ],
        "bias": [
            (x, w, {"bias": torch.zeros(5)}), (x, w, {"bias": torch.zeros(6, 1)}),
            (x, w, {"bias": torch.zeros(6).double()}), (x, w, {"bias": torch.zeros(6, dtype=torch.int64)}),
        ],
        "scale": [(x, w, {"scale": torch.zeros(1)})],
        "shift": [(x, w, {"shift": torch.zeros(7)})],
        "stride": [
            (x, w, {"stride": 0}), (x, w, {"stride": -1}), (x, w, {"stride": [2]}), (x, w, {"stride": [2, 2, 2]}),
            (x, w, {"stride": 2**62}),
        ],
        "padding": [
            (x, w, {"padding": -1}), (x, w, {"padding": 4}), (x, w, {"padding": [1]}), (x, w, {"padding": 2**63 - 1}),
        ],
        "output_padding": [
            (x, w, {"output_padding": -1}), (x, w, {"output_padding": []}), (x, w, {"output_padding": 2**62}),
        ],
        "dilation": [(x, w, {"dilation": 0}), (x, w, {"dilation": [1]}), (x, w, {"dilation": 2**62})],
        "groups": [
            (x, w, {"groups": 0}), (x, w, {"groups": -1}), (x, w, {"groups": 3}), (x, w, {"groups": 2**62}),
        ],
        "activation": [(x, w, {"activation": "swish"}), (x, w, {"activation": ""})],
        "channels_last": [(x[..., 0], w[..., 0], {"channels_last": True})],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, calls in bad_calls().items() for i in range(len(calls))])
def test_bad_direct_calls_raise(name, index):
    input, weight, options = bad_calls()[name][index]
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        convolve(input, weight, **options)


def test_outputs_too_large_to_allocate_raise():
    for options in ({"stride": 2**30}, {"dilation": 2**30}, {"output_padding": 2**30}):
        with pytest.raises(RuntimeError):
            convolve(torch.zeros(1, 4, 5, 5), torch.zeros(4, 6, 3, 3), **options)
        with pytest.raises(RuntimeError):
            convolve(torch.zeros(1, 4, 5, 5, 5), torch.zeros(4, 6, 3, 3, 3), **options)


@given(data=st.data())
def test_random_calls(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), "seed"))
    dims = draw(st.integers(1, 3), "dims")

    def list_of(name, least, most):
        return draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims), name)

    size = list_of("size", 1, {1: 150, 2: 12, 3: 5}[dims])
    kernel, stride, dilation, padding = (
        list_of(name, *limits)
        for name, limits in {
            "kernel": (1, (17, 6, 4)[dims - 1]),
            "stride": (1, (9, 6, 4)[dims - 1]),
            "dilation": (1, 3),
            "padding": (0, 5),
        }.items()
    )
    extra = [draw(st.integers(0, max(s, d) - 1), "output_padding") for s, d in zip(stride, dilation, strict=True)]
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(out) >= 1)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]), "groups")
    channels = st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 140))
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    input, weight = make_inputs(
        draw(st.integers(0, 3), "batch"),
        groups,
        draw(channels, "inputs"),
        draw(channels, "outputs"),
        size,
        kernel,
        dtype,
    )
    if dims > 1 and draw(st.booleans(), "input channels last"):
        input = input.contiguous(memory_format=CHANNELS_LAST[dims])
    outputs = groups * weight.shape[1]
    tensors = {name: torch.randn(outputs).to(dtype) for name in ("bias", "scale", "shift") if draw(st.booleans(), name)}
    assert_close(
        input,
        weight,
        stride=stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        dilation=dilation,
        channels_last=dims > 1 and draw(st.booleans(), "channels_last"),
        **tensors,
    )


def draw_winograd_geometry(draw, longest: int) -> tuple[list[int], ...]:
    """Size, kernel, stride, padding and output_padding of images of up to so many pixels along one dimension."""
    dims = draw(st.integers(1, 3), "dims")

    def list_of(name, least, most):
        return draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims), name)

    stride = list_of("stride", 2, (9, 4, 2)[dims - 1])
    kernel = [2 * s for s in stride]
    if dims > 1 and draw(st.booleans(), "absent"):
        stride[0] = kernel[0] = 1
    size, padding = list_of("size", 1, (longest, 20, 6)[dims - 1]), list_of("padding", 0, 5)
    extra = [draw(st.integers(0, s - 1), "output_padding") for s in stride]
    shapes = zip(size, stride, padding, kernel, extra, strict=True)
    assume(min((n - 1) * s - 2 * p + k + e for n, s, p, k, e in shapes) >= 1)
    return size, kernel, stride, padding, extra


def winograd_times(batch: int, size: list[int]) -> int:
    """How many times as much as torch Winograd may err. At borders terms are larger than their sum: small volumes err
    up to 2.1 times as much as torch, single pixels 9."""
    return 2 if len(size) < 3 and batch * math.prod(size) >= 32 << len(size) else 30


@given(data=st.data())
def test_random_winograd_calls(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), "seed"))
    size, kernel, stride, padding, extra = draw_winograd_geometry(draw, 300)
    dims = len(size)
    groups, dtype = draw(st.sampled_from([1, 1, 2]), "groups"), draw(st.sampled_from(DTYPES), "dtype")
    inputs, outputs = draw(st.integers(32, 140), "inputs"), draw(st.integers(1, 140), "outputs")
    input, weight = make_inputs(draw(st.integers(0, 5), "batch"), groups, inputs, outputs, size, kernel, dtype)
    if dims > 1 and draw(st.booleans(), "input channels last"):
        input = input.contiguous(memory_format=CHANNELS_LAST[dims])
    assert_close(
        input,
        weight,
        winograd_times(len(input), size),
        bias=torch.randn(groups * outputs).to(dtype),
        stride=stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        channels_last=dims > 1 and draw(st.booleans(), "channels_last"),
        winograd=True,
    )
