"""Tensors of more than 2^31 elements: parts at the start, at the end and around that element."""

from __future__ import annotations

import pytest
import torch

import gpt4fast

from .comparison import DEVICE, error, heads, normal

pytestmark = pytest.mark.gpu

DTYPE = torch.float16
HALF = 2e-3  # relative error of results in float16, of sums in float32
MANY = 2**31

# Transposed convolution: each output channel has two taps of each of CHANNELS channels.
CHANNELS, OUTPUTS = 16, 64
IMAGES, LENGTH = 9, 2**21  # of 2^22 outputs: images of 2^28 elements, which Triton's kernel counts in 32 bits
LONG = MANY // OUTPUTS // 2 + 1000  # of one image that is too large for that
PART = 1000


def convolve(input, weight, impl):
    return gpt4fast.conv_transpose1d(input, weight, stride=2, padding=1, impl=impl)


def assert_parts(input, weight, out, image, starts):
    """Outputs of an image, twice PART each, against float64: those of the part of the input that reaches them."""
    for start in starts:
        before, after = min(start, 8), min(input.shape[2] - start - PART, 8)
        part = input[image : image + 1, :, start - before : start + PART + after]
        exact = convolve(part.double(), weight.double(), "reference")[:, :, 2 * before : 2 * (before + PART)]
        assert error(out[image : image + 1, :, 2 * start : 2 * (start + PART)], exact) <= HALF


def test_conv_transpose_of_many_images(impl, room):
    room(12)
    input, weight = normal(IMAGES, CHANNELS, LENGTH, dtype=DTYPE), normal(CHANNELS, OUTPUTS, 4, dtype=DTYPE)
    out = convolve(input, weight, impl)
    assert out.numel() > MANY
    for image in (0, IMAGES // 2, IMAGES - 2, IMAGES - 1):  # the boundary is where the last begins
        assert_parts(input, weight, out, image, (0, LENGTH // 2 + 17, LENGTH - PART))


@pytest.mark.usefixtures("needs_cuda")
def test_conv_transpose_of_one_image(room):
    """The CUDA kernel counts in 64 bits."""
    room(12)
    input, weight = normal(1, CHANNELS, LONG, dtype=DTYPE), normal(CHANNELS, OUTPUTS, 4, dtype=DTYPE)
    out = convolve(input, weight, "cuda")
    assert out.numel() > MANY
    assert_parts(input, weight, out, 0, (0, LONG // 2 + 17, LONG - PART))


@pytest.mark.usefixtures("needs_triton")
def test_triton_refuses_one_image_that_it_can_not_count():
    input, weight = normal(1, CHANNELS, 1, dtype=DTYPE), normal(CHANNELS, OUTPUTS, 4, dtype=DTYPE)
    with pytest.raises(RuntimeError, match="32 bits"):
        convolve(input.expand(-1, -1, LONG), weight, "triton")


# Attention: the elements of query, key, value and output

BATCH, HEADS, ROWS, DIM = 512, 32, 1032, 128


def test_attention(impl, room):
    room(24)
    query, key, value = heads(BATCH, HEADS, HEADS, ROWS, ROWS, DIM, DTYPE)
    out, lse = gpt4fast.attention(query, key, value, is_causal=True, return_lse=True, impl=impl)
    assert out.numel() > MANY
    # The boundary is in the last few rows of the batch.
    for row in (0, BATCH // 2, MANY // (HEADS * ROWS * DIM), BATCH - 1):
        part = [t[row : row + 1, ::7].double() for t in (query, key, value)]
        exact, exact_lse = gpt4fast.attention(*part, is_causal=True, return_lse=True, impl="reference")
        assert error(out[row : row + 1, ::7], exact) <= HALF
        torch.testing.assert_close(lse[row : row + 1, ::7].double(), exact_lse.double(), rtol=1e-3, atol=1e-3)


def test_decoding(impl, room):
    """The elements of a cache, whose last row and last entries are seen."""
    room(20)
    batch, kv_heads, capacity = 129, 8, MANY // (128 * 8 * DIM)
    caches = [normal(batch, kv_heads, capacity, DIM, dtype=DTYPE) for _ in range(2)]
    query, *new = (normal(batch, n, 1, DIM, dtype=DTYPE) for n in (4 * kv_heads, kv_heads, kv_heads))
    lengths = torch.full((batch,), capacity - 1, device=DEVICE)
    out = gpt4fast.attention_decode(query, *caches, lengths, key=new[0], value=new[1], impl=impl)
    assert caches[0].numel() > MANY
    for row in (0, 127, 128):
        for cache, entries in zip(caches, new, strict=True):
            assert torch.equal(cache[row, :, -1], entries[row, :, 0])
        part = [t[row : row + 1].double() for t in (query, *caches)]
        exact = gpt4fast.attention_decode(*part, lengths[:1] + 1, impl="reference")
        assert error(out[row : row + 1], exact) <= HALF
