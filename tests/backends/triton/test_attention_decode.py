"""The Triton kernels of a decoding step, on a GPU or by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import gpt4fast
from gpt4fast.backends.reference import attention_decode
from gpt4fast.backends.triton import attention_config as config
from gpt4fast.backends.triton import attention_decode as triton_attention_decode
from gpt4fast.backends.triton import tuning

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    dtype=torch.float32, batch=2, heads=4, kv_heads=2, new=1, dim=16, value_dim=16, capacity=48, block=None,
    stored=None, appends=True,
):  # fmt: skip
    """Arguments of a step: what lies past a row's end is NaN, and a paged cache's blocks are shuffled."""
    lengths = torch.randint(new, capacity - new + 1, (batch,))
    lengths[0] = capacity - new
    rows, entries = batch, capacity
    options = {}
    if block is not None:
        blocks = capacity // block
        table = torch.randperm(batch * blocks + 1)[:-1].view(batch, blocks)
        options["block_table"], rows, entries = table, batch * blocks + 1, block
    caches = [torch.randn(rows, kv_heads, entries, width) for width in (dim, value_dim)]
    if stored is not None:
        caches = [(cache * 40).round().clamp(-127, 127).to(stored) for cache in caches]
        options |= {f"{name}_scales": torch.rand(rows, kv_heads, entries) / 30 for name in ("key", "value")}
    else:
        caches = [cache.to(dtype) for cache in caches]
        if block is None:
            for b in range(batch):
                for cache in caches:
                    cache[b, :, lengths[b] :] = float("nan")
    if appends:
        options |= {
            name: torch.randn(batch, kv_heads, new, width).to(dtype)
            for name, width in (("key", dim), ("value", value_dim))
        }
    call = [torch.randn(batch, heads, new, dim).to(dtype), *caches, lengths]
    return [t.to(DEVICE) for t in call], {name: t.to(DEVICE) for name, t in options.items()}


def tables(positions, dim):
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def check(call, options, **more):
    """Output, log-sum-exp and caches as the reference's in float64; the output at most twice as far as the reference's
    in the same dtype, and two roundings."""
    results = {}
    for name in ("triton", "reference", "exact"):
        tensors = [t.clone() for t in call]
        copies = {key: t.clone() for key, t in options.items()}
        if name == "exact":
            tensors = [t.double() if t.dtype == call[0].dtype else t for t in tensors]
            copies = {k: t.double() if t.is_floating_point() and "scales" not in k else t for k, t in copies.items()}
        out, lse = gpt4fast.attention_decode(
            *tensors, **copies, **more, return_lse=True, impl="triton" if name == "triton" else "reference"
        )
        results[name] = out, lse, *tensors[1:3], *(copies[k] for k in ("key_scales", "value_scales") if k in copies)
    ours, plain, exact = results.values()
    dtype = call[0].dtype
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and ours[0].shape == exact[0].shape
    error, allowed = (ours[0].double() - exact[0]).norm(), 2 * (plain[0].double() - exact[0]).norm()
    assert error <= allowed + 2 * torch.finfo(dtype).eps * exact[0].norm()
    loose = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours[1].double(), exact[1].double(), rtol=loose, atol=loose)
    for cache, expected in zip(ours[2:], plain[2:], strict=True):
        if cache.dtype == torch.int8:  # a rotation rounded otherwise may end in the next integer
            assert (cache.int() - expected.int()).abs().max() <= 1
        elif cache.dtype == torch.float8_e4m3fn:
            torch.testing.assert_close(cache.float(), expected.float(), rtol=1 / 8, atol=1 / 512)
        else:
            torch.testing.assert_close(cache, expected, equal_nan=True)


SHAPES = {
    "one head": {"heads": 1, "kv_heads": 1},
    "grouped": {"heads": 6, "kv_heads": 2, "dim": 24, "value_dim": 40},
    "many queries": {"heads": 8, "kv_heads": 1, "new": 5},
    "long": {"batch": 1, "heads": 2, "kv_heads": 2, "capacity": 200},
    "paged": {"block": 8, "new": 3},
    "paged, small blocks": {"block": 3, "dim": 8, "value_dim": 4},
    "as it is": {"appends": False},
    "int8": {"stored": torch.int8, "new": 2},
    "int8, paged": {"stored": torch.int8, "block": 16},
    "float8": {"stored": torch.float8_e4m3fn, "new": 2},
    "float8, paged": {"stored": torch.float8_e4m3fn, "block": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype):
    check(*make(dtype, **SHAPES[shape]))


OPTIONS = {
    "scale": {"scale": 0.3},
    "window": {"window": (7, -1)},
    "window beyond": {"window": (2**31 - 1, 5)},
    "window of none": {"window": (0, 0)},
    "starts": {"kv_starts": torch.tensor([3, 60])},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.rand(2, 4)},
    "all": {"window": (20, -1), "kv_starts": torch.tensor([9, 0]), "softcap": 5.0, "alibi_slopes": torch.rand(4)},
}


@pytest.mark.parametrize("shape", ["many queries", "paged", "int8"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, shape):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[name].items()}
    if shape == "many queries" and "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(8, device=DEVICE)
    check(*make(**SHAPES[shape]), **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8, 2])
@pytest.mark.parametrize("shape", ["many queries", "paged", "int8, paged", "float8, paged"])
def test_rotary(shape, rotary_dim, interleaved):
    check(*make(**SHAPES[shape]), rotary=tables(60, rotary_dim), rotary_interleaved=interleaved)


def test_float8_rounding_is_torchs():
    """To the nearest, of equals the even one, over all magnitudes."""
    (query, *caches, lengths), options = make(stored=torch.float8_e4m3fn, dim=256, value_dim=256, new=2)
    for name in ("key", "value"):
        entries = torch.randn_like(options[name]) * torch.logspace(-4, 2, 256, device=DEVICE)
        entries[..., :8] = torch.tensor([448, 1.0625, 1.1875, -17, 1 / 1024, 3 / 1024, 0.0156, 447])
        options[name] = entries.clamp(-448, 448)  # scales of 1, and so numbers half way between two
        options[name][:, 0] *= 1.03
    options["key"][0, 0, 0] = 0
    expected = [t.clone() for t in (*caches, options["key_scales"], options["value_scales"])]
    attention_decode.attention_decode(
        lambda query, *_: (query, None), query, *expected[:2], lengths, options["key"], options["value"], None, None,
        False, *expected[2:], 1.0, None, None, 0.0, None, False,
    )  # fmt: skip
    gpt4fast.attention_decode(query, *caches, lengths, **options, impl="triton")
    for got, other in zip((*caches, options["key_scales"], options["value_scales"]), expected, strict=True):
        assert torch.equal(got.float(), other.float())


def test_a_row_that_sees_nothing_is_zero():
    call, options = make(batch=2)
    out, lse = gpt4fast.attention_decode(
        *call, **options, kv_starts=torch.full((2,), 100, device=DEVICE), return_lse=True, impl="triton"
    )
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()


def test_strides_of_any_kind():
    (query, key_cache, value_cache, lengths), options = make(batch=2, new=3)
    call = [query.transpose(1, 2).contiguous().transpose(1, 2)]
    call += [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (key_cache, value_cache)]
    out = gpt4fast.attention_decode(*call, lengths, **options, impl="triton")
    expected = gpt4fast.attention_decode(query, key_cache, value_cache, lengths, **options, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call[1], key_cache, equal_nan=True)


def test_whatever_tile_the_tuner_takes(monkeypatch):
    """Each of its variants computes the same, and the step is appended once."""
    call, options = make(batch=1, heads=6, kv_heads=1, new=3, capacity=300)
    arguments = [t.clone() for t in call], {name: t.clone() for name, t in options.items()}
    expected = gpt4fast.attention_decode(*arguments[0], **arguments[1], impl="reference")
    launches = []
    monkeypatch.setattr(tuning, "fastest", lambda name, shapes, *launch: launches.append(launch[:2]) or launch[0])
    out = gpt4fast.attention_decode(*call, **options, impl="triton")
    ((tile, launch),) = launches
    wide = {**tile, "BLOCK_N": 2 * tile["BLOCK_N"], "num_warps": 4, "num_stages": 1}
    assert tile["SPLITS"] > 1
    for variant in (tile, *tuning.variants(wide)):
        out.fill_(float("nan"))
        launch(variant)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(call[1], arguments[0][1], equal_nan=True)


def test_the_same_bits_each_time():
    call, options = make(batch=1, heads=2, kv_heads=1, capacity=300)
    first, second = (gpt4fast.attention_decode(*[t.clone() for t in call], **options, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_empty_batch():
    out = gpt4fast.attention_decode(
        torch.ones(0, 2, 1, 8, device=DEVICE), *torch.ones(2, 0, 2, 8, 8, device=DEVICE),
        torch.ones(0, dtype=torch.int64, device=DEVICE), impl="triton",
    )  # fmt: skip
    assert out.shape == (0, 2, 1, 8)


def test_refusals(monkeypatch):
    call, options = make()
    query = call[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        gpt4fast.attention_decode(query, *call[1:], **options, impl="triton")
    wide = make(dim=264)
    with pytest.raises(RuntimeError, match="head_dim of at most 256"):
        gpt4fast.attention_decode(*wide[0], **wide[1], impl="triton")
    rounded = make(stored=torch.float8_e4m3fn)
    monkeypatch.setattr(triton_attention_decode, "capability_of", lambda tensor: (8, 6))
    with pytest.raises(RuntimeError, match="float8 cache from compute capability 8.9"):
        gpt4fast.attention_decode(*rounded[0], **rounded[1], impl="triton")
    with pytest.raises(RuntimeError, match="int8, not float8_e4m3fn"):
        gpt4fast.attention_decode(*rounded[0], **rounded[1], impl="native")


def test_opcheck():
    call, options = make(batch=1, heads=2, kv_heads=1, capacity=20)
    query, key_cache, value_cache, lengths = call
    arguments = (
        query, key_cache.nan_to_num(), value_cache.nan_to_num(), lengths, options["key"], options["value"], None, None,
        None, False, None, None, 0.3, None, -1, 0.0, None,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gpt4fast.triton_attention_decode.default, arguments, test_utils=tests)


def test_splits():
    """Powers of two, never more than there are tiles, and none where a GPU is full without."""
    for programs in (1, 7, 32, 500):
        for capacity in (1, 64, 1000, 10**6):
            splits = config.decode_splits(programs, capacity, 64, 132)
            assert splits & (splits - 1) == 0 and 1 <= splits <= min(64, max(1, -(-capacity // 64)))
    assert config.decode_splits(1, 10**6, 64, 132) == 64
    assert config.decode_splits(264, 10**6, 64, 132) == 1
