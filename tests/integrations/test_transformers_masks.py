"""LazyMask: bounds that say what transformers' own masks say, and a tensor to all code but ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import masking_utils  # noqa: E402

from gpt4fast.integrations import transformers_masks as masks  # noqa: E402
from gpt4fast.integrations.transformers import NAME  # noqa: E402

MAKERS = {
    "causal": masking_utils.create_causal_mask,
    "sliding": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "bidirectional": masking_utils.create_bidirectional_mask,
    "bidirectional sliding": masking_utils.create_bidirectional_sliding_window_mask,
}


def make(maker: str, implementation: str, length: int, cache=None, batch: int = 2, **kwargs) -> torch.Tensor | None:
    config = SimpleNamespace(
        _attn_implementation=implementation,
        sliding_window=kwargs.get("window", 3),
        attention_chunk_size=kwargs.pop("window", 3),
    )
    embeds = torch.zeros(batch, length, 4)
    arguments = {"attention_mask": None, **kwargs}
    return MAKERS[maker](config, embeds, cache=cache, **arguments)


class Seen:
    """A cache that has seen some tokens, as far as masks are concerned."""

    is_sliding = (False,)
    is_compileable = False

    def __init__(self, seen: int | torch.Tensor, length: int, offset: int = 0) -> None:
        self.seen, self.length, self.offset = seen, length, offset

    def get_query_offset(self, layer_idx: int) -> int | torch.Tensor:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length, self.offset


@st.composite
def calls(draw) -> tuple[str, dict]:
    """A kind of mask, and what a model would ask of it: at a prefill, at a step of decoding, for a packed batch."""
    maker = draw(st.sampled_from(list(MAKERS)))
    length = draw(st.integers(1, 7))
    kwargs = {"length": length, "window": draw(st.integers(1, 9))}
    total = length
    kind = draw(st.sampled_from(["sliding", "static", "dynamic", "packed", "none"]))
    if kind == "packed" and not maker.startswith("bidirectional"):
        ids = [sum(([*range(n)] for n in draw(st.lists(st.integers(1, 4), min_size=7))), [])[:length] for _ in range(2)]
        return maker, kwargs | {"position_ids": torch.tensor(ids)}
    if kind in ("sliding", "static", "dynamic"):
        seen = draw(st.integers(1, 6))
        offset = draw(st.integers(1, seen)) if kind == "sliding" else 0
        total = seen + length + (draw(st.integers(0, 4)) if kind == "static" else 0)
        kwargs["cache"] = Seen(torch.tensor(seen) if kind == "static" else seen, total - offset, offset)
    padding = draw(st.sampled_from(["none", "left", "right", "both", "any", "short"]))
    mask = torch.ones(2, total, dtype=torch.long)
    for row in mask:
        left, right = (draw(st.integers(0, total)) for _ in range(2))
        if padding in ("left", "both"):
            row[:left] = 0
        if padding in ("right", "both"):
            row[right:] = 0
        if padding == "any":
            row.copy_(torch.tensor([draw(st.integers(0, 1)) for _ in row]))
    if padding == "short":  # than the keys, as for a static cache
        mask = mask[:, : draw(st.integers(length, total))]
    return maker, kwargs if padding == "none" else kwargs | {"attention_mask": mask}


@given(calls())
def test_bounds_and_tensor_are_transformers_own_mask(call) -> None:
    maker, kwargs = call
    eager, ours = make(maker, "eager", **kwargs), make(maker, NAME, **kwargs)
    if eager is None or ours is None:  # every query sees every key
        assert all(mask is None or (mask + 0).eq(0).all() for mask in (eager, ours))
        assert ours is not None or maker.startswith("bidirectional")
        return
    assert (ours.shape, ours.dtype, ours.device) == (eager.shape, eager.dtype, eager.device)
    assert torch.equal(ours + 0, eager)


@pytest.mark.parametrize("maker", ["causal", "sliding", "bidirectional sliding"])
def test_a_cache_that_forgot_its_first_entries(maker: str) -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    eager, ours = (make(maker, name, 3, Seen(5, 6, 2), attention_mask=mask) for name in ("eager", NAME))
    assert isinstance(ours, masks.LazyMask) and torch.equal(ours + 0, eager)


@pytest.mark.parametrize("maker", ["causal", "sliding", "bidirectional", "bidirectional sliding"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_usual_masks_are_lazy(maker: str, padding: str | None) -> None:
    mask = torch.ones(2, 6) if padding is None else torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    lazy = make(maker, NAME, 6, attention_mask=mask)
    assert lazy is None if (maker, padding) == ("bidirectional", None) else isinstance(lazy, masks.LazyMask)


def test_one_chunk_is_lazy() -> None:
    lazy, tensor = (make("chunked", NAME, length, window=6, attention_mask=torch.ones(2, length)) for length in (6, 7))
    assert isinstance(lazy, masks.LazyMask) and type(tensor) is torch.Tensor


def test_packed_batches_are_lazy() -> None:
    lazy = make("sliding", NAME, 5, position_ids=torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert lazy.cu_seqlens.tolist() == [0, 3, 5, 6, 10] and lazy.max_seqlen == 4


def test_masks_of_other_functions_are_tensors() -> None:
    def odd_keys_only(batch, head, query, key):
        return key % 2 == 1

    both = [make("causal", name, 6, and_mask_function=odd_keys_only) for name in ("eager", NAME)]
    assert type(both[1]) is torch.Tensor and torch.equal(*both)
    window = masking_utils.sliding_window_causal_mask_function(4)  # not local_size
    both = [f(2, 6, 6, mask_function=window, local_size=3) for f in (masking_utils.eager_mask, masks.lazy_mask)]
    assert type(both[1]) is torch.Tensor and torch.equal(*both)
    images = torch.tensor([[-1, 0, 0, -1, 1, 1]] * 2)
    both = [make("causal", name, 6, block_sequence_ids=images) for name in ("eager", NAME)]
    assert type(both[1]) is torch.Tensor and torch.equal(*both)


def test_what_changes_the_mask_settles_it() -> None:
    lazy = make("causal", NAME, 4)
    lazy[:, :, 0] = 0  # the first query sees everything
    assert lazy.settled and torch.equal(masks.dense_of(lazy)[0, 0, 0], torch.zeros(4))
    assert masks.dense_of(lazy)[0, 0, 1, 2] < -1e30
    view = make("causal", NAME, 4)
    view[0].add_(1)
    assert view.settled and masks.dense_of(view)[0, 0, 0, 0] == 1 and masks.dense_of(view)[1, 0, 0, 0] == 0


def test_reading_and_detaching_leave_it_lazy() -> None:
    lazy = make("causal", NAME, 4)
    assert (lazy * 2).sum() < 0 and not lazy.settled
    copy = lazy.detach()
    assert isinstance(copy, masks.LazyMask) and not copy.settled and torch.equal(copy + 0, lazy + 0)


@pytest.mark.parametrize("maker", ["causal", "sliding", "bidirectional"])
@pytest.mark.parametrize(
    ("length", "cache"), [(1, None), (1, Seen(0, 5)), (1, Seen(4, 5)), (3, Seen(torch.tensor(2), 8)), (4, None)]
)
def test_for_sdpa(maker: str, length: int, cache) -> None:
    """What sdpa is given makes it see the same keys."""
    lazy, eager = make(maker, NAME, length, cache), make(maker, "eager", length, cache)
    if eager is None:
        assert lazy is None or masks.for_sdpa(lazy) == (None, False)
        return
    mask, is_causal = masks.for_sdpa(lazy)
    visible = torch.ones(length, eager.shape[3], dtype=torch.bool)
    if is_causal and length > 1:
        visible = visible.tril()
    if mask is not None:
        visible = visible & (mask == 0)
    assert torch.equal(visible.expand(eager.shape), eager == 0)


def changed(mask: torch.Tensor) -> torch.Tensor:
    mask[:, :, 0] = 0
    return mask + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_that_is_given_one(backend: str) -> None:
    """It may read it. What it changed, or what it changed through a view, would be lost: that raises."""
    torch._dynamo.reset()
    lazy = make("sliding", NAME, 4, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    doubled = torch.compile(lambda mask: mask * 2, backend=backend, fullgraph=True)(lazy)
    assert torch.equal(doubled, lazy * 2) and not lazy.settled
    for function in (changed, lambda mask: mask.mul_(2), lambda mask: mask[:, :, 1:]):
        with pytest.raises(RuntimeError, match="must not be changed or viewed inside"):
            torch.compile(function, backend=backend, fullgraph=True)(make("causal", NAME, 4))
    settled = make("causal", NAME, 4)
    assert torch.equal(changed(settled), torch.compile(lambda mask: mask + 1, backend=backend)(settled))
