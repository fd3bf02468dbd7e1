"""``attention`` on every CPU implementation against float64: values, gradients, second gradients, edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import CPU_IMPLEMENTATIONS, available, naive_attention
from torch.nn import functional as F

import gpt4fast

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="not built"))
    for name in CPU_IMPLEMENTATIONS
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# (B, Hq, Hk, Lq, Lk, D, Dv): odd sizes, tails, grouped heads, one query, long enough to cross a block
SHAPES = [(2, 4, 2, 5, 7, 8, 6), (1, 3, 3, 33, 65, 17, 16), (2, 6, 1, 1, 130, 64, 64), (1, 2, 2, 70, 70, 33, 1)]


def features(batch, heads, rows, columns) -> dict[str, dict]:
    """Every argument that changes the result, alone and together; tensors fresh each call."""
    lengths = torch.randint(1, columns + 1, (batch,))
    additive = torch.randn(1, heads, rows, columns).masked_fill(torch.rand(1, heads, rows, columns) < 0.2, -math.inf)
    slopes = torch.rand(heads)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "offset": {"is_causal": True, "query_offset": columns - rows},
        "offsets": {"is_causal": True, "query_offset": torch.randint(-3, columns, (batch,))},
        "lengths": {"kv_lengths": lengths},
        "starts": {"kv_starts": torch.randint(0, columns, (batch,)), "kv_lengths": torch.full((batch,), columns)},
        "sees nothing": {"kv_lengths": torch.zeros(batch, dtype=torch.int64)},
        "window": {"window": (3, 2)},
        "left window": {"window": (4, -1), "is_causal": True},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": slopes, "query_offset": 2},
        "alibi per row": {"alibi_slopes": torch.rand(batch, heads)},
        "bool mask": {"attn_mask": torch.rand(batch, heads, rows, columns) < 0.6},
        "key padding mask": {"attn_mask": torch.rand(batch, 1, 1, columns) < 0.6},
        "2-D mask": {"attn_mask": torch.rand(rows, columns) < 0.6},
        "row mask": {"attn_mask": torch.rand(heads, rows, 1) < 0.6},
        "float mask": {"attn_mask": additive},
        "float mask, causal": {"attn_mask": torch.randn(batch, 1, rows, columns), "is_causal": True},
        "all": {
            "attn_mask": additive, "is_causal": True, "query_offset": torch.randint(0, columns, (batch,)), "scale": 0.7,
            "kv_lengths": lengths, "kv_starts": torch.randint(0, 2, (batch,)), "window": (9, 4), "softcap": 2.0,
            "alibi_slopes": slopes,
        },
    }  # fmt: skip


FEATURES = list(features(1, 1, 1, 1))


def operands(shape, dtype, requires_grad=False):
    batch, heads, kv_heads, rows, columns, head_dim, value_dim = shape
    sizes = (
        (batch, heads, rows, head_dim),
        (batch, kv_heads, columns, head_dim),
        (batch, kv_heads, columns, value_dim),
    )
    return [torch.randn(size).to(dtype).requires_grad_(requires_grad) for size in sizes]


def arguments(feature, shape, dtype):
    """The arguments of one feature, masks in a dtype that suits the operands."""
    found = features(shape[0], shape[1], shape[3], shape[4])[feature]
    mask = found.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        found["attn_mask"] = mask.to(dtype)
    return found


def serves(impl, kwargs, return_lse=False) -> bool:
    return impl != "torch" or not (kwargs.get("softcap") or return_lse)


def torch_error(query, key, value, kwargs, expected) -> float:
    """Largest error of torch's own computation in the operands' dtype: the bound on ours is twice that."""
    if kwargs.get("softcap"):
        return 0.0
    out = gpt4fast.attention(query, key, value, **kwargs, impl="torch")
    return (out.double() - expected).abs().max().item()


FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def exact_attention(query, key, value, **kwargs):
    """The reference in float64: itself tested against the naive loops, and quick enough for larger shapes."""
    return gpt4fast.attention(query.double(), key.double(), value.double(), **kwargs, return_lse=True, impl="reference")


@pytest.mark.parametrize("feature", FEATURES)
def test_reference_is_the_definition(feature):
    for shape in [(2, 4, 2, 5, 7, 8, 6), (1, 2, 1, 1, 11, 3, 4), (1, 2, 2, 8, 3, 4, 4)]:
        query, key, value = operands(shape, torch.float64)
        kwargs = arguments(feature, shape, torch.float64)
        for got, truth in zip(
            exact_attention(query, key, value, **kwargs), naive_attention(query, key, value, **kwargs), strict=True
        ):
            torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(impl, feature, dtype):
    if impl == "native" and dtype == torch.float64:
        pytest.skip("float64 runs on the reference")
    for shape in SHAPES:
        query, key, value = operands(shape, dtype)
        kwargs = arguments(feature, shape, dtype)
        if not serves(impl, kwargs):
            continue
        out = gpt4fast.attention(query, key, value, **kwargs, impl=impl)
        expected, lse = exact_attention(query, key, value, **kwargs)
        assert out.dtype == dtype and out.shape == expected.shape
        bound = max(
            2 * torch_error(query, key, value, kwargs, expected), FLOOR[dtype] * max(1, expected.abs().max().item())
        )
        assert (out.double() - expected).abs().max().item() <= bound
        if serves(impl, kwargs, return_lse=True):
            again, got = gpt4fast.attention(query, key, value, **kwargs, return_lse=True, impl=impl)
            assert torch.equal(out, again)
            # In half types the native kernel's exponentials are exact to 1e-4, well below the rounding of the weights.
            close = 2e-4 if dtype in (torch.bfloat16, torch.float16) else 1e-5
            torch.testing.assert_close(got.double(), lse, rtol=close, atol=close)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(impl, feature, dtype):
    """First gradients against the float64 reference, and second gradients through a gradient penalty."""
    shape = (2, 4, 2, 9, 12, 8, 6)
    query, key, value = operands(shape, dtype, requires_grad=True)
    kwargs = arguments(feature, shape, dtype)
    if not serves(impl, kwargs):
        pytest.skip("torch has no softcap")
    wanted = [query, key, value]
    if "attn_mask" in kwargs and kwargs["attn_mask"].dtype != torch.bool:
        wanted.append(kwargs["attn_mask"].requires_grad_())
    weight = torch.randn(*query.shape[:3], shape[-1])

    def derivatives(inputs, impl):
        doubled = dict(kwargs, attn_mask=inputs[3]) if len(inputs) > 3 else kwargs
        out = gpt4fast.attention(*inputs[:3], **doubled, impl=impl)
        first = torch.autograd.grad((out.to(inputs[0].dtype) * weight.to(out.dtype)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [*first, *second]

    exact = derivatives([t.detach().double().requires_grad_() for t in wanted], "reference")
    got = derivatives(wanted, impl)
    for ours, truth in zip(got, exact, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.06
        assert torch.isfinite(ours).all()
        assert (ours.double() - truth).abs().max() <= tolerance * max(1, truth.abs().max())


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("feature", FEATURES)
def test_gradcheck(impl, feature):
    shape = (2, 2, 1, 3, 4, 3, 2)
    query, key, value = operands(shape, torch.float64, requires_grad=True)
    kwargs = arguments(feature, shape, torch.float64)
    if not serves(impl, kwargs):
        pytest.skip("torch has no softcap")
    mask = kwargs.pop("attn_mask", None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.requires_grad_()
    slopes = kwargs.pop("alibi_slopes", None)
    slopes = None if slopes is None else slopes.double().requires_grad_()

    def run(query, key, value, mask, slopes):
        if not serves(impl, {}, return_lse=True):
            return gpt4fast.attention(query, key, value, mask, **kwargs, alibi_slopes=slopes, impl=impl)
        out, lse = gpt4fast.attention(
            query, key, value, mask, **kwargs, alibi_slopes=slopes, return_lse=True, impl=impl
        )
        return out, lse.masked_fill(lse == -math.inf, 0)

    inputs = (query, key, value, mask, slopes)
    # A -inf in the mask stays -inf under the finite differences, and its gradient is zero by definition.
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("broadcast", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_broadcast_mask(impl, broadcast, dtype):
    """The gradient is summed to the mask's own shape, whichever of its dimensions are 1; the mask's alone as well."""
    query, key, value = operands((2, 4, 2, 9, 70, 8, 8), dtype, requires_grad=True)
    sizes = [1 if one else n for one, n in zip(broadcast, (2, 4, 9, 70), strict=True)]
    mask = torch.randn(sizes).to(dtype).requires_grad_()

    def gradients(inputs, impl):
        out = gpt4fast.attention(*inputs, impl=impl).double().square().sum()
        return torch.autograd.grad(out, inputs[3:], retain_graph=True) + torch.autograd.grad(out, inputs)

    inputs = (query, key, value, mask)
    exact = gradients([t.detach().double().requires_grad_() for t in inputs], "reference")
    for ours, truth in zip(gradients(inputs, impl), exact, strict=True):
        assert ours.shape == truth.shape and ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        # The sum of a softmax's gradients is zero: what is left of 5,040 of them are their roundings.
        summed = (2 * 4 * 9 * 70 / truth.numel()) ** 0.5 if truth.shape == mask.shape else 1
        assert (ours.double() - truth).abs().max() <= tolerance * max(1, truth.abs().max(), summed / 20)


@pytest.mark.parametrize("feature", ["causal", "softcap", "float mask", "all"])
def test_native_lse_gradient(feature, needs_native):
    shape = (1, 4, 2, 6, 9, 8, 8)
    query, key, value = operands(shape, torch.float32, requires_grad=True)
    kwargs = arguments(feature, shape, torch.float32)

    def gradients(inputs, impl):
        out, lse = gpt4fast.attention(*inputs, **kwargs, return_lse=True, impl=impl)
        return torch.autograd.grad(out.sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum(), inputs)

    exact = gradients([t.detach().double().requires_grad_() for t in (query, key, value)], "reference")
    for ours, truth in zip(gradients([query, key, value], "native"), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", ["lengths", "starts", "window", "bool", "float", "causal"])
def test_nan_in_unseen_places_never_leaks(impl, hidden):
    """NaN keys and values that no query sees, and NaN queries that see nothing: clean output, clean gradients."""
    query, key, value = operands((2, 4, 2, 4, 10, 8, 8), torch.float32)
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[:, 7:] = False
    kwargs, unseen = {
        "lengths": ({"kv_lengths": torch.tensor([7, 7])}, slice(7, None)),
        "starts": ({"kv_starts": torch.tensor([3, 3])}, slice(0, 3)),
        "window": ({"window": (-1, 2)}, slice(6, None)),
        "bool": ({"attn_mask": mask}, slice(7, None)),
        "float": ({"attn_mask": torch.zeros(4, 10).masked_fill(~mask, -math.inf)}, slice(7, None)),
        "causal": ({"is_causal": True}, slice(4, None)),
    }[hidden]
    clean, _ = naive_attention(query, key, value, **kwargs)
    key[:, :, unseen], value[:, :, unseen] = math.nan, math.inf
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out = gpt4fast.attention(*inputs, **kwargs, impl=impl)
    torch.testing.assert_close(out.double(), clean, rtol=1e-5, atol=1e-5)
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert torch.isfinite(grad).all()

    nothing = gpt4fast.attention(
        torch.full_like(query, math.nan), key, value, kv_lengths=torch.tensor([0, 0]), impl=impl
    )
    assert (nothing == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_visible_nan_is_not_hidden(impl):
    query, key, value = operands((1, 1, 1, 3, 4, 8, 8), torch.float32)
    value[..., 2, :] = math.nan
    assert gpt4fast.attention(query, key, value, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(impl):
    """Transposed, expanded, sliced and misaligned storage gives the values of contiguous storage."""
    packed = torch.randn(2, 9, 3, 4, 8)  # batch, length, (q, k, v), heads, head_dim: a fused projection's output
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    expected, _ = naive_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(
        gpt4fast.attention(query, key, value, is_causal=True, impl=impl).double(), expected, rtol=1e-5, atol=1e-5
    )
    flat = torch.randn(1 + 2 * 4 * 9 * 9)[1:].view(2, 4, 9, 9)
    for key in (flat[..., :8], flat[..., 1:], flat.transpose(-1, -2)[..., 1:], flat[:, :1, :, :8].expand(2, 4, 9, 8)):
        expected, _ = naive_attention(query, key, key)
        torch.testing.assert_close(
            gpt4fast.attention(query, key, key, impl=impl).double(), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dimensions(impl):
    """2-D, 3-D and 5-D inputs, and batch dimensions that broadcast."""
    query, key, value = operands((2, 4, 4, 5, 6, 8, 8), torch.float32)
    mask = torch.rand(2, 1, 5, 6) < 0.7
    expected, _ = naive_attention(query, key, value, mask)

    def check(got, truth):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)

    check(gpt4fast.attention(query[1], key[1], value[1], mask[1], impl=impl), expected[1])
    check(gpt4fast.attention(query[1, 2], key[1, 2], value[1, 2], mask[1, 0], impl=impl), expected[1, 2])
    five = [t.unflatten(0, (2, 1)) for t in (query, key, value)]
    check(gpt4fast.attention(*five, mask.unflatten(0, (2, 1)), impl=impl), expected.unflatten(0, (2, 1)))
    shared, _ = naive_attention(query, key[:1].expand(2, 4, 6, 8), value[1:].expand(2, 4, 6, 8))
    check(gpt4fast.attention(query, key[:1], value[1:], impl=impl), shared)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 4, 8, 8), (1, 2, 2, 0, 4, 8, 8), (1, 2, 2, 3, 0, 8, 8), (1, 2, 2, 3, 4, 8, 0)]
)
def test_empty(impl, shape):
    query, key, value = operands(shape, torch.float32, requires_grad=True)
    out = gpt4fast.attention(query, key, value, impl=impl)
    assert out.shape == (*query.shape[:3], value.shape[3]) and (out == 0).all()
    out.sum().backward()
    assert query.grad is None or (query.grad == 0).all()
    if impl != "torch":
        _, lse = gpt4fast.attention(query, key, value, return_lse=True, impl=impl)
        assert lse.shape == query.shape[:3] and (shape[4] > 0 or (lse == -math.inf).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bitwise_repeat(impl):
    query, key, value = operands((2, 4, 2, 67, 90, 40, 40), torch.float32)
    first = gpt4fast.attention(query, key, value, is_causal=True, impl=impl)
    assert all(torch.equal(first, gpt4fast.attention(query, key, value, is_causal=True, impl=impl)) for _ in range(3))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "feature", ["plain", "causal", "offset", "window", "float mask", "lengths", "alibi", "softcap"]
)
def test_compile_fullgraph(impl, feature):
    shape = (2, 4, 2, 6, 9, 8, 8)
    query, key, value = operands(shape, torch.float32, requires_grad=True)
    kwargs = arguments(feature, shape, torch.float32)
    if not serves(impl, kwargs):
        pytest.skip("torch has no softcap")
    torch._dynamo.reset()

    def run(query, key, value):
        return gpt4fast.attention(query, key, value, **kwargs, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run(query, key, value)
    got = compiled(query, key, value)
    torch.testing.assert_close(got, expected)
    for ours, truth in zip(
        *(torch.autograd.grad(t.square().sum(), (query, key, value)) for t in (got, expected)), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_compile_with_inductor():
    torch._dynamo.reset()
    query, key, value = operands((1, 2, 2, 5, 7, 8, 8), torch.float32)
    compiled = torch.compile(
        lambda q, k, v: gpt4fast.attention(q, k, v, is_causal=True, window=(3, 0)) * 2, fullgraph=True
    )
    torch.testing.assert_close(
        compiled(query, key, value), 2 * gpt4fast.attention(query, key, value, is_causal=True, window=(3, 0))
    )


def test_opcheck(needs_native):
    query, key, value = operands((2, 4, 2, 5, 7, 8, 6), torch.float32, requires_grad=True)
    offsets, slopes = torch.tensor([1, 2]), torch.rand(2, 4)
    mask = torch.randn(2, 4, 5, 7, requires_grad=True)
    forward = torch.ops.gpt4fast.attention_forward.default
    settings = (None, 0.0, None, True, 0.3, 0, None, None, None, -1, -1, 0.0, None, None, None)
    everything = (mask, 0.2, torch.tensor([5]), True, 0.3, 0, offsets, offsets + 3, None, 4, 4, 2.0, slopes, None, None)
    starts = torch.tensor([0, 2, 5]), torch.tensor([0, 0, 7])
    fused = torch.randn(2, 5, 3, 4, 9, requires_grad=True)[..., 1:].permute(2, 0, 3, 1, 4)  # gaps in storage
    for operands_, arguments_ in [
        ((query, key, value), settings),
        ((query, key, value), everything),
        ((query[:1], key[:1], value[:1]), (*settings[:-2], *starts)),
        (fused, settings),
    ]:
        torch.library.opcheck(forward, (*operands_, *arguments_))


def test_autocast():
    """As in torch, autocast turns float32 operands into its dtype, and the float32 arithmetic inside is left alone."""
    query, key, value = operands((1, 2, 2, 40, 40, 16, 16), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(query, key, value)
        for impl in filter(available, CPU_IMPLEMENTATIONS):
            got = gpt4fast.attention(query, key, value, impl=impl)
            assert got.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.01)
        inside = gpt4fast.attention(query, key, value, impl="reference")
    outside = gpt4fast.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), impl="reference")
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_scores(impl):
    """Scores whose exp overflows float32, and equal scores of huge size."""
    query, key, value = operands((1, 1, 1, 3, 6, 4, 4), torch.float32)
    expected, _ = naive_attention(query * 1e3, key, value)
    torch.testing.assert_close(
        gpt4fast.attention(query * 1e3, key, value, impl=impl).double(), expected, rtol=1e-3, atol=1e-3
    )
    mask = torch.full((3, 6), -1e30)
    mean = value.double().mean(2, keepdim=True).expand(1, 1, 3, 4)
    torch.testing.assert_close(
        gpt4fast.attention(query, key, value, mask, impl=impl).double(), mean, rtol=1e-5, atol=1e-5
    )


@st.composite
def random_calls(draw):
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    shape = (batch, kv_heads * group, kv_heads, rows, columns, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    kwargs = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        kwargs["query_offset"] = draw(st.integers(-5, 25))
    if draw(st.booleans()):
        kwargs["kv_lengths"] = torch.tensor([draw(st.integers(0, columns)) for _ in range(batch)])
    if draw(st.booleans()):
        kwargs["kv_starts"] = torch.tensor([draw(st.integers(0, columns)) for _ in range(batch)])
    if draw(st.booleans()):
        kwargs["window"] = (draw(st.integers(-1, 10)), draw(st.integers(-1, 10)))
    if draw(st.booleans()):
        kwargs["softcap"] = draw(st.floats(0.5, 30))
    if draw(st.booleans()):
        kwargs["alibi_slopes"] = torch.rand(shape[1])
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    sizes = [draw(st.sampled_from([1, n])) for n in (batch, shape[1], rows, columns)][draw(st.integers(0, 3)) :]
    if kind != "none":
        kwargs["attn_mask"] = torch.rand(sizes) < 0.7 if kind == "bool" else torch.randn(sizes)
    return shape, kwargs


@given(random_calls())
def test_random_calls(call):
    shape, kwargs = call
    query, key, value = operands(shape, torch.float32)
    expected, lse = naive_attention(query, key, value, **kwargs)
    for impl in filter(available, CPU_IMPLEMENTATIONS):
        if serves(impl, kwargs):
            out = gpt4fast.attention(query, key, value, **kwargs, impl=impl)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
        if serves(impl, kwargs, return_lse=True):
            got = gpt4fast.attention(query, key, value, **kwargs, return_lse=True, impl=impl)[1]
            torch.testing.assert_close(got.double(), lse, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_tensor_in_all_places(impl):
    """Each place has a gradient of its own, and they add up: once."""
    # Of half the usual size: at 1 the softmax is so peaked that one seed in a thousand rounds away 2e-5 of the second
    # derivative, in any implementation (3,000 seeds: at most 2.4e-5 there, 3.4e-6 here).
    x = (torch.randn(1, 2, 5, 8) / 2).requires_grad_()
    mask = torch.randn(5, 5, requires_grad=True)

    def derivatives(x, mask, impl):
        out = gpt4fast.attention(x, x, x, mask, impl=impl)
        first = torch.autograd.grad(out.square().sum(), (x, mask), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, mask))]

    exact = derivatives(x.detach().double().requires_grad_(), mask.detach().double().requires_grad_(), "reference")
    for ours, truth in zip(derivatives(x, mask, impl), exact, strict=True):
        assert (ours.double() - truth).norm() <= 2e-5 * max(1, truth.norm())


def test_native_derivative_of_the_lse_alone(needs_native):
    query, key, value = operands((1, 4, 2, 6, 9, 8, 8), torch.float32, requires_grad=True)

    def derivatives(inputs, impl):
        _, lse = gpt4fast.attention(*inputs, return_lse=True, impl=impl)
        first = torch.autograd.grad(lse.square().sum(), inputs[:2], create_graph=True)
        plain = torch.autograd.grad(lse.square().sum(), inputs[:2], retain_graph=True)
        return [*first, *plain, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:2])]

    exact = derivatives([t.detach().double().requires_grad_() for t in (query, key, value)], "reference")
    for ours, truth in zip(derivatives([query, key, value], "native"), exact, strict=True):
        assert (ours.double() - truth).norm() <= 2e-5 * max(1, truth.norm())
