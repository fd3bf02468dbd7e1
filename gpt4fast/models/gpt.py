"""GPT: a causal transformer that predicts the next token, in the style of GPT-2, of Llama, or in between.

    model = GPT(GPTConfig.llama(vocab_size=512, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=128, mlp_dim=None))
    loss = model(ids[:, :-1], labels=ids[:, 1:]).loss

Labels stand where the model predicts them: `labels[b, t]` is what position t should say, that is, the token after it.
No model here shifts anything by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .cache import KeyValueCache
from .config import TransformerConfig, check_not_negative
from .inputs import Padding, check_labels, check_token_ids
from .layers import Stack, init_weights, softcap, token_loss
from .pretrained import Pretrained, later


@dataclass
class GPTConfig(TransformerConfig):
    """As TransformerConfig, whose defaults are GPT-2's; two presets, of which any field can be changed by keyword."""

    head_bias: bool = later(False)
    logit_softcap: float = later(0.0)  # logits become cap * tanh(logits / cap) (Gemma 2); 0 is off

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("logit_softcap", self.logit_softcap)

    @classmethod
    def gpt2(cls, **changes: Any) -> GPTConfig:
        """GPT-2 small, 124 million parameters (Radford et al. 2019)."""
        return cls(**{"mlp": "gelu_tanh", **changes})

    @classmethod
    def llama(cls, **changes: Any) -> GPTConfig:
        """Llama's style (Touvron et al. 2023) at TinyLlama's 1.1 billion parameters."""
        llama = {
            "vocab_size": 32000, "max_length": 2048, "num_layers": 22,
            "num_heads": 32, "num_kv_heads": 4, "embed_dim": 2048, "mlp_dim": 5632,
            "norm": "rms", "positions": "rotary", "mlp": "swiglu", "bias": False, "tie_embeddings": False,
        }  # fmt: skip
        if not {"num_heads", "embed_dim"}.isdisjoint(changes):  # another size: these follow from it unless given
            llama |= {"num_kv_heads": None, "mlp_dim": None}
        return cls(**{**llama, **changes})


class GPTOutput(NamedTuple):
    logits: Tensor  # (B, L, vocab_size)
    loss: Tensor | None  # scalar


class GPT(Pretrained, nn.Module):
    """Decoder-only transformer.

    forward(input_ids, labels=None, *, attention_mask=None, cache=None):
        input_ids: (B, L) int64 or int32.
        labels: (B, L), the token that each position should predict; -100 is ignored.
        attention_mask: (B, L) bool or integer, true at real tokens, one run per row: padding on the left or the right.
        cache: from `make_cache`; the ids continue what it holds, and gradients do not reach through it.

    Raises:
        TypeError, ValueError: ids of a wrong type, shape, length or (on the CPU) value; a broken mask; a full cache.
    """

    model_type: ClassVar[str] = "gpt"
    config_class: ClassVar[type] = GPTConfig

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.stack = Stack(config)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=config.head_bias)
        init_weights(self, num_residuals=2 * config.num_layers)
        if config.tie_embeddings:
            self.head.weight = self.stack.tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> GPTOutput:
        check_token_ids("input_ids", input_ids, self.config)
        padding = Padding.from_mask(attention_mask, input_ids)
        hidden = self.stack(input_ids, padding, is_causal=True, cache=cache)
        logits = softcap(self.head(hidden), self.config.logit_softcap)
        if labels is None:
            return GPTOutput(logits, None)
        check_labels(labels, input_ids, self.config)
        return GPTOutput(logits, token_loss(logits, labels))

    def make_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An empty cache for batch rows of up to max_length tokens, on the model's device and in its dtype,
        or with ``dtype=torch.int8`` or ``torch.float8_e4m3fn`` in a fraction of the memory."""
        return KeyValueCache(self.config, batch, max_length, like=self.stack.tokens.weight, dtype=dtype)
