"""The CUDA kernel of decoding, emulated, against float64: the cases of ../test_attention_decode.py, small."""

from __future__ import annotations

import math

import pytest
import torch

from .. import test_attention_decode as cpu
from ..test_attention_decode import DTYPES, RULES, tables


class Case(cpu.Case):
    ROUNDED_QUERY = {torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _cuda_ops(cuda_ops, monkeypatch):
    monkeypatch.setattr(torch.ops, "gpt4fast", cuda_ops)


STORED = {"": {}, "int8": {"int8": True}, "float8": {"float8": True}}
FORMS = {"contiguous": {}, "pages of 16": {"page": 16}, "pages of 3": {"page": 3}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("append", [True, False], ids=["append", "given"])
def test_matches_float64(dtype, stored, form, append):
    # (B, Hk, group, Lq, capacity, D, Dv): copies of 16 bytes and single numbers, tails of rows, tiles and parts.
    for shape in [(2, 1, 1, 1, 150, 64, 64), (1, 1, 3, 7, 90, 40, 24), (1, 2, 2, 1, 20, 33, 1)]:
        lengths = None if append else torch.randint(shape[3], shape[4] + 1, shape[:1]).tolist()
        case = Case(*shape, dtype, append=append, lengths=lengths, **STORED[stored], **FORMS[form])
        case.check()
        case.check(scale=0.3, **tables(shape[4], shape[5] // 2 * 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, dtype):
    options = dict(RULES[rule])
    starts = options.pop("starts", None)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(3, 2) * 0.2
    Case(3, 1, 2, 2, 70, 16, 24, dtype, starts=starts, lengths=[0, 20, 53]).check(**options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
def test_every_width(dtype, stored):
    for dim, value_dim in ((128, 64), (72, 128), (256, 40), (200, 256)):
        Case(1, 1, 2, 1, 50, dim, value_dim, dtype, lengths=[37], **STORED[stored]).check()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [6, 34, 70])
def test_rotary(interleaved, rotary_dim):
    for stored in STORED.values():
        case = Case(3, 1, 2, 2, 30, 70, 16, torch.float16, lengths=[0, 11, 28], **stored)
        case.check(rotary_interleaved=interleaved, **tables(30, rotary_dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_float8(dtype):
    """Each of the 256 is read as torch reads it, and each of those between them is rounded as torch rounds it."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()]
    cache = torch.zeros(1, 1, 256, 16, dtype=torch.float8_e4m3fn)
    cache[0, 0, : len(numbers), 0] = numbers
    scales = torch.ones(1, 1, 256)
    for i in range(0, len(numbers), 23):  # each query row sees one key, so that its value is the result
        call = torch.zeros(1, 1, 1, 16, dtype=dtype), cache.clone(), cache, torch.tensor([i + 1])
        out, _ = cpu.decode(*call, key_scales=scales, value_scales=scales, kv_starts=torch.tensor([i]))
        assert out[0, 0, 0, 0].item() == numbers[i].item()
    cache[0, 0, 0, 0] = math.nan
    call = torch.zeros(1, 1, 1, 16, dtype=dtype), cache.clone(), cache, torch.tensor([1])
    assert cpu.decode(*call, key_scales=scales, value_scales=scales)[0][0, 0, 0, 0].isnan()

    halves = torch.cat([(numbers.float()[:-1] + numbers.float()[1:]) / 2, torch.tensor([448.0])])  # ties, too
    new = torch.cat([halves, halves.nextafter(torch.tensor(1e3)), halves.nextafter(torch.tensor(-1e3))])
    new = new[new.abs() <= 448].to(dtype)
    new = torch.cat([new, new.new_full((-len(new) % 15,), 0)]).view(1, 1, -1, 15)
    new = torch.cat([new, new.new_full((*new.shape[:3], 1), 448)], -1)  # the scale is 1
    caches = torch.zeros(2, *new.shape).to(torch.float8_e4m3fn)
    scales = torch.zeros(2, *new.shape[:3])
    cpu.decode(
        new, *caches, torch.tensor([0]), key=new, value=-new, key_scales=scales[0], value_scales=scales[1]
    )  # fmt: skip
    assert scales.eq(1).all()
    assert torch.equal(caches[0].float(), new.to(torch.float8_e4m3fn).float())
    assert torch.equal(caches[1].float(), -caches[0].float())


def test_parts_are_combined():
    """Several blocks to a head, some of which see nothing, in rows that are more than a block's."""
    Case(1, 1, 5, 5, 900, 16, 16, torch.bfloat16, lengths=[890]).check()
    Case(1, 1, 2, 1, 900, 16, 24, torch.float16, int8=True, page=32, starts=[500], lengths=[899]).check()
    case = Case(1, 1, 2, 2, 900, 16, 24, torch.float32, lengths=[700])
    case.check(window_left=80)
    results = [case.call()[2] for _ in range(3)]  # in another order of blocks and threads
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_rows_that_see_nothing_are_zero_and_sizes_of_zero():
    case = Case(2, 2, 2, 3, 20, 16, 12, torch.bfloat16, append=False, lengths=[0, 2])
    out, lse = case.call()[2]
    assert out[0].eq(0).all() and lse[0].eq(-math.inf).all() and out[1, :, 0].eq(0).all()
    empty = torch.zeros(2, 2, 0, 8)
    out, lse = cpu.decode(torch.randn(2, 4, 1, 8), empty, empty, torch.zeros(2, dtype=torch.int64))
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    assert cpu.decode(torch.randn(0, 4, 1, 8), empty[:0], empty[:0], torch.zeros(0, dtype=torch.int64))[0].numel() == 0


def test_lengths_that_do_not_fit_leave_the_cache_alone():
    """Lengths are not read before, so that nothing waits for the GPU: what lies outside is not written."""
    case = Case(1, 1, 1, 2, 20, 16, 16, torch.float32, lengths=[3])
    for length in (-5, 19, 20, 2**40):
        caches = [cache.clone() for cache in case.caches]
        options = {name: case.options[name] for name in ("key", "value")}
        cpu.decode(case.query, *caches, torch.tensor([length]), **options)
        written = 19 if length == 19 else 20
        for cache, before in zip(caches, case.caches, strict=True):
            assert torch.equal(cache[:, :, :written].nan_to_num(7), before[:, :, :written].nan_to_num(7))


@pytest.mark.parametrize("name", ["key_cache", "kv_lengths"])
def test_bad_calls_name_the_argument(name):
    call = {
        "query": torch.zeros(2, 4, 2, 8),
        "key_cache": torch.zeros(2, 2, 9, 8),
        "value_cache": torch.zeros(2, 2, 9, 8),
        "kv_lengths": torch.tensor([0, 4]),
    }
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        cpu.decode(**call | {name: call[name][:1]})
    with pytest.raises(RuntimeError, match="at most 256"):
        cpu.decode(torch.zeros(1, 1, 1, 260), *[torch.zeros(1, 1, 9, 260)] * 2, torch.tensor([1]))
