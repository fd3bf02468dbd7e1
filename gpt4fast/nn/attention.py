"""Multi-head attention: ``torch.nn.MultiheadAttention`` on ``gpt4fast.attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: same arguments, values, parameters and state-dict keys, without its copies.

    The fused kernel runs where the weights are not asked for; with ``need_weights=True`` (torch's default) they have to
    be formed, and torch's own formula does that. Nested tensors and calls that torch refuses go to torch as well.
    A query that may see nothing gives zeros before the output projection.

    Reference: Vaswani et al., "Attention is all you need", 2017.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in torch: (L, E), (L, N, E), or with batch_first (N, L, E); boolean masks are True where hidden."""
        if need_weights or not _serves(
            self, query, key, value, key_padding_mask, attn_mask, is_causal, self.batch_first
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.dim() == 3:
            return _attend(self, query, key, value, key_padding_mask, attn_mask, is_causal, self.batch_first), None
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if key is value:
            key = value = key.unsqueeze(0)  # one projection for both
        else:
            key, value = key.unsqueeze(0), value.unsqueeze(0)
        out = _attend(self, query.unsqueeze(0), key, value, key_padding_mask, attn_mask, is_causal, True)
        return out.squeeze(0), None


@dataclass
class _Linear:
    weight: Tensor
    bias: Tensor | None


@dataclass
class _Arguments:
    """The arguments of ``multi_head_attention_forward`` under the names that the module has for them."""

    embed_dim: int
    num_heads: int
    kdim: int
    vdim: int
    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout: float
    out_proj: _Linear
    training: bool


def multi_head_attention_forward(
    query,
    key,
    value,
    embed_dim_to_check,
    num_heads,
    in_proj_weight,
    in_proj_bias,
    bias_k,
    bias_v,
    add_zero_attn,
    dropout_p,
    out_proj_weight,
    out_proj_bias,
    training=True,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    use_separate_proj_weight=False,
    q_proj_weight=None,
    k_proj_weight=None,
    v_proj_weight=None,
    static_k=None,
    static_v=None,
    average_attn_weights=True,
    is_causal=False,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``: (L, N, E) inputs, fused where weights are not asked for."""
    mha = _Arguments(
        embed_dim=embed_dim_to_check,
        num_heads=num_heads,
        kdim=k_proj_weight.shape[1] if use_separate_proj_weight else embed_dim_to_check,
        vdim=v_proj_weight.shape[1] if use_separate_proj_weight else embed_dim_to_check,
        in_proj_weight=None if use_separate_proj_weight else in_proj_weight,
        q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight,
        v_proj_weight=v_proj_weight,
        in_proj_bias=in_proj_bias,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout=dropout_p,
        out_proj=_Linear(out_proj_weight, out_proj_bias),
        training=training,
    )
    fused = not need_weights and query.dim() == 3 and static_k is None and static_v is None
    if fused and _serves(mha, query, key, value, key_padding_mask, attn_mask, is_causal, batch_first=False):
        return _attend(mha, query, key, value, key_padding_mask, attn_mask, is_causal, batch_first=False), None
    return F.multi_head_attention_forward(
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
        dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask,
        use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights,
        is_causal,
    )  # fmt: skip


def _serves(mha, query, key, value, key_padding_mask, attn_mask, is_causal, batch_first) -> bool:
    """Whether torch would take the call; what it refuses is left to it, for its own error or warning."""
    if mha.embed_dim % mha.num_heads or (mha.bias_k is None) != (mha.bias_v is None):
        return False
    if not (query.dim() == key.dim() == value.dim()) or query.dim() not in (2, 3):
        return False
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    batched = query.dim() == 3
    batch_dim, length_dim = ((0, 1) if batch_first else (1, 0)) if batched else (None, 0)
    batch = query.shape[batch_dim] if batched else 1
    if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[batch_dim] != batch):
        return False
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != (mha.embed_dim, mha.kdim, mha.vdim):
        return False
    queries, keys = query.shape[length_dim], key.shape[length_dim]
    if attn_mask is not None and attn_mask.shape not in ((queries, keys), (batch * mha.num_heads, queries, keys)):
        return False
    if key_padding_mask is not None and key_padding_mask.shape != ((batch, keys) if batched else (keys,)):
        return False
    masks = {mask.dtype for mask in (attn_mask, key_padding_mask) if mask is not None}
    if len(masks) > 1 or not masks <= {torch.bool, torch.float32, query.dtype}:
        return False
    return not is_causal or attn_mask is not None


def _attend(mha, query, key, value, key_padding_mask, attn_mask, is_causal, batch_first) -> Tensor:
    """The batched computation: (N, L, E) with batch_first, else (L, N, E)."""
    q, k, v = (_split_heads(t, mha.num_heads, batch_first) for t in _project(mha, query, key, value))
    if mha.bias_k is not None:
        k = _append(k, mha.bias_k.view(1, mha.num_heads, 1, -1))
        v = _append(v, mha.bias_v.view(1, mha.num_heads, 1, -1))
    if mha.add_zero_attn:
        k, v = _append(k, k.new_zeros(())), _append(v, v.new_zeros(()))
    if is_causal and key_padding_mask is None:
        mask = None  # torch's hint: attn_mask is the causal mask
    else:
        is_causal, mask = False, _merge_masks(attn_mask, key_padding_mask, q, k)
    out = functional.scaled_dot_product_attention(q, k, v, mask, mha.dropout if mha.training else 0.0, is_causal)
    out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
    return F.linear(out.flatten(2), mha.out_proj.weight, mha.out_proj.bias)


def _project(mha, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (…, E) each; inputs that are one tensor share one product."""
    bias = mha.in_proj_bias
    if mha.in_proj_weight is None:
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    elif query is key and key is value:
        return F.linear(query, mha.in_proj_weight, bias).chunk(3, -1)
    elif key is value:
        sizes = (mha.embed_dim, 2 * mha.embed_dim)
        query_weight, kv_weight = mha.in_proj_weight.split(sizes)
        query_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
        return F.linear(query, query_weight, query_bias), *F.linear(key, kv_weight, kv_bias).chunk(2, -1)
    else:
        weights = mha.in_proj_weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))


def _split_heads(t: Tensor, heads: int, batch_first: bool) -> Tensor:
    """(N, L, E) or (L, N, E) -> (N, heads, L, E / heads), a view."""
    t = t.unflatten(-1, (heads, -1))
    return t.transpose(1, 2) if batch_first else t.permute(1, 2, 0, 3)


def _append(t: Tensor, row: Tensor) -> Tensor:
    """One more key or value at the end of (N, heads, S, D)."""
    return torch.cat([t, row.to(t.dtype).expand(t.shape[0], t.shape[1], 1, t.shape[3])], 2)


def _merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask for scaled_dot_product_attention, broadcastable to (N, heads, L, S): bool (True: visible) or float."""
    if attn_mask is not None:
        attn_mask = attn_mask.view(-1, q.shape[1] if attn_mask.dim() == 3 else 1, *attn_mask.shape[-2:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
    else:
        mask = attn_mask | key_padding_mask if attn_mask.dtype == torch.bool else attn_mask + key_padding_mask
    if mask is None:
        return None
    mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # appended keys are seen by all
    return ~mask if mask.dtype == torch.bool else mask
