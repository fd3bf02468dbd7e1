"""The choice of a transposed convolution's tiles and splits, which is a pure function of sizes and of the device."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .build import ROOT, compiler, kept, make
from .test_conv_transpose import SHAPES

TILES = {"large": (128, 128), "medium": (128, 64), "small": (64, 64), "narrow": (128, 32)}
HALF, TF32, IEEE = range(3)
H200 = 132, 228 << 10  # multiprocessors, and the shared memory of each
A100 = 108, 164 << 10
EMULATED = 4, 228 << 10
ROOM = {"large": 2, "medium": 3, "small": 3, "narrow": 3}  # blocks on a multiprocessor of an H200

# (pixels of a phase of one image, phases, output channels, taps of a phase, input channels), and the plan of half types
# for 1 and 64 images.
LAYERS = {
    "DCGAN 100→512, 1²": ((1, 16, 512, 1, 104), ("small", 1), ("small", 1)),
    "DCGAN 512→256, 4²": ((16, 4, 256, 4, 512), ("small", 16), ("large", 2)),
    "DCGAN 256→128, 8²": ((64, 4, 128, 4, 256), ("small", 16), ("large", 1)),
    "DCGAN 128→64, 16²": ((256, 4, 64, 4, 128), ("small", 8), ("medium", 1)),
    "DCGAN 64→3, 32²": ((1024, 4, 3, 4, 64), ("small", 1), ("narrow", 1)),
    "pix2pix 512→512, 1²": ((1, 4, 512, 1, 512), ("small", 8), ("small", 4)),
    "pix2pix 1024→512, 8²": ((64, 4, 512, 4, 1024), ("small", 8), ("large", 1)),
    "pix2pix 128→3, 128²": ((16384, 4, 3, 4, 128), ("narrow", 1), ("narrow", 1)),
    "HiFi-GAN 512→256, T 100": ((100, 8, 256, 2, 512), ("large", 8), ("large", 1)),
    "HiFi-GAN 256→128, T 800": ((800, 8, 128, 2, 256), ("small", 1), ("large", 1)),
    "HiFi-GAN 128→64, T 6400": ((6400, 2, 64, 2, 128), ("small", 1), ("medium", 1)),
    "HiFi-GAN 64→32, T 12800": ((12800, 2, 32, 2, 64), ("narrow", 1), ("narrow", 1)),
    "SAM 256→64, 64²": ((4096, 4, 64, 1, 256), ("small", 1), ("medium", 1)),
    "SAM 64→32, 128²": ((16384, 4, 32, 1, 64), ("narrow", 1), ("narrow", 1)),
}


class Plans:
    def __init__(self) -> None:
        source = Path(__file__).parent / "conv_transpose_plan.cpp"
        options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        header = ROOT / "csrc" / "cuda" / "conv_transpose_config.h"
        library = make(kept("conv_transpose_plan.so", [source, header]), [compiler(), *options, source])
        self.library = ctypes.CDLL(str(library))
        self.library.clocks.restype = ctypes.c_int64

    def plan(self, size, products, device=H200) -> tuple[str, int]:
        chosen = (ctypes.c_int64 * 2)()
        self.library.plan(_numbers(size), products, _numbers(device), chosen)
        return list(TILES)[chosen[0]], chosen[1]

    def clocks(self, size, products, tile, splits, device=H200) -> int:
        arguments = ctypes.c_int64(list(TILES).index(tile)), ctypes.c_int64(splits)
        return self.library.clocks(_numbers(size), products, _numbers(device), *arguments)


def _numbers(values):
    return (ctypes.c_int64 * len(values))(*values)


@pytest.fixture(scope="module")
def plans() -> Plans:
    return Plans()


def size_of(layer, batch: int, element_size: int = 2) -> tuple[int, ...]:
    pixels, phases, channels, taps, inputs = layer
    return batch * pixels, phases, channels, 1, taps, inputs * element_size


def tiles_of(size, tile: str) -> int:
    pixels, phases, channels, groups, _, _ = size
    tile_pixels, tile_channels = TILES[tile]
    return math.ceil(pixels / tile_pixels) * math.ceil(channels / tile_channels) * phases * groups


def emulated_size(name: str, element_size: int) -> tuple[int, ...]:
    """Of a case of test_conv_transpose.py, in one or two dimensions."""
    (batch, inputs, *sizes), (channels, *kernel), stride, padding, output_padding, groups, dilation = SHAPES[name]
    pixels, phases, taps = batch, 1, 1
    for size, taps_along in zip(sizes, kernel, strict=True):
        reach = dilation * (taps_along - 1) + 1
        out = (size - 1) * stride - 2 * padding + reach + output_padding
        pixels *= math.ceil(out / stride)
        phases *= min(stride, out)
        taps *= math.ceil(taps_along / (stride // math.gcd(stride, dilation)))
    depth = math.ceil(inputs // groups * element_size / 16) * 16
    return pixels, phases, channels, groups, taps, depth


@pytest.mark.parametrize("products, element_size", [(HALF, 2), (TF32, 4), (IEEE, 4)])
def test_the_emulated_cases_have_every_plan(plans, products, element_size):
    sizes = [emulated_size(name, element_size) for name in SHAPES if "tiles" in name]
    found = {(tile, splits > 1) for tile, splits in (plans.plan(size, products, EMULATED) for size in sizes)}
    tiles = TILES if products != IEEE else ("small", "narrow")
    assert found == {(tile, is_split) for tile in tiles for is_split in (False, True)}


@pytest.mark.parametrize("name", LAYERS)
def test_real_layers(plans, name):
    layer, one, many = LAYERS[name]
    assert plans.plan(size_of(layer, 1), HALF) == one
    assert plans.plan(size_of(layer, 64), HALF) == many


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [1, 64])
def test_multiprocessors_are_occupied(plans, name, batch):
    """Nearly half of them have a block at least, or what there is to add up is short: another split would save less
    than the kernel that adds up takes."""
    for products, element_size in ((HALF, 2), (TF32, 4), (IEEE, 4)):
        size = size_of(LAYERS[name][0], batch, element_size)
        tile, splits = plans.plan(size, products)
        steps = size[4] * math.ceil(size[5] / (64 if tile in ("large", "medium") else 128))
        assert tiles_of(size, tile) * splits > 0.45 * H200[0] or math.ceil(steps / splits) <= 8


def test_an_estimate_by_hand(plans):
    """DCGAN's 512→256 at 4², 64 images, in 256 tiles of 64 x 64: 2 on each of most multiprocessors, which fetch 2 x 128
    rows of 128 bytes in each of 32 steps: 36 us at 1.9 GHz, as measured. In two splits, 512 blocks are more than the
    396 that there is room for."""
    size = size_of(LAYERS["DCGAN 512→256, 4²"][0], 64)
    assert plans.clocks(size, HALF, "small", 1) == 3000 + 32 * 2 * 128 * 128 // 16
    assert plans.clocks(size, HALF, "small", 2) == 2**63 - 1
    sums = 8 * 2 * 4096 * 256 // (16 * 132)
    assert plans.clocks(size, HALF, "large", 2) == 3000 + 32 * (500 + 200 + 2 * 64 + 409) + 5000 + sums


sizes = st.tuples(
    st.integers(1, 1 << 20), st.integers(1, 16), st.integers(1, 1024), st.integers(1, 4), st.integers(0, 32),
    st.integers(1, 256).map(lambda parts: 16 * parts),
)  # fmt: skip


@given(sizes, st.sampled_from([HALF, TF32, IEEE]), st.sampled_from([H200, A100, EMULATED, (1, 100 << 10)]))
def test_any_size(plans, size, products, device):
    """The plan is the cheapest, exact products have tiles that fit in registers, splits fit into one wave, and twice as
    many multiprocessors are not slower."""
    tile, splits = plans.plan(size, products, device)
    clocks = plans.clocks(size, products, tile, splits, device)
    fitting = [other for other in TILES if products != IEEE or other in ("small", "narrow")]
    assert tile in fitting
    assert all(clocks <= plans.clocks(size, products, other, n, device) for other in fitting for n in range(1, 17))
    assert 1 <= splits <= 16
    assert splits == 1 or tiles_of(size, tile) * splits <= device[0] * ROOM[tile]
    more = 2 * device[0], device[1]
    assert plans.clocks(size, products, *plans.plan(size, products, more), more) <= clocks
