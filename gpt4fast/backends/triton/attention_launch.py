"""Launches of the Triton kernels of attention: grid, arguments and tiles from the tensors and settings of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention_config as config
from . import tuning
from .availability import INTERPRETED
from .device import capability_of

# Small, so that small tensors have several, and unequal, so that none is taken for the other.
TILES_OF_INTERPRETER = {
    "forward_tile": {"BLOCK_M": 32, "BLOCK_N": 16},
    "backward_query_tile": {"BLOCK_M": 16, "BLOCK_N": 32},
    "backward_key_value_tile": {"BLOCK_M": 16, "BLOCK_N": 32},
    "decode_tile": {"BLOCK_M": 16, "BLOCK_N": 16},
}


def launch(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, settings: list, strided: dict[str, Tensor],
    others: dict[str, Tensor | None],
) -> None:  # fmt: skip
    """Run a kernel: one program for each tile of the queries, or of the keys, of each head."""
    (
        attn_mask, dropout_p, seed, is_causal, scale, offset, offsets, kv_lengths, kv_starts, left, right, softcap,
        slopes, query_starts, key_starts, longest_query, longest_key,
    ) = settings  # fmt: skip
    batch, query_heads, rows, head_dim = query.shape
    columns, value_dim = key.shape[2], value.shape[3]
    lengths = rows, columns
    if query_starts is not None:
        batch, lengths = len(query_starts) - 1, (longest_query, longest_key)
    over_keys = kernel == "backward_key_value"
    programs = batch * (key.shape[1] if over_keys else query_heads)
    if programs * lengths[over_keys] == 0:
        return
    from . import attention_kernels as kernels

    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, query_heads, rows, columns)
        attn_mask = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
    dropped = min(int(dropout_p * 2**32), 2**32)  # of all words; below one there is no dropout
    extras = attn_mask is not None or softcap > 0 or dropped > 0
    capability = capability_of(query)
    widths = {"BLOCK_D": config.padded(head_dim), "BLOCK_DV": config.padded_values(value_dim, capability)}

    def run(tile: dict[str, int]) -> None:
        tile, described = dict(tile), {}
        if kernel == "forward":
            described = {"KeyDescriptor": None, "ValueDescriptor": None}
            if tile.pop("DESCRIPTORS", 0):
                described = {
                    "KeyDescriptor": descriptor(key, tile["BLOCK_N"], widths["BLOCK_D"]),
                    "ValueDescriptor": descriptor(value, tile["BLOCK_N"], widths["BLOCK_DV"]),
                }
        tiles = -(-lengths[over_keys] // tile["BLOCK_N" if over_keys else "BLOCK_M"])
        getattr(kernels, f"{kernel}_kernel")[(tiles * programs,)](
            **strided,
            **{f"{_snake(name)}_strides": _strides(t, query_starts is not None) for name, t in strided.items()},
            **others,
            **described,
            Mask=attn_mask,
            mask_strides=(0, 0, 0, 0) if attn_mask is None else attn_mask.stride(),
            Slopes=None if slopes is None else slopes.contiguous(),
            Offsets=offsets,
            Starts=kv_starts,
            Lengths=kv_lengths,
            Seed=seed if dropped else None,
            QueryStarts=query_starts,
            KeyStarts=key_starts,
            heads=query_heads,
            group=query_heads // key.shape[1],
            rows=rows,
            query_length=lengths[0],
            key_length=lengths[1],
            scale=scale,
            softcap=softcap or None,
            offset=offset,
            left=left,
            right=(0 if right < 0 else min(right, 0)) if is_causal else right,  # causal: nothing to the right
            last_dropped=max(dropped - 1, 0),
            keep_scale=1 / (1 - dropout_p) if dropout_p < 1 else 1.0,
            D=head_dim,
            DV=value_dim,
            PRECISION=precision(),
            **widths,
            **tile,
        )

    tile = choose_tile(f"{kernel}_tile", query, value, extras=extras)
    if kernel == "forward" and all(config.takes_descriptor(t, capability) for t in (key, value)):
        tile = {**tile, "DESCRIPTORS": 0}  # pointers, unless the tuner measures that descriptors are faster
    sizes = tuple(number.bit_length() for number in (programs, *lengths))
    features = is_causal, left >= 0, extras, dropped > 0, "DESCRIPTORS" in tile, precision(), str(query.dtype)
    with torch.cuda.device_of(query):
        run(tuning.fastest(kernel, (head_dim, value_dim, *sizes, *features), tile, run, query))


def descriptor(matrices: Tensor, rows: int, columns: int):
    """Of (B, H, L, D), for tiles of whole rows, D <= columns: Hopper and Blackwell fetch one by one instruction."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), [1, 1, rows, columns])


def launch_delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, delta: Tensor) -> None:
    batch, heads, rows, width = out.shape
    if delta.numel() == 0:
        return
    from . import attention_kernels as kernels

    block = 64 if width < 128 else 32
    with torch.cuda.device_of(out):
        kernels.delta_kernel[(-(-rows // block) * batch * heads,)](
            grad_out, out, grad_lse, delta, grad_out.stride(), out.stride(), heads, rows, DV=width,
            BLOCK_DV=config.padded(width), BLOCK_M=block,
        )  # fmt: skip


def _strides(tensor: Tensor, packed: bool) -> tuple[int, ...]:
    return (0, *tensor.stride()[1:]) if packed else tensor.stride()


def _snake(name: str) -> str:
    """GradOut -> grad_out."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def precision() -> str:
    """How products of float32 are rounded, by torch's own setting."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def choose_tile(name: str, query: Tensor, value: Tensor, **kwargs) -> dict[str, int]:
    """What the function ``name`` of attention_config gives for these tensors; small tiles in the interpreter."""
    if INTERPRETED:
        return TILES_OF_INTERPRETER[name]
    return getattr(config, name)(
        query.itemsize, query.shape[3], value.shape[3], capability_of(query), tf32=precision() == "tf32", **kwargs
    )
