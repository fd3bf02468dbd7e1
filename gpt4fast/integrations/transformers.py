"""transformers' models on gpt4fast's attention (transformers 5.23 or later: ``pip install gpt4fast[hf]``).

Either of these makes a model run on it::

    fast = gpt4fast.optimize(model)   # model itself does not change; the two share their parameters

    import gpt4fast.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="gpt4fast")

``gpt4fast.restore(fast)`` and ``model.set_attn_implementation("sdpa")`` switch back. Outputs, gradients and generated
tokens are those of transformers' own attention, with any cache, padded and packed batches (``position_ids`` that begin
anew, or ``cu_seq_lens_q`` and ``cu_seq_lens_k``), sliding windows, softcap, attention sinks, position bias and dropout,
in ``generate`` and under ``torch.compile``. What gpt4fast does not serve goes to transformers' ``sdpa``, as does
what is on a GPU, where this module has not yet run.
"""

from __future__ import annotations

import inspect
import math
import re
import sys

import torch
from torch import Tensor, nn

try:
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from .transformers_masks import LazyMask, bounds_of, dense_of, for_sdpa, lazy_mask
except ImportError as error:
    raise ImportError(
        f"gpt4fast.integrations.transformers needs transformers 5.23 or later: pip install 'gpt4fast[hf]' ({error})"
    ) from error

from .. import ops
from ..backends import dispatch
from ..backends.autograd import in_transform
from ..nn.functional import is_plain

NAME = "gpt4fast"


def register() -> None:
    """Make ``attn_implementation="gpt4fast"`` known to transformers. Importing this module does it."""
    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, lazy_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        query: (B, Hq, Lq, D); key: (B, Hk, Lk, D); value: (B, Hk, Lk, Dv).
        attention_mask: what ``lazy_mask`` gave, or any bool or float mask that broadcasts to (B, Hq, Lq, Lk). None, as
            for ``sdpa``, is causal for more than one query where ``is_causal``, or if that is None ``module``, says so.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (Hq,), attention sinks: one more score for each head, with no value behind it.
        position_bias: (1 or B, Hq, Lq, Lk), added to the scores.
        sliding_window: read only with ``cu_seq_lens_q``; elsewhere the mask knows it.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as for flash-attn.

    Returns:
        (B, Lq, Hq, Dv), contiguous, and None in the place of the weights.

    Raises:
        ValueError: the model gives indices of keys to attend to, or packed sequences together with a mask of padding.
    """
    _refuse_unknown(module, kwargs)
    mask, lazy = attention_mask, isinstance(attention_mask, LazyMask)
    if lazy and (mask.settled or mask.shape != (query.shape[0], 1, query.shape[2], key.shape[2])):
        mask, lazy = dense_of(mask), False
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        bounds = {"is_causal": query.shape[2] > 1 and causal}  # in this order for torch.compile: a bool, not a SymBool
    else:
        bounds = bounds_of(mask) if lazy else {"attn_mask": mask}
    settings = {"dropout_p": dropout, "scale": scaling, "softcap": softcap or 0.0, "return_lse": s_aux is not None}

    if lazy and mask.cu_seqlens is not None:
        cu_seq_lens_q = cu_seq_lens_k = mask.cu_seqlens
        max_length_q = max_length_k = mask.max_seqlen
    elif cu_seq_lens_q is not None and mask is None and sliding_window is not None:
        bounds["window"] = (sliding_window - 1, sliding_window - 1)
    if cu_seq_lens_q is not None:
        packed = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        out = _attend_packed(query, key, value, *packed, position_bias, bounds, settings)
    elif _is_for_torch(query, key, value) and s_aux is None and softcap is None:
        if lazy:
            mask, is_causal = for_sdpa(mask)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, position_bias=position_bias, **kwargs
        )
    else:
        if position_bias is not None:
            bounds["attn_mask"] = _add_bias(position_bias, bounds.get("attn_mask"))
        out = ops.attention(query, key, value, **bounds, **settings)
    if s_aux is not None:
        out, lse = out
        out = (out * torch.sigmoid(lse - s_aux.float()[:, None]).unsqueeze(-1)).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, kwargs: dict) -> None:
    """An error for arguments that change the result and that ``sdpa`` would leave out without a word."""
    for name in ("indices", "block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"gpt4fast's attention does not take {name}, which {type(module).__name__} gives it: choose another "
                'implementation, model.set_attn_implementation("eager") for example'
            )


def _is_for_torch(*tensors: Tensor) -> bool:
    """What our ops have no rules for (export, torch.func, tensor subclasses), and GPUs unless an implementation is
    asked for: there one mask for all layers goes to torch's kernels."""
    if in_transform() or not all(map(is_plain, tensors)):
        return True
    return not tensors[0].is_cpu and dispatch.requested(None) == "auto"


def _add_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return position_bias
    return position_bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else position_bias + mask


def _attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, position_bias, bounds, settings):
    """``attention_varlen`` over the rows of the batch, one after another, with results shaped as by ``attention``."""
    lengths = [cu_seqlens.diff() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    max_q, max_k = (int(n.max() if given is None else given) for n, given in zip(lengths, (max_q, max_k), strict=True))
    bounds = {name: value for name, value in bounds.items() if value is not None}
    if position_bias is not None or not bounds.keys() <= {"is_causal", "window", "query_offset"}:
        raise ValueError("cu_seq_lens_q must be None where there is a position_bias or an attention_mask with padding")
    if cu_seqlens_q is not cu_seqlens_k:
        bounds["query_offset"] = lengths[1] - lengths[0]  # the last query of each sequence sees its last key
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    results = ops.attention_varlen(*flat, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **bounds, **settings)
    shape = query.shape[0], query.shape[2]
    if not settings["return_lse"]:
        return results.unflatten(0, shape).transpose(1, 2)
    return tuple(t.unflatten(0, shape).transpose(1, 2) for t in results)


def switch_refusal(model: transformers.PreTrainedModel) -> str | None:
    """Why ``optimize`` leaves a model's attention as it is, or None."""
    chosen = model.config._attn_implementation
    if chosen not in ("sdpa", "eager"):
        return f"attn_implementation={chosen!r} was chosen"
    if getattr(model.config, "output_attentions", False):
        return "it gives attention weights, which only attn_implementation='eager' does"
    if not (model._supports_sdpa or model._supports_flex_attn or model._supports_flash_attn):
        return "its attention is a formula of its own"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if _NAMES_ALL.search(inspect.getsource(sys.modules[type(model).__module__])):
        return "its attention is sparse, by indices that only 'eager' and 'sdpa' are given as a mask"
    if model.device.type != "cpu" and dispatch.requested(None) == "auto":
        return f"on {model.device.type}, torch's kernels are what gpt4fast would take"
    return None


_NAMES_ALL = re.compile(r'_attn_implementation in \("eager", "sdpa"\)')


def explain(module: nn.Module) -> tuple[str, str] | None:
    """(runs on, why) of a transformers model's attention, or None if ``module`` is none."""
    if not isinstance(module, transformers.PreTrainedModel):
        return None
    if module.config._attn_implementation == NAME:
        return "gpt4fast.attention", f"attn_implementation={NAME!r}"
    refusal = switch_refusal(module)
    return ("torch", "optimize() would take its attention" if refusal is None else refusal)


def switch(model: nn.Module) -> None:
    """Let the transformers models in ``model`` run on gpt4fast's attention, in place, unless there is a refusal."""
    found = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    before = {module: module.config._attn_implementation for module in found if switch_refusal(module) is None}
    for module, implementation in before.items():  # the configuration may be several modules' own
        module.config._attn_implementation_internal = NAME
        module.attention_before = implementation


def switch_back(model: nn.Module) -> None:
    """What ``switch`` did, undone; a model that was loaded with it runs on transformers' default."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            before = module.__dict__.pop("attention_before", None)
            if module.config._attn_implementation == NAME:
                before = before or module.get_correct_attn_implementation(None)
                module.config._attn_implementation_internal = before


register()
