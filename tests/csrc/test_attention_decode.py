"""The native decoding kernel, called directly, against the definition in float64."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("needs_native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEFAULTS = {
    "key": None,
    "value": None,
    "block_table": None,
    "cos": None,
    "sin": None,
    "rotary_interleaved": False,
    "key_scales": None,
    "value_scales": None,
    "scale": None,
    "kv_starts": None,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def decode(query, key_cache, value_cache, kv_lengths, **options):
    """The op with defaults for what a test does not care about."""
    assert options.keys() <= DEFAULTS.keys()
    arguments = DEFAULTS | {"scale": 1 / math.sqrt(max(query.shape[-1], 1))} | options
    return torch.ops.gpt4fast.attention_decode(query, key_cache, value_cache, kv_lengths, *arguments.values())


def definition(query, keys, values, starts, ends, *, dtype=torch.float64, scale=None, kv_starts=None, window_left=-1,
               window_right=-1, softcap=0.0, alibi_slopes=None):  # fmt: skip
    """Attention in plain torch, computed in dtype: row b's queries at starts[b] and after, its keys up to ends[b]."""
    group = query.shape[1] // keys.shape[1]
    i = (torch.arange(query.shape[2]) + starts[:, None])[:, None, :, None]
    j = torch.arange(keys.shape[2])
    visible = (j <= i) & (j < ends.view(-1, 1, 1, 1))
    if kv_starts is not None:
        visible &= j >= kv_starts.view(-1, 1, 1, 1)
    if window_left >= 0:
        visible &= j >= i - window_left
    if window_right >= 0:
        visible &= j <= i + window_right
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = query @ keys.mT * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, :, None, None] * (i - j).abs().to(dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    weights = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0)
    return weights @ values, scores.logsumexp(-1)


def rotated(x: Tensor, starts: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """(B, H, L, D) in float64, the tokens of row b at positions starts[b] and after, turned as complex numbers."""
    x = x.double()
    if cos is None:
        return x
    half = cos.shape[1]
    positions = starts[:, None] + torch.arange(x.shape[2])
    factors = torch.complex(cos.double(), sin.double())[positions][:, None]
    pairs = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    if not interleaved:
        pairs = slice(0, half), slice(half, 2 * half)
    turned = torch.complex(x[..., pairs[0]], x[..., pairs[1]]) * factors
    out = x.clone()
    out[..., pairs[0]], out[..., pairs[1]] = turned.real, turned.imag
    return out


def as_numbers(x: Tensor) -> Tensor:
    """Comparable: float8, which torch computes little with, in float32, and 7 for NaN."""
    return (x.float() if x.dtype == torch.float8_e4m3fn else x).nan_to_num(7.0)


def tables(positions: int, rotary_dim: int) -> dict:
    angles = torch.rand(positions, rotary_dim // 2) * 2 * math.pi
    return {"cos": angles.cos(), "sin": angles.sin()}


class Case:
    """Caches with NaN wherever nobody may look, as the op takes them, and a float64 view of what they hold."""

    ROUNDED_QUERY = {torch.bfloat16: 5e-2}  # error of the lse where a rotated query is rounded before it is multiplied

    def __init__(self, batch, kv_heads, group, new, capacity, dim, value_dim, dtype, *, int8=False, float8=False,
                 page=None, append=True, lengths=None, starts=None):  # fmt: skip
        self.dtype, self.new, self.append, self.page = dtype, new, append, page
        self.largest = 448 if float8 else 127  # of a cache with scales
        self.query = torch.randn(batch, kv_heads * group, new, dim).to(dtype)
        most = capacity - new if append else capacity
        lengths = torch.randint(0, most + 1, (batch,)).tolist() if lengths is None else lengths
        self.lengths = torch.tensor(lengths, dtype=torch.int64)
        self.ends = self.lengths + new if append else self.lengths
        self.offsets = self.ends - new
        self.options = {} if starts is None else {"kv_starts": torch.tensor(starts)}
        self.table = None
        if page is not None:
            count = -(-capacity // page)
            order = torch.randperm(batch * count + 2)
            self.table = self.options["block_table"] = order[: batch * count].view(batch, count)
        j = torch.arange(capacity)
        seen = j < self.lengths[:, None]
        if starts is not None:
            seen &= j >= self.options["kv_starts"][:, None]
        self.caches = []
        for name, columns in (("key", dim), ("value", value_dim)):
            dense = torch.randn(batch, kv_heads, capacity, columns)
            if int8 or float8:
                dense = torch.randint(-127, 128, dense.shape, dtype=torch.int8)
                if float8:  # any but its NaN, which is 127 and -1
                    dense = dense.where(dense != -1, 0).clamp(max=126).view(torch.float8_e4m3fn)
                scales = torch.where(seen[:, None], torch.rand(dense.shape[:3]) / 60, math.nan)
                self.options[f"{name}_scales"] = self.to_pages(scales)
            else:
                dense = torch.where(seen[:, None, :, None], dense, math.nan).to(dtype)
            self.caches.append(self.to_pages(dense))
            if append:
                self.options[name] = torch.randn(batch, kv_heads, new, columns).to(dtype)

    def to_pages(self, dense: Tensor) -> Tensor:
        if self.table is None:
            return dense
        batch, count = self.table.shape
        pool = torch.full((batch * count + 2, dense.shape[1], self.page, *dense.shape[3:]), 99).to(dense.dtype)
        if dense.is_floating_point():
            pool.fill_(math.nan)
        for b, i in itertools.product(range(batch), range(count)):
            part = dense[b, :, i * self.page : (i + 1) * self.page]
            pool[self.table[b, i], :, : part.shape[1]] = part
        return pool

    def dense(self, paged: Tensor) -> Tensor:
        return paged if self.table is None else paged[self.table].transpose(1, 2).flatten(2, 3)

    def contents(self, caches, options) -> list[Tensor]:
        """Keys and values as float64, zero where there is NaN."""
        result = []
        for cache, name in zip(caches, ("key_scales", "value_scales"), strict=True):
            dense = self.dense(cache).double()
            if options.get(name) is not None:
                dense = dense * self.dense(options[name]).double()[..., None]
            result.append(dense.nan_to_num(0.0))
        return result

    def call(self, **options):
        """Copies of the caches and options, and what the op returned for them."""
        caches = [x.clone() for x in self.caches]
        options = self.options | options
        options |= {n: options[n].clone() for n in ("key_scales", "value_scales") if options.get(n) is not None}
        return caches, options, decode(self.query, *caches, self.lengths, **options)

    def check(self, **options):
        caches, options, (out, lse) = self.call(**options)
        self.check_caches(caches, options)
        rotary = options.get("cos"), options.get("sin"), options.get("rotary_interleaved", False)
        query = rotated(self.query, self.offsets, *rotary) if rotary[0] is not None else self.query
        rules = {n: options[n] for n in ("kv_starts", "window_left", "window_right", "softcap", "alibi_slopes", "scale")
                 if n in options}  # fmt: skip
        inputs = (*self.contents(caches, options), self.offsets, self.ends)
        expected, expected_lse = definition(query, *inputs, **rules)
        plain, _ = definition(query.to(self.dtype), *inputs, dtype=self.dtype, **rules)
        assert out.dtype == self.dtype and out.shape == expected.shape
        assert lse.dtype == torch.float32 and lse.shape == expected_lse.shape
        error = (out.double() - expected).norm().item()
        # On top, for results so few that torch happens to be exact: one rounding of what is added up, and one of the
        # exponents in the weights, which is as large as they are and averages out over many rows.
        keys, values, *positions = inputs
        magnitude, _ = definition(query, keys, values.abs(), *positions, **rules)
        exponents = expected_lse.nan_to_num(neginf=0.0).abs().unsqueeze(-1)
        roundings = magnitude * (1 + (1 + exponents) / math.sqrt(max(exponents.numel(), 1)))
        allowed = 2 * (plain.double() - expected).norm().item() + torch.finfo(self.dtype).eps * roundings.norm().item()
        assert error <= allowed, f"{error} from float64, allowed {allowed}"
        slack = self.ROUNDED_QUERY.get(self.dtype, 0) if rotary[0] is not None else 0
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5 + slack)
        return out, lse

    def check_caches(self, caches, options):
        """Nothing but the new tokens was written, and these are what they should be."""
        rotary = options.get("cos"), options.get("sin"), options.get("rotary_interleaved", False)
        names = ["key", "value", "key_scales", "value_scales"]
        befores = [*self.caches, self.options.get(names[2]), self.options.get(names[3])]
        afters = [*caches, options.get(names[2]), options.get(names[3])]
        for name, before, after in zip(names, befores, afters, strict=True):
            if before is None:
                continue
            expected = before.clone()
            if self.append:
                kind = name.split("_")[0]
                new = rotated(options[kind], self.offsets, *(rotary if kind == "key" else (None, None, False)))
                stored = torch.stack([self.dense(after)[b, :, n : n + self.new] for b, n in enumerate(self.lengths)])
                scales = F.pad(new.float(), (0, 1)).abs().amax(-1) / self.largest
                scales = scales.masked_fill(scales == 0, 1)
                exact = rotary[0] is None or kind == "value"
                if name.endswith("scales"):
                    torch.testing.assert_close(stored, scales, rtol=0 if exact else 1e-5, atol=0)
                elif before.dtype == torch.int8:
                    quotient = new.float() / scales[..., None]
                    if exact:
                        assert torch.equal(stored, quotient.round().to(torch.int8))
                    assert (stored - quotient).abs().max() <= 0.501
                elif before.dtype == torch.float8_e4m3fn:
                    quotient = new.float() / scales[..., None]
                    if exact:
                        assert torch.equal(stored.float(), quotient.to(torch.float8_e4m3fn).float())
                    torch.testing.assert_close(stored.float(), quotient, rtol=1 / 15, atol=1 / 1000)
                else:
                    eps = torch.finfo(self.dtype).eps
                    tolerance = 0 if exact else 1e-6 if eps < 1e-6 else eps / 2 + 1e-5
                    torch.testing.assert_close(stored.double(), new, rtol=tolerance, atol=0 if exact else 1e-6)
                self.write_dense(expected, stored)
            assert torch.equal(as_numbers(expected), as_numbers(after))

    def write_dense(self, cache, new):
        for b, n in itertools.product(range(len(new)), range(self.new)):
            at = int(self.lengths[b]) + n
            row, within = (b, at) if self.table is None else (self.table[b, at // self.page], at % self.page)
            cache[row, :, within] = new[b, :, n]


FORMS = {
    "contiguous": {},
    "pages of 16": {"page": 16},
    "pages of 3": {"page": 3},
    "pages of 1": {"page": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("append", [True, False], ids=["append", "given"])
def test_matches_float64(dtype, int8, form, append):
    # (B, Hk, group, Lq, capacity, D, Dv): tails of all blocks, many and few rows, Dv != D.
    shapes = [
        (2, 3, 1, 1, 150, 64, 64),
        (3, 2, 4, 1, 300, 128, 128),
        (2, 1, 7, 2, 70, 40, 24),
        (1, 2, 5, 9, 40, 7, 3),
        (2, 1, 2, 3, 20, 33, 1),
    ]
    for shape in shapes:
        lengths = None if append else torch.randint(shape[3], shape[4] + 1, shape[:1]).tolist()
        case = Case(*shape, dtype, int8=int8, append=append, lengths=lengths, **FORMS[form])
        case.check()
        case.check(scale=0.3, **tables(shape[4], shape[5] // 2 * 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [2, 6, 24, 34, 64, 70])
def test_rotary(dtype, interleaved, rotary_dim):
    for int8 in (False, True):
        case = Case(3, 2, 3, 2, 30, 70, 16, dtype, int8=int8, lengths=[0, 11, 28])
        case.check(rotary_interleaved=interleaved, **tables(30, rotary_dim))


RULES = {
    "plain": {},
    "scale": {"scale": 0.37},
    "negative scale": {"scale": -0.2},
    "starts": {"starts": [0, 3, 50]},
    "starts out of range": {"starts": [-5, 2**62, 49]},
    "window": {"window_left": 9, "window_right": 0},
    "window of one": {"window_left": 0},
    "wide window": {"window_left": 2**62, "window_right": 2**62},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": None},
    "all": {"starts": [0, 3, 30], "window_left": 33, "softcap": 2.0, "alibi_slopes": None, "scale": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("new", [1, 2, 17])
def test_rules_of_visibility_and_scores(dtype, rule, group, new):
    for int8, page in ((False, None), (True, 8)):
        options = dict(RULES[rule])
        starts = options.pop("starts", None)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = torch.rand(3, 2 * group) * 0.2
        for lengths, append in (([0, 20, 53], True), ([0, 20, 70], False)):
            Case(3, 2, group, new, 70, 16, 24, dtype, int8=int8, page=page, append=append, starts=starts,
                 lengths=lengths).check(**options)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_caches_are_split(dtype):
    """Many tasks, whose sums are combined; some of them see nothing."""
    for options in ({}, {"window_left": 700}, {"softcap": 5.0}):
        Case(2, 1, 2, 2, 3000, 16, 16, dtype, lengths=[2998, 1300]).check(**options)
        Case(2, 2, 1, 1, 3000, 16, 16, dtype, int8=True, page=32, starts=[1000, 2900], lengths=[2999, 3]).check(
            **options
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype):
    Case(1, 2, 4, 50, 400, 24, 16, dtype, lengths=[300]).check()
    Case(1, 1, 1, 90, 90, 24, 16, dtype, lengths=[0]).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """(B, L, H, D) storage, misaligned starts, steps in every dimension: the bits of contiguous tensors."""
    case = Case(2, 2, 2, 2, 150, 24, 16, dtype, lengths=[140, 60])
    case8 = Case(2, 2, 2, 2, 150, 24, 16, dtype, int8=True, lengths=[140, 60])
    rotary = tables(150, 24)

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def misaligned(x):
        storage = torch.empty(x.numel() + 1, dtype=x.dtype)
        return storage[1:].view(x.shape).copy_(x)

    def stepped(x):
        storage = torch.empty(*(2 * size for size in x.shape), dtype=x.dtype)
        return storage[tuple(slice(i % 2, None, 2) for i in range(x.dim()))].copy_(x)

    def columns_first(x):
        return x.mT.contiguous().mT

    for c, layout in itertools.product((case, case8), (transposed, misaligned, stepped, columns_first)):
        caches, options, expected = c.call(**rotary)
        changed = [layout(x) for x in c.caches]
        names = ("key", "value", "key_scales", "value_scales")
        strided = c.options | rotary | {n: layout(c.options[n]) for n in names if n in c.options}
        got = decode(layout(c.query), *changed, c.lengths, **strided)
        assert all(map(torch.equal, got, expected))
        for name in names[2:]:
            if name in strided:
                assert torch.equal(strided[name].nan_to_num(7.0), options[name].nan_to_num(7.0))
        for after, wanted in zip(changed, caches, strict=True):
            assert torch.equal(after.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [1, 5, 64])
def test_paged_caches_give_the_bits_of_contiguous_ones(dtype, page):
    case = Case(2, 2, 2, 3, 200, 24, 16, dtype, page=page, lengths=[190, 60])
    _, _, got = case.call()
    dense = [case.dense(x) for x in case.caches]
    expected = decode(case.query, *dense, case.lengths, key=case.options["key"], value=case.options["value"])
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_only_other_queries_see_does_not_matter(dtype, bad):
    case = Case(1, 2, 3, 5, 90, 16, 12, dtype, append=False, lengths=[90])
    expected, expected_lse = case.call()[2]
    for cache in case.caches:
        cache[:, :, -2] = bad
    out, lse = case.call()[2]
    assert torch.equal(out[:, :, :3], expected[:, :, :3]) and torch.equal(lse[..., :3], expected_lse[..., :3])
    assert not out[:, :, 3:].isfinite().any()
    # Queries whose window begins behind the bad entry.
    out, _ = case.call(window_left=0)[2]
    assert out[:, :, [0, 1, 2, 4]].isfinite().all() and not out[:, :, 3].isfinite().any()


def test_a_value_of_nan_reaches_its_column_only():
    case = Case(1, 1, 1, 1, 300, 16, 20, torch.float32, append=False, lengths=[300])
    case.caches[1][0, 0, 7, 3] = case.caches[1][0, 0, 299, 19] = math.nan
    out, _ = case.call()[2]
    assert out.isnan().flatten().nonzero().flatten().tolist() == [3, 19]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_zero(dtype):
    for page in (None, 4):
        case = Case(2, 2, 2, 3, 20, 16, 12, dtype, append=False, lengths=[0, 2], page=page)
        out, lse = case.call()[2]
        assert out[0].eq(0).all() and lse[0].eq(-math.inf).all()
        assert out[1, :, 0].eq(0).all() and lse[1, :, 0].eq(-math.inf).all() and lse[1, :, 1:].isfinite().all()
        case.options["kv_starts"] = torch.tensor([0, 2])
        out, lse = case.call()[2]
        assert out.eq(0).all() and lse.eq(-math.inf).all()


def test_quantization_of_special_rows():
    caches = [torch.zeros(1, 1, 8, 4, dtype=torch.int8) for _ in range(2)]
    scales = {"key_scales": torch.zeros(1, 1, 8), "value_scales": torch.zeros(1, 1, 8)}
    rows = [[0.0, -0.0, 0, 0], [127, -127, 0.5, 1.5], [2.5, -254, -1, 1], [1e-45, 0, 0, 0], [math.nan, 1, 2, 3]]
    new = torch.tensor(rows)[None, None]
    decode(torch.zeros(1, 1, 5, 4), *caches, torch.tensor([1]), key=new, value=new, **scales)
    for cache, scale in zip(caches, scales.values(), strict=True):
        assert cache[0, 0, 1:5].tolist() == [[0, 0, 0, 0], [127, -127, 0, 2], [1, -127, 0, 0], [0, 0, 0, 0]]
        assert scale[0, 0, :5].tolist() == [0, 1, 1, 2, 1] and scale[0, 0, 5].isnan()
        assert not cache[0, 0, [0, 6, 7]].any() and scale[0, 0, 6:].tolist() == [0, 0]


def test_extreme_scores():
    case = Case(1, 2, 1, 1, 600, 8, 8, torch.float32, append=False, lengths=[600])
    for scale in (1e4, -1e4, 0.0, 1e-30):
        out, lse = case.call(scale=scale)[2]
        expected, expected_lse = definition(case.query, *case.caches, case.offsets, case.ends, scale=scale)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    case.query.fill_(1.0)
    case.caches[0].copy_(torch.linspace(0, 1, 600).view(-1, 1).expand(-1, 8))
    for scale in (10.0, 100.0, -100.0):  # each tile raises the maximum, or none after the first
        expected, _ = definition(case.query, *case.caches, case.offsets, case.ends, scale=scale)
        torch.testing.assert_close(case.call(scale=scale)[2][0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype):
    cases = [
        Case(1, 12, 1, 1, 1000, 64, 64, dtype, lengths=[999]),
        Case(1, 2, 7, 1, 2100, 64, 64, dtype, lengths=[2050]),
        Case(5, 2, 2, 3, 700, 32, 32, dtype, int8=True, page=16),
    ]
    threads_before = torch.get_num_threads()
    try:
        for case in cases:
            results = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                results.append(case.call()[2])
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(threads_before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_every_head_dimension_at_every_level(level, dtype, int8):
    for dim in [*range(1, 40), 63, 64, 65, 80, 96, 127, 128, 129, 130, 256]:
        Case(1, 2, 2, 1, 50, dim, 131 - dim if dim < 131 else dim, dtype, int8=int8, lengths=[37]).check()
    for group in range(1, 9):  # every block of query rows
        for dim in (64, 128, 48):
            Case(1, 1, group, 1, 70, dim, dim, dtype, int8=int8, page=32, lengths=[64]).check(**tables(70, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [*range(1, 36), 127, 128, 129, 511, 512, 513, 527, 528, 529, 1024, 1025])
def test_every_number_of_keys(dtype, keys):
    """Tails of vectors, pairs, tiles and tasks, with starts in the middle of vectors, in caches that end there."""
    Case(1, 1, 2, 1, keys, 40, 24, dtype, append=False, lengths=[keys]).check()
    Case(2, 1, 1, 1, keys, 40, 24, dtype, append=False, lengths=[keys, keys], starts=[keys // 2, keys - 1]).check()
    Case(1, 1, 1, 1, keys, 40, 24, dtype, int8=True, page=16, lengths=[keys - 1], starts=[keys // 3]).check()


def test_nothing_outside_the_caches_is_read():
    """Caches that end where readable memory ends."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    for dtype, keys, dim in itertools.product((*DTYPES, torch.int8), (1, 5, 16, 37), (1, 7, 33, 64)):
        tensors = []
        for _ in range(2):
            size = keys * dim * dtype.itemsize
            area = mmap.mmap(-1, (size // page + 2) * page)
            whole = torch.frombuffer(area, dtype=torch.uint8)
            assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + len(area) - page), page, 0) == 0
            part = whole[len(area) - page - size : len(area) - page]
            tensors.append(part.view(dtype).view(1, 1, keys, dim))
        scales = torch.ones(1, 1, keys) if dtype == torch.int8 else None
        query = torch.ones(1, 3, 1, dim, dtype=torch.float32 if dtype == torch.int8 else dtype)
        lengths = torch.tensor([keys])
        out, _ = decode(query, *tensors, lengths, key_scales=scales, value_scales=scales)
        assert out.eq(0).all()


def test_sizes_of_zero():
    for axis, name in enumerate(("batch", "heads", "new", "dim", "value_dim")):
        sizes = [2, 2, 2, 8, 6]
        sizes[axis] = 0
        batch, heads, new, dim, value_dim = sizes
        case = Case(batch, heads, 1, new, 20, dim, value_dim, torch.float32, lengths=[3] * batch)
        caches, options, (out, lse) = case.call()
        assert out.shape == (batch, heads, new, value_dim) and lse.shape == (batch, heads, new)
        if batch:
            case.check_caches(caches, options)
        if name == "dim":  # every score is 0
            expected = torch.arange(4.0, 4.0 + new).log().expand_as(lse)
            torch.testing.assert_close(lse, expected)
    empty = torch.zeros(2, 2, 0, 8)
    out, lse = decode(torch.randn(2, 4, 1, 8), empty, empty, torch.zeros(2, dtype=torch.int64))
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    table = torch.zeros(2, 0, dtype=torch.int64)
    out, lse = decode(torch.randn(2, 4, 1, 8), empty, empty, torch.zeros(2, dtype=torch.int64), block_table=table)
    assert out.eq(0).all() and lse.eq(-math.inf).all()


def bad_calls():
    """By the argument that is named: what to change in a good call."""
    zeros, longs = torch.zeros, lambda *x: torch.zeros(*x, dtype=torch.int64)
    k, s, pos = zeros(2, 2, 9, 8), zeros(2, 2, 9), zeros(9, 4)
    int8 = {"key_cache": k.to(torch.int8), "value_cache": k.to(torch.int8), "key_scales": s, "value_scales": s}
    pages = {"key_cache": zeros(5, 2, 3, 8), "value_cache": zeros(5, 2, 3, 8)}
    rotary = {"cos": pos, "sin": pos}
    return {
        "query": [
            {"query": zeros(4, 2, 8)}, {"query": zeros(2, 4, 2, 8).double()}, {"query": zeros(2, 3, 2, 8)},
            {"query": zeros(2, 4, 2, 8, dtype=torch.int8)}, {"query": zeros(2, 0, 2, 8)},
        ],
        "key_cache": [
            {"key_cache": k[0]}, {"key_cache": k.half()}, {"key_cache": k[:1]}, {"key_cache": k[..., :7]},
            {"key_cache": k.double()},
            int8 | {name: k.to(torch.float8_e4m3fn) for name in ("key_cache", "value_cache")},
        ],
        "value_cache": [
            {"value_cache": k[0]}, {"value_cache": k.half()}, {"value_cache": k[:1]}, {"value_cache": k[:, :1]},
            {"value_cache": k[:, :, :4]}, int8 | {"value_cache": k},
        ],
        "kv_lengths": [
            {"kv_lengths": zeros(2)}, {"kv_lengths": longs(1)}, {"kv_lengths": longs(1).expand(2)},
            {"kv_lengths": torch.tensor([0, -1])}, {"kv_lengths": torch.tensor([0, 8])},
            {"kv_lengths": torch.tensor([0, 2**63 - 1])},
            {"kv_lengths": torch.tensor([3, 10]), "key": None, "value": None},
            rotary | {"kv_lengths": torch.tensor([3, 1]), "key": None, "value": None},
            {"cos": pos[:5], "sin": pos[:5], "kv_lengths": torch.tensor([0, 4])},
        ],
        "key": [
            {"key": None}, {"key": zeros(2, 2, 2, 8).half()}, {"key": zeros(2, 2, 1, 8)}, {"key": zeros(2, 2, 2, 7)},
            {"key": zeros(2, 4, 2, 8)},
        ],
        "value": [{"value": None}, {"value": zeros(2, 2, 2, 7)}, {"value": zeros(1, 2, 2, 8)}],
        "block_table": [
            pages | {"block_table": longs(2, 3).int()}, pages | {"block_table": longs(1, 3)},
            pages | {"block_table": longs(2)}, pages | {"block_table": longs(3, 2).T},
            pages | {"block_table": torch.tensor([[0, 1, 2], [0, -1, 0]])},
            pages | {"block_table": torch.tensor([[5, 0, 0], [0, 1, 0]])},
        ],
        "cos": [
            rotary | {"cos": None}, rotary | {"cos": pos.double()}, rotary | {"cos": pos.T}, rotary | {"cos": pos[0]},
            {"cos": zeros(9, 5), "sin": zeros(9, 5)}, {"cos": zeros(4, 9).T, "sin": pos},
        ],
        "sin": [rotary | {"sin": None}, rotary | {"sin": pos[:8]}, rotary | {"sin": zeros(9, 8)[:, ::2]}],
        "key_scales": [
            int8 | {"key_scales": None}, int8 | {"key_scales": s.half()}, int8 | {"key_scales": s[..., :8]},
            {"key_scales": s, "value_scales": s},
        ],
        "value_scales": [int8 | {"value_scales": None}, int8 | {"value_scales": s[:1]}],
        "kv_starts": [{"kv_starts": longs(2).int()}, {"kv_starts": longs(3)}],
        "window_left": [{"window_left": -2}],
        "window_right": [{"window_right": -(2**63)}],
        "alibi_slopes": [
            {"alibi_slopes": zeros(4)}, {"alibi_slopes": zeros(2, 4).half()}, {"alibi_slopes": zeros(2, 2)},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, calls in bad_calls().items() for i in range(len(calls))])
def test_bad_direct_calls_raise_and_write_nothing(name, index):
    call = {
        "query": torch.zeros(2, 4, 2, 8),
        "key_cache": torch.zeros(2, 2, 9, 8),
        "value_cache": torch.zeros(2, 2, 9, 8),
        "kv_lengths": torch.tensor([0, 4]),
        "key": torch.ones(2, 2, 2, 8),
        "value": torch.ones(2, 2, 2, 8),
    }
    decode(**{n: x.clone() for n, x in call.items()})
    call |= bad_calls()[name][index]
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        decode(**call)
    for written in ("key_cache", "value_cache", "key_scales", "value_scales"):
        assert call.get(written) is None or not call[written].any()


@given(data=st.data())
def test_random_calls(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    batch, kv_heads = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 3), "kv_heads")
    group = data.draw(st.integers(1, 9), "group")
    new = data.draw(st.one_of(st.just(1), st.integers(1, 20)), "new")
    capacity = new + data.draw(st.one_of(st.integers(0, 40), st.integers(0, 700)), "more")
    dim, value_dim = data.draw(st.integers(1, 140), "dim"), data.draw(st.integers(1, 140), "value_dim")
    append = data.draw(st.booleans(), "append")
    options = {}
    if data.draw(st.booleans(), "rotary"):
        options = tables(capacity, data.draw(st.integers(0, dim // 2), "half") * 2)
        options["rotary_interleaved"] = data.draw(st.booleans(), "interleaved")
    lengths = torch.randint(0 if append else new, (capacity - new if append else capacity) + 1, (batch,)).tolist()
    starts = torch.randint(-3, capacity + 3, (batch,)).tolist() if data.draw(st.booleans(), "starts") else None
    if data.draw(st.booleans(), "window"):
        options |= {"window_left": data.draw(st.integers(-1, 50)), "window_right": data.draw(st.integers(-1, 2))}
    if data.draw(st.booleans(), "softcap"):
        options["softcap"] = 2.0
    if data.draw(st.booleans(), "alibi"):
        options["alibi_slopes"] = torch.rand(1, kv_heads * group).expand(batch, -1) * 0.1
    case = Case(batch, kv_heads, group, new, capacity, dim, value_dim, data.draw(st.sampled_from(DTYPES), "dtype"),
                int8=data.draw(st.booleans(), "int8"), append=append, lengths=lengths, starts=starts,
                page=data.draw(st.sampled_from([None, 1, 7, 16, 48]), "page"))  # fmt: skip
    case.check(**options)
