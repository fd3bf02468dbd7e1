"""What stands between a model's logits and the next token: penalties, temperature, filters, one draw.

Every function takes logits (batch, vocab) and returns a new tensor of that shape; what may not be drawn is -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. ValueError names the argument that is out of range.

    temperature: 0 takes the likeliest token (greedy), 1 leaves the distribution as it is.
    top_k: only the k likeliest tokens (Fan et al. 2018). Ties with the k-th stay.
    top_p: the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020).
    min_p: tokens of at least min_p times the likeliest one's probability (Nguyen et al. 2024).
    repetition_penalty: above 1 makes tokens already seen less likely (Keskar et al. 2019).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, was {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, or None, was {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], or None, was {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], or None, was {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be a positive number, was {self.repetition_penalty}")

    def draw(self, logits: torch.Tensor, seen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next token of each row, (batch,) int64. `seen` (batch, vocab): True for tokens the row already has."""
        logits = penalise_seen(logits.float(), seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        # Drawn on the CPU from the caller's generator: the same seed gives the same noise whatever the device.
        return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)


def penalise_seen(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides the positive and multiplies the negative logits of the tokens `seen` (bool) by `penalty`."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    # A token stays while the likelier ones before it have not reached p: the first always does.
    dropped = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)
