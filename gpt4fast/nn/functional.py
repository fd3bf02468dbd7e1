"""torch.nn.functional's signatures and semantics on gpt4fast's kernels; what these do not serve goes to torch itself.

``gpt4fast.nn`` and ``fast_ops()`` both stand on this file. Where torch would raise, torch is called and raises its own
error. Torch is also called under vmap, jvp and forward-mode differentiation, while tracing or exporting (a model
exports as standard ops), for tensor subclasses, nested and sparse tensors, devices other than the CPU and CUDA,
complex and integer dtypes, and where ``torch.nn.attention.sdpa_kernel`` asks for one of torch's own kernels.

Two differences are meant. A key or value that every query of its head ignores is never read, so a NaN there does not
reach the output (torch multiplies it by zero and gives NaN). And dropout draws from torch's generator, but drops other
weights than torch would from the same seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..backends import preferences
from ..backends.autograd import in_transform
from ..backends.compiled import convolution as compiled_convolution
from ..ops.checks import autocast_dtype, to_tuple, without_autocast

_PLAIN = (Tensor, torch.nn.Parameter)
_MATH = 0  # what torch._fused_sdp_choice returns for the unfused formula


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on ``gpt4fast.attention``.

    query (..., Hq, L, D), key (..., H, S, D), value (..., H, S, Dv), attn_mask broadcastable to (..., Hq, L, S), of 2
    dimensions or more; gives (..., Hq, L, Dv) in torch's memory layout. See the module for what runs on torch.
    """
    if not in_transform() and _torch_takes(query, key, value, attn_mask, is_causal, enable_gqa):
        dims = max(query.dim(), key.dim(), value.dim())
        try:
            q, k, v = _with_dims(query, dims), _with_dims(key, dims), _with_dims(value, dims)
            out = ops.attention(q, k, v, attn_mask, dropout_p, is_causal, scale)
        except (TypeError, ValueError):
            pass  # torch takes it, or has its own words for what is wrong
        else:
            return _in_torch_layout(out, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def conv_transpose1d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Tensor:
    """``torch.nn.functional.conv_transpose1d`` on ``gpt4fast.conv_transpose1d``: input (N, C, L) or (C, L)."""
    return _conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Tensor:
    """``torch.nn.functional.conv_transpose2d`` on ``gpt4fast.conv_transpose2d``: input (N, C, H, W) or (C, H, W)."""
    return _conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Tensor:
    """``torch.nn.functional.conv_transpose3d`` on ``gpt4fast.conv_transpose3d``: (N, C, D, H, W) or (C, D, H, W)."""
    return _conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv_transpose(spatial_dims: int, *args) -> Tensor:
    ours, torchs = _CONV_TRANSPOSE[spatial_dims]
    if not in_transform() and all(t is None or is_plain(t) for t in args[:3]):
        try:
            return ours(*args)
        except (TypeError, ValueError):
            pass
    return torchs(*args)


_CONV_TRANSPOSE = {
    1: (ops.conv_transpose1d, F.conv_transpose1d),
    2: (ops.conv_transpose2d, F.conv_transpose2d),
    3: (ops.conv_transpose3d, F.conv_transpose3d),
}


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """``torch.nn.functional.conv1d``, with faster gradients where there is a stride: input (N, C, L) or (C, L)."""
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """``torch.nn.functional.conv2d``, with faster gradients where there is a stride: (N, C, H, W) or (C, H, W)."""
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """``torch.nn.functional.conv3d``, with faster gradients where there is a stride: batched (N, C, D, H, W) or not."""
    return _convolution(3, input, weight, bias, stride, padding, dilation, groups)


def _convolution(dims: int, input, weight, bias, stride, padding, dilation, groups) -> Tensor:
    if (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not in_transform()
        and all(t is None or is_plain(t) for t in (input, weight, bias))
        and input.dim() == weight.dim() == dims + 2
        and type(groups) is int
    ):
        try:
            geometry = [to_tuple("", n, dims, least) for n, least in ((stride, 1), (padding, 0), (dilation, 1))]
        except (TypeError, ValueError):
            pass  # a word, or nonsense
        else:
            cast = autocast_dtype(input)
            dtype = cast or input.dtype
            same = cast is not None or weight.dtype == dtype
            if same and preferences.convolution_gradients_win(dtype, input, weight, bias, geometry[0], groups):
                tensors = [t if cast is None or t is None else t.to(cast) for t in (input, weight, bias)]
                return without_autocast(lambda: compiled_convolution.convolution(*tensors, *geometry, groups), input)
    return compiled_convolution.FUNCTIONS[dims](input, weight, bias, stride, padding, dilation, groups)


def is_plain(t: object) -> bool:
    return type(t) in _PLAIN and (t.is_cpu or t.is_cuda) and not t.is_nested


def _torch_takes(query, key, value, attn_mask, is_causal, enable_gqa) -> bool:
    """False where torch raises but ``gpt4fast.attention`` would not, or gives the arguments another meaning."""
    if not (is_plain(query) and is_plain(key) and is_plain(value)):
        return False
    if attn_mask is not None and not (
        is_plain(attn_mask)
        and attn_mask.dim() >= 2
        and attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
        and not is_causal
    ):
        return False
    if enable_gqa:
        # Torch repeats heads, which needs a dimension of heads and no broadcasting over it.
        if min(query.dim(), key.dim(), value.dim()) < 3:
            return False
    elif query.dim() > 2 and key.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]):
        return False
    return torch.compiler.is_compiling() or _no_kernel_named(query)  # Dynamo can't read those switches


def _no_kernel_named(query: Tensor) -> bool:
    """True unless ``torch.nn.attention.sdpa_kernel`` rules one of torch's kernels out: who names a kernel gets it."""
    if not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return False
    return query.is_cpu or (torch._C._get_mem_efficient_sdp_enabled() and torch._C._get_cudnn_sdp_enabled())


def _with_dims(t: Tensor, dims: int) -> Tensor:
    """``t`` with leading dimensions of size 1, ``dims`` in all."""
    return t if t.dim() == dims else t[(None,) * (dims - t.dim())]


def _in_torch_layout(out, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor:
    """``out`` with the strides of torch's result, so that a ``view`` that works on torch's works on ours.

    Torch's fused kernels keep the order in which query's dimensions lie in memory; its formula is contiguous.
    """
    if query.dim() != 4 or query.is_contiguous() or out.shape != query.shape:
        return out.contiguous()
    if torch.compiler.is_compiling():  # Dynamo can't trace torch's own choice
        fused = not dropout_p and query.stride(-1) == 1 and (attn_mask is None or not attn_mask.requires_grad)
    else:
        choice = torch._fused_sdp_choice(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        fused = choice != _MATH
    if not fused:
        return out.contiguous()
    like = torch.empty_like(query)
    return out if out.stride() == like.stride() else like.copy_(out)
