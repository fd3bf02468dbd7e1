"""Masks of transformers models, kept as the few numbers that describe them until something needs the tensor.

A causal or padded mask (B, 1, Lq, Lk) says no more than an offset, a window and two lengths for each row, which
``gpt4fast.attention`` takes as arguments. ``LazyMask`` carries these through a model in the mask's place. It stands for
what transformers gives its eager attention, 0 where a key is visible and the dtype's smallest number elsewhere: model
code of any kind that looks at it, or changes it, meets that tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import remap_positions_for_packed_sequence  # new in 5.23
from transformers.utils.import_utils import is_tracing

from ..backends.autograd import in_transform
from ..backends.reference.attention import visible_keys


class LazyMask(Tensor):
    """A float mask (B, 1, Lq, Lk) that is computed when anything but gpt4fast's attention first uses it.

    Its bounds mean what they do for ``gpt4fast.attention``; ``offsets`` is ``query_offset``, None for 0. With
    ``cu_seqlens``, int32 (sequences + 1,), queries and keys are the same tokens, the rows of the batch one after
    another, and a query sees keys of its own sequence only.
    """

    BOUNDS = ("offsets", "kv_starts", "kv_lengths", "cu_seqlens", "anchor")

    @staticmethod
    def __new__(cls, shape, dtype, device, *settings, **tensors):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        max_seqlen: int = 0,
        settled: bool = False,
        *,
        offsets: Tensor | None = None,
        kv_starts: Tensor | None = None,
        kv_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dense: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> None:
        self.is_causal, self.window, self.max_seqlen = is_causal, window, max_seqlen
        self.offsets, self.kv_starts, self.kv_lengths, self.cu_seqlens = offsets, kv_starts, kv_lengths, cu_seqlens
        self.anchor = torch.empty(0, device=device) if anchor is None else anchor  # torch.compile wants a tensor inside
        self.dense = dense
        self.settled = settled  # other code may have changed dense, which is what counts from then on
        self.is_given_to_graph = False

    def __repr__(self, *, tensor_contents=None) -> str:
        names, _ = self.__tensor_flatten__()
        return f"LazyMask({tuple(self.shape)}, is_causal={self.is_causal}, window={self.window}, with {names})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default and not args[0].settled:
            names, settings = args[0].__tensor_flatten__()
            return cls.__tensor_unflatten__({name: getattr(args[0], name) for name in names}, settings, args[0].shape)
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)

        def make_dense(mask: LazyMask) -> Tensor:
            dense = dense_of(mask)
            if aliases:  # func writes to it, or gives a view through which others may
                if mask.is_given_to_graph:
                    raise RuntimeError(
                        f"a mask given to a compiled model must not be changed or viewed inside, as {func} does: use "
                        'model.set_attn_implementation("sdpa") for this model'
                    )
                mask.settled, mask.dense = True, dense
            return dense

        return func(*tree_map_only(LazyMask, make_dense, args), **tree_map_only(LazyMask, make_dense, kwargs or {}))

    # A model under torch.compile that is given such a mask sees the tensors that the mask consists of.

    def __tensor_flatten__(self):
        settings = self.dtype, self.device, self.is_causal, self.window, self.max_seqlen, self.settled
        names = ("dense",) if self.settled else self.BOUNDS
        return [name for name in names if getattr(self, name) is not None], settings

    def _stable_hash_for_caching(self) -> str:
        return repr(self.__tensor_flatten__())

    @staticmethod
    def __tensor_unflatten__(tensors, settings, size, stride=None):
        mask = LazyMask(size, *settings, **tensors)
        mask.is_given_to_graph = any(type(tensor) is not Tensor for tensor in tensors.values())  # they are traced
        return mask


# Functions, since torch.compile takes a method of a tensor for an op.


def bounds_of(mask: LazyMask) -> dict:
    """The mask, but for packed sequences, as arguments of ``gpt4fast.attention``."""
    return {
        "is_causal": mask.is_causal,
        "query_offset": 0 if mask.offsets is None else mask.offsets,
        "kv_lengths": mask.kv_lengths,
        "kv_starts": mask.kv_starts,
        "window": mask.window,
    }


def dense_of(mask: LazyMask) -> Tensor:
    """The mask as an ordinary tensor."""
    if mask.dense is not None:
        return mask.dense
    batch, _, rows, columns = mask.shape
    same = None
    if mask.cu_seqlens is not None:
        tokens = torch.arange(batch * rows, device=mask.device)
        sequences = torch.bucketize(tokens, mask.cu_seqlens[1:], right=True).view(batch, 1, rows)
        same = sequences[..., :, None] == sequences[..., None, :]
    query, key = (torch.empty(0, 1, length, 0, device=mask.device) for length in (rows, columns))
    visible = visible_keys(query, key, same, **bounds_of(mask))
    dense = torch.zeros(mask.shape, dtype=mask.dtype, device=mask.device)
    if visible is not None:
        dense = dense.masked_fill(~visible, torch.finfo(mask.dtype).min)
    if not torch.compiler.is_compiling():
        mask.dense = dense
    return dense


def for_sdpa(mask: LazyMask) -> tuple[Tensor | None, bool]:
    """The mask for transformers' ``sdpa``, and its causal flag, which saves the mask where it says all."""
    bounds = (mask.offsets, mask.kv_starts, mask.kv_lengths, mask.window, mask.cu_seqlens)
    if all(bound is None for bound in bounds) and (mask.shape[2] > 1 or not mask.is_causal):
        return None, mask.is_causal  # sdpa has no causal flag for a single query
    return dense_of(mask), False


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """transformers' ``eager_mask``, arguments and values alike, as a ``LazyMask`` wherever bounds can express it.

    Like ``eager_mask`` it gives None only for bidirectional attention, where every query sees every key and the caller
    allows it: a model whose attention is code of its own may read every mask as eager attention does. Where a graph is
    traced, and values can't be read, it is ``eager_mask``.
    """
    bounds = None
    if not in_transform() and not is_tracing(attention_mask) and not isinstance(kv_offset, Tensor):
        bounds = _pattern_bounds(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, local_size, device
        )
    if bounds is not None and attention_mask is not None:
        bounds = _with_padding(bounds, attention_mask[:batch_size, kv_offset : kv_offset + kv_length], kv_length)
    if bounds is None:
        return masking_utils.eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype,
            allow_is_bidirectional_skip, use_vmap, device, local_size=local_size,
        )  # fmt: skip
    if allow_is_bidirectional_skip and not any(bound is not None and bound is not False for bound in bounds.values()):
        return None
    return LazyMask((batch_size, 1, q_length, kv_length), dtype, device, **bounds)


def _pattern_bounds(
    batch_size: int, q_length: int, kv_length: int, q_offset, kv_offset: int, mask_function, local_size, device
) -> dict | None:
    """The bounds that say the same as ``mask_function``, or None where none do."""
    utils = masking_utils
    patterns = [(utils.causal_mask_function, True, None), (utils.bidirectional_mask_function, False, None)]
    if local_size is not None:
        patterns += [
            (utils.sliding_window_causal_mask_function(local_size), True, (local_size - 1, -1)),
            (utils.sliding_window_bidirectional_mask_function(local_size), False, (local_size, local_size)),
        ]
        if not isinstance(q_offset, Tensor) and q_offset + q_length <= local_size:  # all is in the first chunk
            patterns.append((utils.chunked_causal_mask_function(local_size, ...), True, None))
    for pattern, is_causal, window in patterns:
        if _match(mask_function, pattern) is not None:
            offset = q_offset - kv_offset  # a copy where it is a tensor: a static cache counts on in its own
            if isinstance(offset, Tensor):
                offsets = offset.reshape(1).expand(batch_size)
            else:
                if window is not None and max(window) >= max(offset + q_length, kv_length):
                    window = None  # it reaches over everything
                if offset >= kv_length - 1:
                    is_causal = False  # a step of decoding: its first query sees the last key
                offsets = torch.full((batch_size,), offset, device=device) if offset else None
            return {"is_causal": is_causal, "window": window, "offsets": offsets if is_causal or window else None}
        remapped = remap_positions_for_packed_sequence(pattern, ...)
        packed = utils.and_masks(remapped, utils.packed_sequence_mask_function(...))
        if (found := _match(mask_function, packed)) is not None:
            # Positions in a sequence rise by one, so that those in the row may stand for them.
            cu_seqlens = _cu_seqlens(found[-1])
            longest = int(cu_seqlens.diff().max())
            return {"is_causal": is_causal, "window": window, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
    return None


def _match(function: object, pattern: object) -> list | None:
    """What ``function`` closes over where ``pattern`` closes over ``...``, if both were otherwise made alike, by the
    same factories of the same arguments; None if they were not."""
    if pattern is ...:
        return [function]
    if isinstance(pattern, tuple):
        if not isinstance(function, tuple) or len(function) != len(pattern):
            return None
        found = [_match(*pair) for pair in zip(function, pattern, strict=True)]
        return None if None in found else sum(found, [])
    code = getattr(pattern, "__code__", None)
    if code is None:
        return [] if type(function) is type(pattern) and function == pattern else None
    if getattr(function, "__code__", None) is not code:
        return None
    return _match(*(tuple(cell.cell_contents for cell in f.__closure__ or ()) for f in (function, pattern)))


def _cu_seqlens(sequences: Tensor) -> Tensor:
    """From the number of each token's sequence in its row, (B, L)."""
    is_first = sequences.diff(dim=-1, prepend=sequences[:, :1] - 1) != 0
    return F.pad(is_first.flatten().nonzero().flatten(), (0, 1), value=sequences.numel()).int()


def _with_padding(bounds: dict, padding: Tensor, kv_length: int) -> dict | None:
    """Bounds with the first and last key of each row added, from bool (B, at most Lk); None if there are holes."""
    padding = F.pad(padding, (0, kv_length - padding.shape[1]))
    if padding.all():
        return bounds
    places = torch.arange(1, kv_length + 1, device=padding.device)
    starts, stops = padding.int().argmax(-1), (padding * places).amax(-1)
    if "cu_seqlens" in bounds or not torch.equal(stops - starts, padding.sum(-1)):
        return None
    return bounds | {"kv_starts": starts, "kv_lengths": stops}
