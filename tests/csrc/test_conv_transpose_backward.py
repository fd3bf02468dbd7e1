"""The native gradients of a transposed convolution, called directly, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from .test_conv_transpose_forward import draw_winograd_geometry, winograd_times

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TORCHS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
NAMES = ("input", "weight")


class Case:
    """batch, groups, channels of a group in and out, size, kernel; then stride, padding, output_padding, dilation."""

    def __init__(self, batch, groups, inputs, outputs, size, kernel, stride=1, padding=0, extra=0, dilation=1):
        self.dims, self.groups = len(size), groups
        each = lambda x: [x] * self.dims if isinstance(x, int) else list(x)  # noqa: E731
        self.stride, self.padding, self.extra, self.dilation = map(each, (stride, padding, extra, dilation))
        self.x, self.w = torch.randn(batch, groups * inputs, *size), torch.randn(groups * inputs, outputs, *kernel)

    def torchs(self, x, w):
        return TORCHS[self.dims](x, w, None, self.stride, self.padding, self.extra, self.groups, self.dilation)

    def ours(self, grad, x, w, channels_last=False, needed=(True, True), winograd=False):
        settings = self.stride, self.padding, self.extra, self.groups, self.dilation
        return torch.ops.gpt4fast.conv_transpose_backward(grad, x, w, *settings, channels_last, *needed, winograd)

    def check(self, dtype=torch.float32, channels_last=False, against_torch=True, winograd=False, times=2):
        """At most twice as far from float64 as torch in the same dtype, or within its rounding where torch is exact.

        Without torch, whose own backward crashes for some shapes in half types (2.13): within ``times`` the rounding of
        the sums.
        """
        layout = CHANNELS_LAST[self.dims] if channels_last else torch.contiguous_format
        x, w = self.x.to(dtype).contiguous(memory_format=layout), self.w.to(dtype)
        with torch.no_grad():
            shape = self.torchs(self.x, self.w).shape
        grad = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        exact = self.gradients(x.double(), w.double(), grad.double())
        if against_torch:
            theirs = self.gradients(x, w, grad)
            errors = [2 * (t.double() - true).norm().item() for t, true in zip(theirs, exact, strict=True)]
        else:
            sizes = self.gradients(x.double().abs(), w.double().abs(), grad.double().abs())
            errors = [times * torch.finfo(torch.float32).eps * size.norm().item() for size in sizes]
        found = self.ours(grad, x, w, channels_last, winograd=winograd)
        names = NAMES[:1] if winograd else NAMES  # the weight's gradient does not know of it, and torch's may be NaN
        for name, own, true, error in zip(names, found, exact, errors, strict=False):
            assert own.dtype == dtype and own.shape == true.shape
            assert own.is_contiguous(memory_format=layout if name == "input" else torch.contiguous_format)
            allowed = error + torch.finfo(dtype).eps * true.norm().item()
            assert (own.double() - true).norm().item() <= allowed, name

    def gradients(self, x, w, grad):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        return torch.autograd.grad(self.torchs(*leaves), leaves, grad)


CASES = {
    "dcgan, first layer": (3, 1, 100, 37, (1, 1), (4, 4)),
    "dcgan, middle layer": (5, 1, 24, 70, (8, 8), (4, 4), 2, 1),
    "dcgan, last layer": (2, 1, 64, 3, (16, 16), (4, 4), 2, 1),
    "more images than a block": (40, 1, 7, 9, (5, 5), (3, 3), 2, 1),
    "images larger than a block": (1, 1, 5, 18, (40, 41), (4, 4), 2, 1),
    "kernel = stride": (2, 1, 6, 9, (5, 7), (2, 2), 2),
    "kernel < stride": (2, 1, 6, 9, (5, 7), (2, 1), (3, 4), 0, (2, 1)),
    "1x1 kernel": (2, 1, 5, 8, (6, 6), (1, 1)),
    "depthwise": (2, 13, 1, 1, (9, 9), (4, 4), 2, 1),
    "groups": (2, 3, 4, 6, (5, 9), (3, 2), (1, 2)),
    "groups of many channels": (2, 2, 20, 70, (5, 4), (3, 3), 2, 1, 1),
    "dilation": (2, 1, 5, 6, (7, 8), (3, 3), 2, 2, (2, 1), (3, 2)),
    "padding larger than the kernel": (2, 1, 5, 6, (11, 12), (3, 2), 2, (5, 4)),
    "line": (2, 1, 7, 10, (1300,), (5,), 3, 2),
    "long kernel": (1, 1, 16, 8, (60,), (25,), 4, 11, 1),
    "stride longer than a block": (1, 1, 3, 4, (3,), (3,), 5000),
    "volume": (2, 1, 5, 9, (3, 4, 5), (4, 3, 4), (2, 1, 2), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, dtype, level):
    case = Case(*CASES[name])
    for channels_last in {False, case.dims > 1}:
        case.check(dtype, channels_last)


WINOGRAD = {
    "dcgan": (3, 1, 64, 70, (8, 8), (4, 4), 2, 1),
    "odd sizes": (2, 1, 37, 20, (5, 7), (4, 4), 2, 0, 1),
    "one pixel": (40, 1, 40, 20, (1, 1), (4, 6), (2, 3), (1, 2)),
    "padding of a stride": (2, 1, 16, 33, (4, 5), (4, 6), (2, 3), (2, 3), (1, 0)),
    "groups": (2, 3, 33, 18, (6, 5), (6, 4), (3, 2), 1),
    "larger than a block": (1, 1, 18, 40, (60, 41), (4, 4), 2, 1),
    "line": (2, 1, 130, 40, (700,), (16,), 8, 4),
    "a line of lines": (2, 1, 20, 33, (3, 9), (1, 8), (1, 4), (0, 2), (0, 1)),
    "volume": (2, 1, 24, 96, (3, 6, 5), (4, 4, 4), 2, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WINOGRAD)
def test_winograd(name, dtype, level):
    case = Case(*WINOGRAD[name])
    for channels_last in {False, case.dims > 1}:
        case.check(dtype, channels_last, winograd=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_dilation(dtype, level):
    """Where torch's own backward in bfloat16 gives NaN or crashes (2.13)."""
    for case in (
        Case(1, 2, 20, 33, (70, 60), (3, 2), 1, (30, 3), 0, (50, 40)),
        Case(2, 1, 12, 70, (50, 60), (2, 3), (1, 2), 20, 0, (50, 60)),
    ):
        for channels_last in (False, True):
            case.check(dtype, channels_last, against_torch=False)


def test_strides():
    """Gradients, inputs and weights that are views."""
    case = Case(2, 1, 20, 18, (6, 5), (3, 3), 2, 1)
    grad = torch.randn(case.torchs(case.x, case.w).shape)
    expected = case.ours(grad, case.x, case.w)

    def views(t):
        yield t.flip(-1).flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)
        yield torch.stack([t, t], -1)[..., 0]
        yield torch.cat([t, t], 1)[:, : t.shape[1]]

    for tensors in zip(*map(views, (grad, case.x, case.w)), strict=True):
        for got, want in zip(case.ours(*tensors), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    expanded = torch.ones(1, 1, 1, 1).expand_as(grad)
    for got, want in zip(case.ours(expanded, case.x, case.w), case.ours(expanded.clone(), case.x, case.w), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_only_what_is_needed():
    case = Case(2, 1, 4, 6, (5, 5), (3, 3), 2)
    grad = torch.randn(case.torchs(case.x, case.w).shape)
    both = case.ours(grad, case.x, case.w)
    for index in range(2):
        needed = index == 0, index == 1
        got = case.ours(grad, case.x, case.w, needed=needed)
        assert torch.equal(got[index], both[index]) and got[1 - index].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    case = Case(9, 1, 40, 70, (8, 8), (4, 4), 2, 1)
    x, w = case.x.to(dtype), case.w.to(dtype)
    grad = torch.randn(case.torchs(case.x, case.w).shape).to(dtype)
    expected, by_winograd = case.ours(grad, x, w), case.ours(grad, x, w, winograd=True)
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, case.ours(grad, x, w), expected))
            assert all(map(torch.equal, case.ours(grad, x, w, winograd=True), by_winograd))
    finally:
        torch.set_num_threads(before)


def test_empty_batch():
    case = Case(0, 1, 4, 6, (5, 5), (3, 3), 2)
    grad_input, grad_weight = case.ours(torch.zeros(0, 6, 11, 11), case.x, case.w)
    assert grad_input.shape == case.x.shape and grad_weight.shape == case.w.shape and not grad_weight.any()


def test_bad_direct_calls_raise():
    case = Case(2, 1, 4, 6, (5, 5), (3, 3), 2)
    good = torch.zeros(2, 6, 11, 11)
    case.ours(good, case.x, case.w)
    for bad in (good[:1], good[:, :5], good[..., :10], good.half(), good[0]):
        with pytest.raises(RuntimeError, match=r"\bgrad_out\b"):
            case.ours(bad, case.x, case.w)


def test_opcheck():
    case = Case(2, 1, 4, 6, (5, 5), (3, 3), 2)
    arguments = (torch.randn(2, 6, 11, 11), case.x, case.w, [2, 2], [0, 0], [0, 0], 1, [1, 1])
    for channels_last, *needed in ((False, True, True), (True, True, False), (False, False, True)):
        torch.library.opcheck(torch.ops.gpt4fast.conv_transpose_backward.default, (*arguments, channels_last, *needed))


@given(data=st.data())
def test_random_calls(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), "seed"))
    dims = draw(st.integers(1, 3), "dims")

    def list_of(name, least, most):
        return draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims), name)

    size = list_of("size", 1, (80, 10, 4)[dims - 1])
    kernel, stride = list_of("kernel", 1, (17, 5, 3)[dims - 1]), list_of("stride", 1, (9, 5, 3)[dims - 1])
    dilation, padding = list_of("dilation", 1, 3), list_of("padding", 0, 4)
    extra = [draw(st.integers(0, max(s, d) - 1), "output_padding") for s, d in zip(stride, dilation, strict=True)]
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(out) >= 1)
    channels = st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 80))
    sizes = draw(st.integers(1, 3), "batch"), draw(st.integers(1, 3), "groups"), draw(channels), draw(channels)
    case = Case(*sizes, size, kernel, stride, padding, extra, dilation)
    channels_last = dims > 1 and draw(st.booleans(), "channels last")
    case.check(draw(st.sampled_from(DTYPES), "dtype"), channels_last, against_torch=False)


@given(data=st.data())
def test_random_winograd_calls(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), "seed"))
    size, kernel, stride, padding, extra = draw_winograd_geometry(draw, 150)
    dims = len(size)
    sizes = [draw(st.integers(1, most), name) for name, most in (("batch", 4), ("groups", 2), ("inputs", 140))]
    case = Case(*sizes, draw(st.integers(32, 100), "outputs"), size, kernel, stride, padding, extra)
    channels_last = dims > 1 and draw(st.booleans(), "channels last")
    times = winograd_times(sizes[0], size)
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    case.check(dtype, channels_last, against_torch=False, winograd=True, times=times)
