"""Under ``fast_ops()`` every call that torch's own test data make keeps torch's values, layout, dtype and derivatives.

The samples are those of torch's OpInfo. Each runs on what dispatch prefers (auto) and on the reference and native
implementations, so that the comparison is not torch with torch. Exact sums differ between implementations: ours may be
at most twice as far from float64 as torch is in the same dtype, and a few roundings.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map_only

import gpt4fast
from gpt4fast.backends import dispatch, native

ATTENTION = "nn.functional.scaled_dot_product_attention"
NAMES = (ATTENTION, *(f"nn.functional.conv_transpose{dims}d" for dims in (1, 2, 3)))
OPS = {info.name: info for info in op_db if info.name in NAMES}
FUNCTIONS = {name: getattr(F, name.rpartition(".")[2]) for name in NAMES}  # OpInfo's own wrapper fixes the seed
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASES = [(name, dtype) for name in NAMES for dtype in sorted(OPS[name].dtypes, key=str)]
SERVED = [case for case in CASES if case[1] in REAL]
NOT_SERVED = [case for case in CASES if case[1] not in REAL]


def case_id(value: object) -> str:
    return str(value).removeprefix("torch.").removeprefix("nn.functional.")


@pytest.fixture
def chosen() -> Iterator[list[str]]:
    """The implementations that our ops were dispatched to, one per call."""
    names = []
    with dispatch.listening(lambda op, name: names.append(name)):
        yield names


def run(op, sample, dtype: torch.dtype, order: int, seed: int = 0) -> list[torch.Tensor]:
    """The output of one sample, and with ``order`` 1 or 2 its first (and second) derivatives for every real input."""
    leaves = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().to(dtype).requires_grad_(order > 0))
        return leaves[-1]

    args = tree_map_only(torch.Tensor, leaf, (sample.input, *sample.args))
    kwargs = tree_map_only(torch.Tensor, leaf, sample.kwargs)
    torch.manual_seed(seed)  # dropout
    out = op(*args, **kwargs)
    results = [out]
    if order >= 1:
        grads = torch.autograd.grad(out, leaves, probe(out), create_graph=order == 2)
        results += grads
    if order == 2:
        used = [g for g in grads if g.requires_grad]
        second = torch.autograd.grad(used, leaves, [probe(g) for g in used], allow_unused=True)
        results += [torch.zeros_like(t) if g is None else g for g, t in zip(second, leaves, strict=True)]
    return results


def probe(tensor: torch.Tensor) -> torch.Tensor:
    """A fixed direction to differentiate in, the same for every dtype."""
    return torch.linspace(-1, 1.5, tensor.numel(), dtype=torch.float64).view(tensor.shape).to(tensor.dtype)


def run_torch(name: str, sample, dtype: torch.dtype, order: int) -> list[torch.Tensor]:
    """Torch's results. Its fused attention on the CPU has no second derivative; its formula has."""
    op = FUNCTIONS[name]
    if order < 2 or name != ATTENTION:
        return run(op, sample, dtype, order)
    with sdpa_kernel(SDPBackend.MATH):
        formula = run(op, sample, dtype, order)
    return [*run(op, sample, dtype, 0), *formula[1:]]


def fused_attention(query, key, value, **kwargs) -> torch.Tensor:
    """Torch's attention with 4-D operands, for which it has a fused kernel."""
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    lead = (1,) * (4 - 2 - len(batch)) + tuple(batch)
    operands = (t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    out = F.scaled_dot_product_attention(*operands, **kwargs)
    return out.view(*batch, *out.shape[-2:])


def assert_as_good(ours: list, torchs: list[list], exact: list, terms: float) -> None:
    """Each of ours is at most twice as far from the exact one as the worst of torch's ways, and a few roundings of the
    largest value, or of the ``terms`` whose difference it is."""
    for our, true, *theirs in zip(ours, exact, *torchs, strict=True):
        assert our.dtype == theirs[0].dtype
        assert our.shape == theirs[0].shape
        largest = true.abs().max().item() if true.numel() else 0.0
        worst = max((their.double() - true).abs().max().item() for their in theirs)
        allowed = 2 * worst + 8 * torch.finfo(our.dtype).eps * max(largest, terms)
        assert (our.double() - true).abs().max().item() <= allowed


def check_sample(name: str, sample, dtype: torch.dtype, order: int, terms: float = 0.0) -> None:
    with gpt4fast.fast_ops():
        ours = run(FUNCTIONS[name], sample, dtype, order)
    torchs = [run_torch(name, sample, dtype, order)]
    assert ours[0].stride() == torchs[0][0].stride()
    if name == ATTENTION and order < 2:
        # Fused kernels, torch's too, take the gradient from the rounded output; its formula, for 3-D calls, does not.
        torchs.append(run(fused_attention, sample, dtype, order))
    assert_as_good(ours, torchs, run_torch(name, sample, torch.float64, order), terms)


def check_attention(sample, dtype: torch.dtype) -> None:
    """Torch's samples saturate the softmax: scores reach 8 * 9 * 9 / sqrt(8), so a rounding of theirs is 230 of the
    weights', and derivatives are small differences. So also a tenth of them, where the comparison is a tight one."""
    order = 2 if dtype in (torch.float32, torch.float64) else 1
    check_sample(ATTENTION, sample, dtype, order, terms=230.0 * 9 if order == 2 else 0.0)
    tenth = sample.transform(lambda x: x / 10 if isinstance(x, torch.Tensor) else x)
    check_sample(ATTENTION, tenth, dtype, order, terms=1.0)


def samples(name: str, dtype: torch.dtype) -> list:
    found = list(OPS[name].sample_inputs("cpu", dtype, requires_grad=False))
    assert len(found) >= 10
    return found


def test_all_four_functions_are_in_torchs_test_data() -> None:
    assert set(OPS) == set(NAMES)
    assert {dtype for _, dtype in SERVED} == set(REAL)
    assert len(SERVED) == 4 * 4


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
@pytest.mark.parametrize(("name", "dtype"), SERVED, ids=case_id)
def test_values_layout_and_derivatives_are_torchs(name, dtype, impl, chosen, monkeypatch) -> None:
    if impl == "native" and native.cpu_library_error() is not None:
        pytest.skip("no native library")
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    refused = 0
    # Dropout drops other weights than torch does: see test_dropout_is_drawn_from_torchs_generator.
    found = [sample for sample in samples(name, dtype) if not sample.kwargs.get("dropout_p")]
    for sample in found:
        if impl == "native" and dtype == torch.float64:
            with pytest.raises(RuntimeError, match="requested implementation 'native'"), gpt4fast.fast_ops():
                run(FUNCTIONS[name], sample, dtype, 0)
            refused += 1
            continue
        if name == ATTENTION:
            check_attention(sample, dtype)
        else:
            check_sample(name, sample, dtype, order=2 if dtype in (torch.float32, torch.float64) else 1)
    assert len(chosen) >= len(found) - refused  # every sample was ours
    if impl != "auto":
        assert set(chosen) <= {impl}


@pytest.mark.parametrize(("name", "dtype"), NOT_SERVED, ids=case_id)
def test_other_dtypes_are_torchs(name, dtype, chosen) -> None:
    for sample in samples(name, dtype):
        expected = FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs)
        with gpt4fast.fast_ops():
            ours = FUNCTIONS[name](sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert not chosen


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_dropout_is_drawn_from_torchs_generator(impl, chosen, monkeypatch) -> None:
    """The same weights from the same seed; on torch's kernels those that torch drops."""
    monkeypatch.setenv("GPT4FAST_IMPL", impl)
    dropped = [s for s in samples(ATTENTION, torch.float64) if s.kwargs["dropout_p"]]
    assert dropped
    for sample in dropped:
        with gpt4fast.fast_ops():
            ours, again, other = (run(FUNCTIONS[ATTENTION], sample, torch.float64, 0, seed=n) for n in (3, 3, 4))
        assert torch.equal(ours[0], again[0]) and not torch.equal(ours[0], other[0])
        if impl == "torch":
            torch.testing.assert_close(ours, run(FUNCTIONS[ATTENTION], sample, torch.float64, 0, seed=3))
    assert chosen == [impl] * (3 * len(dropped))


@pytest.mark.parametrize("name", NAMES, ids=case_id)
def test_meta_tensors_are_torchs(name, chosen) -> None:
    for sample in samples(name, torch.float32):
        on_meta = sample.transform(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t)
        expected = FUNCTIONS[name](on_meta.input, *on_meta.args, **on_meta.kwargs)
        with gpt4fast.fast_ops():
            ours = FUNCTIONS[name](on_meta.input, *on_meta.args, **on_meta.kwargs)
        assert ours.device.type == "meta"
        assert (ours.shape, ours.stride(), ours.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert not chosen
