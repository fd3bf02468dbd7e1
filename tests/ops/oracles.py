"""Slow, obvious definitions in float64, one query or one output element at a time, to test against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt4fast.backends import native

CPU_IMPLEMENTATIONS = ["reference", "torch", "native"]


def available(impl: str) -> bool:
    return impl != "native" or native.cpu_library_error() is None


def naive_attention(
    query, key, value, attn_mask=None, is_causal=False, scale=None, *, query_offset=0, kv_lengths=None, kv_starts=None,
    window=None, softcap=0.0, alibi_slopes=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp of 4-D inputs, float64. Invisible keys and values are not touched at all."""
    batch, heads, rows, head_dim = query.shape
    columns, group = key.shape[2], heads // key.shape[1] if key.shape[1] else 1
    scale = head_dim**-0.5 if scale is None else scale
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, rows, columns)
    slopes = None if alibi_slopes is None else alibi_slopes.double().expand(batch, heads)
    out = torch.zeros(batch, heads, rows, value.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -math.inf, dtype=torch.float64)
    left, right = window or (-1, -1)
    for b in range(batch):
        offset = int(query_offset[b]) if isinstance(query_offset, Tensor) else query_offset
        start = 0 if kv_starts is None else int(kv_starts[b])
        stop = columns if kv_lengths is None else min(columns, int(kv_lengths[b]))
        for h in range(heads):
            for i in range(rows):
                position = i + offset
                scores, seen = [], []
                for j in range(max(start, 0), stop):
                    if is_causal and j > position:
                        continue
                    if (left >= 0 and j < position - left) or (right >= 0 and j > position + right):
                        continue
                    extra = 0.0
                    if mask is not None:
                        entry = mask[b, h, i, j]
                        if mask.dtype == torch.bool and not entry or mask.dtype != torch.bool and entry == -math.inf:
                            continue
                        extra = 0.0 if mask.dtype == torch.bool else entry.double()
                    score = (query[b, h, i].double() @ key[b, h // group, j].double()) * scale
                    if softcap:
                        score = softcap * torch.tanh(score / softcap)
                    score = score + extra
                    if slopes is not None:
                        score = score - slopes[b, h] * abs(position - j)
                    scores.append(score)
                    seen.append(value[b, h // group, j].double())
                if scores:
                    stacked = torch.stack(scores)
                    out[b, h, i] = torch.softmax(stacked, 0) @ torch.stack(seen)
                    lse[b, h, i] = torch.logsumexp(stacked, 0)
    return out, lse


def naive_conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation) -> Tensor:
    """One output element at a time, gathered from the inputs that reach it; batched input, float64."""
    input, weight = input.double(), weight.double()
    dims = input.dim() - 2
    sizes = [
        (input.shape[2 + d] - 1) * stride[d]
        - 2 * padding[d]
        + dilation[d] * (weight.shape[2 + d] - 1)
        + output_padding[d]
        + 1
        for d in range(dims)
    ]
    out_per_group, in_per_group = weight.shape[1], input.shape[1] // groups
    output = torch.zeros(input.shape[0], out_per_group * groups, *sizes, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).view(-1, dims).tolist():
        for tap in torch.cartesian_prod(*(torch.arange(k) for k in weight.shape[2:])).view(-1, dims).tolist():
            source = []
            for d in range(dims):
                numerator = place[d] + padding[d] - tap[d] * dilation[d]
                if numerator % stride[d] or not 0 <= numerator // stride[d] < input.shape[2 + d]:
                    break
                source.append(numerator // stride[d])
            else:
                for g in range(groups):
                    channels = slice(g * in_per_group, (g + 1) * in_per_group)
                    patch = input[(slice(None), channels, *source)] @ weight[(channels, slice(None), *tap)]
                    output[(slice(None), slice(g * out_per_group, (g + 1) * out_per_group), *place)] += patch
    if bias is not None:
        output += bias.double().view(-1, *(1,) * dims)
    return output
