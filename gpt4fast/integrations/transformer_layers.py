"""``nn.TransformerEncoder`` and its layers at inference, where torch computes each layer by one fused op.

That op writes all scores of attention to memory. Where attention is large, ours is worth the few calls more that a
layer then takes: a key padding mask becomes bounds, and where torch would make a nested tensor of a padded batch, its
tokens are packed. All else is torch's own code, with ``gpt4fast.nn.MultiheadAttention`` in it.

Values are those of torch's formula. Its fused op (torch 2.13) takes finite numbers of a float mask as hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import dispatch, refusals
from ..backends.autograd import needs_grad
from ..nn.attention import MultiheadAttention
from .swap import Swapped

# Tokens of a row, from which on ours is as fast, of whole rows, padded ones in float32 and in half types (torch makes a
# float mask), and packed ones. At half of them 0.8 to 0.97, at twice 1.03 to 3, packed 1.2 to 1.7 (benchmarks/LOG.md).
FEWEST_WHOLE, FEWEST_PADDED, FEWEST_PADDED_HALF, FEWEST_PACKED = 512, 256, 128, 64


class EncoderLayer(Swapped):
    """Precedes ``nn.TransformerEncoderLayer`` among the bases."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        padded = FEWEST_PADDED if src.dtype == torch.float32 else FEWEST_PADDED_HALF
        if not _serves(self, src, FEWEST_WHOLE if src_key_padding_mask is None else padded):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        bounds = None
        if src_key_padding_mask is not None and (src_mask is None or is_causal):
            bounds = _bounds(src_key_padding_mask, src)
        if bounds is None:
            return _layer(self, src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        causal = is_causal and src_mask is not None

        def attention(*qkv: Tensor) -> Tensor:
            return ops.attention(*(t.transpose(1, 2) for t in qkv), is_causal=causal, **bounds).transpose(1, 2)

        return _layer(self, src, lambda x: _attend(self, x, attention))


class Encoder(Swapped):
    """Precedes ``nn.TransformerEncoder`` among the bases."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if mask is not None or not _is_padding(src_key_padding_mask, src) or not self._would_be_nested(src):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        visible = ~src_key_padding_mask
        if self.mask_check and not torch._nested_tensor_from_mask_left_aligned(src, visible):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        lengths = visible.sum(1)
        starts, longest = F.pad(lengths.cumsum(0), (1, 0)), int(lengths.max())

        def attention(*qkv: Tensor) -> Tensor:
            return ops.attention_varlen(*qkv, starts, starts, longest, longest)

        packed = src[visible]
        for layer in self.layers:
            packed = _layer(layer, packed, lambda x, layer=layer: _attend(layer, x, attention))
        output = packed.new_zeros(src.shape)  # as of a nested tensor
        output[visible] = packed
        return output if self.norm is None else self.norm(output)

    def _would_be_nested(self, src: Tensor) -> bool:
        if not getattr(self, "use_nested_tensor", False) or not torch.backends.mha.get_fastpath_enabled():
            return False
        return all(isinstance(layer, EncoderLayer) and _serves(layer, src, FEWEST_PACKED) for layer in self.layers)


def _serves(layer: nn.Module, src: Tensor, fewest: int) -> bool:
    """Whether torch could take its fused op, and rows are so long that ours is faster."""
    attention = layer.self_attn
    return (
        not layer.training
        and type(src) is Tensor
        and src.dim() == 3
        and not src.is_nested
        and src.shape[1] >= fewest
        and type(attention) is MultiheadAttention
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
        and src.shape[2] == attention.embed_dim
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and dispatch.requested(None) in ("auto", "native")
        and refusals.native_refusal(src) is None
        and not needs_grad(src, *layer.parameters())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    )


def _layer(layer: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    if layer.norm_first:
        x = x + attend(layer.norm1(x))
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(x + attend(x))
    return layer.norm2(x + layer._ff_block(x))


def _attend(layer: nn.Module, x: Tensor, attention: Callable[..., Tensor]) -> Tensor:
    """Self-attention of x (..., E), ``attention`` of queries, keys and values (..., heads, E / heads)."""
    mha = layer.self_attn
    qkv = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, -1)
    out = attention(*(t.unflatten(-1, (mha.num_heads, -1)) for t in qkv))
    return F.linear(out.flatten(-2), mha.out_proj.weight, mha.out_proj.bias)


def _is_padding(mask: Tensor | None, src: Tensor) -> bool:
    return mask is not None and mask.dtype == torch.bool and src.dim() == 3 and mask.shape == src.shape[:2]


def _bounds(padding: Tensor, src: Tensor) -> dict[str, Tensor] | None:
    """The keys that a mask (N, S), True where hidden, leaves of each row, if these are one run; else None."""
    if not _is_padding(padding, src):
        return None
    visible = (~padding).int()
    starts, stops = visible.argmax(1), padding.shape[1] - visible.flip(1).argmax(1)
    return {"kv_starts": starts, "kv_lengths": stops} if torch.equal(stops - starts, visible.sum(1)) else None
