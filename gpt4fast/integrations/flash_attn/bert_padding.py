"""flash-attn's conversion of padded batches to packed ones, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``input``, (N, …), by their numbers."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(B, L, …) without the tokens where masks (B, L) are 0: rows (total, …), their numbers in B · L, ``cu_seqlens``,
    the longest sequence, and of each sequence the tokens in ``attention_mask``."""
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, int(lengths.max()), attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """What ``unpad_input`` took apart, with zeros for the rest: (batch, seqlen, …)."""
    zeros = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return zeros.index_copy(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))
