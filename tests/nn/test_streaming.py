"""gpt4fast.nn.StreamingConvTranspose1d against the same convolution over the whole input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import gpt4fast
from gpt4fast.nn import ConvTranspose1d, StreamingConvTranspose1d
from gpt4fast.nn import streaming as streaming_file

ACTIVATIONS = [None, "relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu"]
# (kernel_size, stride, padding): how many frames are kept
VOCODERS = {
    (16, 8, 4): 1,  # HiFi-GAN's first upsampling
    (4, 2, 1): 1,  # and its last
    (10, 5, 0): 1,  # EnCodec's
    (4, 4, 0): 0,
    (2, 5, 0): 1,  # the bias that follows a frame comes when another frame does
    (11, 3, 2): 3,
    (12, 1, 5): 11,
}


def make_conv(ours=True, norm=None, dtype=torch.float64, channels=(4, 6), **options):
    if not ours:
        return nn.ConvTranspose1d(*channels, dtype=dtype, **options)
    conv = ConvTranspose1d(*channels, norm=norm, dtype=dtype, **options).eval()
    if norm:
        conv.norm.running_mean.normal_()
        conv.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(conv.norm.weight)
        nn.init.normal_(conv.norm.bias)
    return conv


def feed(stream, x, sizes):
    """The outputs of chunks of x of the given sizes, and of flush()."""
    return [stream(chunk) for chunk in x.split(sizes, -1)] + [stream.flush()]


def offline(conv, x):
    """``conv(x)``, and no output where padding leaves none."""
    stride, padding, extra, dilation, kernel = (
        value[0] for value in (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.kernel_size)
    )
    size = (x.shape[-1] - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
    return conv(x) if x.shape[-1] and size > 0 else x.new_empty(x.shape[0], conv.out_channels, 0)


def geometry_of(kernel_size, stride=1, padding=0, output_padding=0, dilation=1):
    return locals()


@st.composite
def geometries(draw):
    kernel, stride = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    dilation = draw(st.one_of(st.just(1), st.integers(1, 4)))
    padding = draw(st.one_of(st.integers(0, 3), st.integers(0, dilation * kernel + 3)))
    return geometry_of(kernel, stride, padding, draw(st.integers(0, max(stride, dilation) - 1)), dilation)


SIZES = st.one_of(st.lists(st.just(1), max_size=12), st.lists(st.integers(0, 9), max_size=8))


@given(geometries(), SIZES, st.data())
def test_random_streams(geometry, sizes, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype")
    groups = data.draw(st.integers(1, 3), "groups")
    channels = tuple(groups * data.draw(st.integers(1, 4), name) for name in ("in", "out"))
    ours = data.draw(st.booleans(), "ours")
    options = {"groups": groups, "bias": data.draw(st.booleans(), "bias"), **geometry}
    if ours:
        options["norm"] = data.draw(st.sampled_from([None, "batch"]), "norm")
        options["activation"] = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    conv = make_conv(ours, dtype=dtype, channels=channels, **options)
    x = torch.randn(data.draw(st.integers(1, 3), "batch"), channels[0], sum(sizes)).to(dtype)
    stream = StreamingConvTranspose1d(conv)
    with torch.no_grad():
        got, expected = feed(stream, x, sizes), offline(conv, x)
        exact = offline(copy.deepcopy(conv).double(), x.double())
    if not sizes:
        assert got[0].shape == (0, channels[1], 0) and got[0].dtype == dtype
        return
    got = torch.cat(got, -1)
    assert got.dtype == dtype and got.shape == exact.shape
    if got.numel():
        error, theirs = ((t.double() - exact).abs().max().item() for t in (got, expected))
        assert error <= 2 * theirs + 4 * torch.finfo(dtype).eps * max(1, exact.abs().max().item())


@example(geometry_of(3, padding=3, dilation=3), [1] * 4)  # the output starts where the second frame adds nothing
@example(geometry_of(5, stride=2, padding=3, dilation=2), [1] * 3)  # at a place that no frame adds to
@example(geometry_of(3, stride=2, padding=1, dilation=2), [0, 1])
@example(geometry_of(2, stride=2, output_padding=1), [2, 1])  # all bias after the last frame
@example(geometry_of(1, stride=2, output_padding=7, dilation=8), [1, 2])
@example(geometry_of(1, stride=6, output_padding=2), [1, 2])
@example(geometry_of(2, padding=4), [1] * 9)  # the first and last frames are cut off
@example(geometry_of(4, stride=4, padding=3), [1] * 4)
@given(geometries(), SIZES)
def test_every_output_comes_as_soon_as_it_is_final(geometry, sizes):
    """Final is what no further frame changes, even a NaN, and what is there should no further frame come."""
    conv = nn.ConvTranspose1d(1, 1, dtype=torch.float64, **geometry)
    stream, x, seen = StreamingConvTranspose1d(conv), torch.randn(1, 1, sum(sizes), dtype=torch.float64), 0
    out = torch.empty(1, 1, 0, dtype=torch.float64)
    for size in sizes:
        out = torch.cat([out, stream(x[..., seen : seen + size])], -1)
        seen += size
        final = 0
        if seen:
            now = offline(conv, x[..., :seen])
            later = conv(torch.cat([x[..., :seen], torch.full((1, 1, 120), torch.nan, dtype=torch.float64)], -1))
            final = min(now.shape[-1], int(later.flatten().isnan().nonzero()[0]))
        assert out.shape[-1] == final
    if sizes:
        torch.testing.assert_close(torch.cat([out, stream.flush()], -1), offline(conv, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_norm_and_activation(norm, activation, monkeypatch):
    conv = make_conv(norm=norm, activation=activation, negative_slope=0.3, kernel_size=16, stride=8, padding=4)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    for impl in ("auto", "reference"):
        monkeypatch.setenv("GPT4FAST_IMPL", impl)
        got = torch.cat(feed(StreamingConvTranspose1d(conv), x, [1, 3, 1, 4]), -1)
        torch.testing.assert_close(got, conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", VOCODERS)
def test_nothing_is_computed_twice_or_thrown_away(geometry, monkeypatch):
    kernel, stride, padding = geometry
    computed = []

    def spy(*args, **kwargs):
        computed.append(gpt4fast.conv_transpose1d(*args, **kwargs))
        return computed[-1]

    monkeypatch.setattr(streaming_file.ops, "conv_transpose1d", spy)
    stream = StreamingConvTranspose1d(nn.ConvTranspose1d(4, 6, kernel, stride, padding))
    stream(torch.randn(1, 4, 20))
    for size in (1, 2, 7):
        out = stream(torch.randn(1, 4, size))
        assert computed[-1].shape == out.shape == (1, 6, size * stride)
        assert out.is_contiguous()
        assert stream.frames.shape[-1] == VOCODERS[geometry]
        assert stream.frames.untyped_storage().nbytes() == stream.frames.numel() * 4


def test_layers_in_a_row():
    """Chunks too short for an output are passed on, of length 0, and the end of the first layer is not the second's."""
    convs = [
        make_conv(activation="leaky_relu", kernel_size=3, stride=2, padding=4, channels=(4, 5)),
        make_conv(
            norm="batch", activation="tanh", kernel_size=7, stride=3, padding=2, output_padding=2, channels=(5, 2)
        ),
    ]
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    first, second = map(StreamingConvTranspose1d, convs)
    for sizes in ([1] * 12, [5, 0, 7]):
        out = [second(first(chunk)) for chunk in x.split(sizes, -1)]
        out += [second(first.flush()), second.flush()]
        torch.testing.assert_close(torch.cat(out, -1), convs[1](convs[0](x)), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_whole():
    conv = make_conv(norm="batch", activation="silu", kernel_size=5, stride=2, padding=1)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(conv(x))
    expected = torch.autograd.grad(conv(x), [x, *conv.parameters()], probe)
    got = torch.cat(feed(StreamingConvTranspose1d(conv), x, [2, 1, 4]), -1)
    torch.testing.assert_close(torch.autograd.grad(got, [x, *conv.parameters()], probe), expected)


def test_a_buffer_used_for_every_chunk():
    conv = make_conv(kernel_size=9, stride=2)
    x = torch.randn(5, 1, 4, 2, dtype=torch.float64)
    stream, buffer, out = StreamingConvTranspose1d(conv), torch.empty(1, 4, 2, dtype=torch.float64), []
    for chunk in x:
        out.append(stream(buffer.copy_(chunk)))
        buffer.fill_(torch.nan)
    torch.testing.assert_close(torch.cat([*out, stream.flush()], -1), conv(torch.cat(list(x), -1)))


def test_shares_parameters_and_keeps_the_stream_out_of_the_state_dict():
    conv = make_conv(norm="batch", kernel_size=4, stride=2)
    stream = StreamingConvTranspose1d(conv)
    stream(torch.randn(1, 4, 5, dtype=torch.float64))
    assert list(stream.state_dict()) == [f"conv.{key}" for key in conv.state_dict()]
    assert stream.conv.weight is conv.weight
    with torch.no_grad():
        conv.weight.zero_()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    stream.reset()
    torch.testing.assert_close(torch.cat(feed(stream, x, [2, 3]), -1), conv(x))


def test_reset_flush_and_copies():
    conv = make_conv(kernel_size=7, stride=2, padding=2, activation="relu")
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    stream = StreamingConvTranspose1d(conv)
    expected = [t.detach() for t in feed(stream, x, [4, 5])]
    stream(torch.randn(1, 4, 3, dtype=torch.float64))
    stream.reset()
    assert torch.equal(stream(x[..., :4]), expected[0])
    for copied in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream)), stream):
        assert torch.equal(copied(x[..., 4:]), expected[1])
        assert torch.equal(copied.flush(), expected[2])
        assert copied.flush().shape == (0, 6, 0)
    assert stream(torch.empty(5, 4, 0, dtype=torch.float64)).shape == (5, 6, 0)
    assert stream.flush().shape == (5, 6, 0)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
def test_autocast_weight_norm_and_optimize():
    conv = make_conv(False, dtype=torch.float32, kernel_size=8, stride=4, padding=2)
    x = torch.randn(2, 4, 6)
    stream = StreamingConvTranspose1d(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = feed(stream, x, [0, 1, 5])
        torch.testing.assert_close(torch.cat(out, -1), conv(x), rtol=0.05, atol=0.05)
        again = feed(stream, x.bfloat16(), [2, 4])  # as from a layer before this one
        torch.testing.assert_close(torch.cat(again, -1), conv(x), rtol=0.05, atol=0.05)
    assert {t.dtype for t in out + again} == {torch.bfloat16}
    old = StreamingConvTranspose1d(nn.utils.weight_norm(copy.deepcopy(conv)))
    with pytest.raises(RuntimeError, match="conv must have no forward hooks.*parametrizations.weight_norm"):
        old(x)
    nn.utils.parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.data.mul_(2)
    torch.testing.assert_close(torch.cat(feed(StreamingConvTranspose1d(conv), x, [2, 4]), -1), conv(x))
    stream = StreamingConvTranspose1d(make_conv(False, dtype=torch.float32, kernel_size=8, stride=4, padding=2)).eval()
    expected = stream.conv(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(feed(gpt4fast.optimize(stream), x, [2, 4]), -1), expected)


def test_batch_norm_in_training_is_refused():
    conv = make_conv(norm="batch", kernel_size=4)
    stream = StreamingConvTranspose1d(conv)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    stream(x)
    stream.train()
    for call in (lambda: stream(x), stream.flush):
        with pytest.raises(RuntimeError, match="conv's norm must be in eval mode with running statistics"):
            call()
    stream.eval()
    torch.testing.assert_close(torch.cat([stream(x), stream.flush()], -1), conv(torch.cat([x, x], -1))[..., 3:])
    conv.train().norm = None
    torch.testing.assert_close(torch.cat(feed(stream, x, [1, 2]), -1), conv(x))


def test_bad_arguments_are_named_and_leave_the_stream_alone():
    class Other(nn.ConvTranspose1d):
        def forward(self, input):
            return input

    replaced = nn.ConvTranspose1d(4, 6, 3)
    replaced.forward = lambda input: input
    others = [nn.Conv1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), gpt4fast.nn.ConvTranspose2d(4, 6, 3), Other(4, 6, 3), 3]
    for bad in (replaced, *others):
        with pytest.raises(TypeError, match="conv must be a ConvTranspose1d of torch.nn or gpt4fast.nn, but is"):
            StreamingConvTranspose1d(bad)
    conv = make_conv(False, dtype=torch.float32, kernel_size=4, stride=2)
    stream, x = StreamingConvTranspose1d(conv), torch.randn(2, 4, 5)

    def check_shapes_and_types():
        for bad in (x[0], x[:, :3], x[None]):
            with pytest.raises(ValueError, match=r"chunk must have shape \(N, 4, T\), but is a tensor of shape"):
                stream(bad)
        with pytest.raises(TypeError, match="chunk must be a tensor, but is None"):
            stream(None)
        with pytest.raises(TypeError, match="chunk must have one of the dtypes"):
            stream(x.long())

    check_shapes_and_types()
    with pytest.raises(TypeError, match="chunk must have conv.weight's dtype torch.float32, but is .*float64"):
        stream(x.double())
    out = [stream(x[..., :2])]
    check_shapes_and_types()
    for bad in (x[:1], x.double(), x.to("meta")):
        with pytest.raises(
            ValueError, match=r"chunk must be like the stream so far \(batch size 2, torch.float32, cpu\)"
        ):
            stream(bad)
    out += [stream(x[..., 2:]), stream.flush()]
    torch.testing.assert_close(torch.cat(out, -1), conv(x))
