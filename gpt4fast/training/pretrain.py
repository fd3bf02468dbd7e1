"""Pre-training an encoder: masked, next-token and infilling objectives in one run, on real and generated text."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from gpt4fast.generation.text import generate
from gpt4fast.models import Encoder
from gpt4fast.training.loop import Loop
from gpt4fast.training.objectives import masked_lm, next_token, span_infilling, token_cross_entropy, windows
from gpt4fast.training.optimization import clipped_step, make_optimizers, positive, warmup_cosine

if TYPE_CHECKING:
    from gpt4fast.data.tokenizer import Tokenizer

#: Rows of a batch by objective. The causal one teaches from every position, the others from the masked ones.
MIX = {"masked": 2, "next": 4, "infill": 2}


class SamplePool(nn.Module):
    """Samples written by a model, (rows, width) int64: a buffer, thus in the checkpoint: resuming is exact."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.register_buffer("ids", torch.zeros(rows, width, dtype=torch.long))


def pretrain_encoder(
    encoder: Encoder,
    token_ids: torch.Tensor,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    *,
    steps: int,
    length: int = 128,
    mix: Mapping[str, int] | None = None,
    mask_rate: float = 0.3,
    lr: float = 4e-3,
    weight_decay: float = 0.1,
    max_norm: float = 1.0,
    generated: torch.Tensor | None = None,
    generated_rows: int = 1,
    generated_from: float = 0.5,
    validation_ids: torch.Tensor | None = None,
    validate_every: int = 100,
    checkpoint_every: int = 50,
    seed: int = 0,
    progress: Callable[[int, int, dict], None] | None = None,
) -> list[dict[str, float]]:
    """Trains `encoder` in place, resumable; returns the history, one dict per step.

    Each batch has `mix` rows (masked, next, infill) of `length` ids from token_ids (total,) int64, and three losses:
    masked language modelling (`masked_lm`), next token with `is_causal=True` (`next_token`) and spans
    (`span_infilling`), averaged in proportion to their rows. `mask_rate` of the tokens are hidden: more than BERT's
    15 % teaches a small model faster (Wettig et al. 2023).

    From the share `generated_from` of the run on, `generated_rows` of each batch are generated text: `generated`
    (samples, width ≥ length) from any model, then from the first step on; or, where it is None, what the encoder itself
    writes at that point with its next-token head. A generated row starts with `<generated>`, a real one with `<bos>`:
    the tag lets the model learn from synthetic text without taking its errors for the language (tagged
    back-translation, Caswell et al. 2019). generated_rows=0 trains on real text alone.

    History: "loss", "masked", "next", "infill", "grad_norm", "lr"; every `validate_every` steps and at the end
    "validation_loss", next-token nats per token on `validation_ids`. Optimizers: `make_optimizers`; the learning rate
    warms up and falls as a cosine, gradients are clipped at `max_norm`.

    Raises ValueError for an argument out of range, FloatingPointError where training diverges.
    """
    mix = dict(MIX if mix is None else mix)
    if set(mix) != set(MIX) or min(mix.values()) < 0 or sum(mix.values()) == 0:
        raise ValueError(f"mix must give rows of {', '.join(MIX)}, at least 0 and not all 0, was {mix}")
    positive(steps=steps, lr=lr, max_norm=max_norm, validate_every=validate_every)
    if not 0 < mask_rate <= 1:
        raise ValueError(f"mask_rate must be in (0, 1], was {mask_rate}")
    rows = sum(mix.values())
    if not 0 <= generated_rows <= rows:
        raise ValueError(f"generated_rows must be in [0, {rows}], the rows of a batch, was {generated_rows}")
    if generated is not None and generated.shape[1] < length:
        raise ValueError(f"generated must be (samples, at least {length}), was {tuple(generated.shape)}")
    device = next(encoder.parameters()).device
    pool = SamplePool(32, length) if generated is None else SamplePool(*generated.shape)
    if generated is not None:
        pool.ids.copy_(generated)
    first_generated = 0 if generated is not None else int(generated_from * steps)
    optimizers = make_optimizers(encoder, lr, weight_decay)
    encoder.train()

    def batch(step: int) -> torch.Tensor:
        ids = windows(token_ids, rows, length)
        ids[:, 0] = tokenizer.bos_id
        if generated_rows and step >= first_generated:
            # Spread over the batch, so that each objective meets generated text.
            chosen = torch.randperm(rows)[:generated_rows]
            ids[chosen] = windows(pool.ids, generated_rows, length)
            ids[chosen, 0] = tokenizer.generated_id
        return ids

    def train_step(step: int) -> dict[str, float]:
        if generated is None and generated_rows and step == first_generated:
            pool.ids.copy_(write_samples(encoder, token_ids, tokenizer, *pool.ids.shape))
        for_masked, for_next, for_infill = batch(step).split([mix["masked"], mix["next"], mix["infill"]])
        losses: dict[str, torch.Tensor] = {}
        if mix["next"]:
            inputs, labels = next_token(for_next, tokenizer)
            logits = encoder(inputs.to(device), is_causal=True).logits
            losses["next"] = token_cross_entropy(logits, labels.to(device))
        if mix["masked"] + mix["infill"]:
            masked, masked_labels = masked_lm(for_masked, tokenizer, mask_rate)
            infill, infill_labels = span_infilling(for_infill, tokenizer, mask_rate)
            logits = encoder(torch.cat([masked, infill]).to(device)).logits
            if mix["masked"]:
                losses["masked"] = token_cross_entropy(logits[: mix["masked"]], masked_labels.to(device))
            if mix["infill"]:
                losses["infill"] = token_cross_entropy(logits[mix["masked"] :], infill_labels.to(device))
        loss = sum(mix[name] / rows * value for name, value in losses.items())
        loss.backward()
        rate = lr * warmup_cosine(step, steps)
        metrics = {"loss": float(loss.detach()), "lr": rate}
        metrics |= {name: float(value.detach()) for name, value in losses.items()}
        metrics["grad_norm"] = clipped_step(optimizers.values(), rate, max_norm)
        if validation_ids is not None and ((step + 1) % validate_every == 0 or step + 1 == steps):
            metrics["validation_loss"] = next_token_loss(encoder, validation_ids, tokenizer, length)
        return metrics

    loop = Loop(
        folder,
        "encoder",
        modules={"encoder": encoder, "pool": pool},
        optimizers=optimizers,
        steps=steps,
        checkpoint_every=checkpoint_every,
        seed=seed,
        config={
            "steps": steps,
            "length": length,
            "mix": mix,
            "mask_rate": mask_rate,
            "tokens": len(token_ids),
            "generated_rows": generated_rows,
        },
    )
    return loop.run(train_step, progress)


def write_samples(encoder: Encoder, token_ids: torch.Tensor, tokenizer: Tokenizer, count: int, length: int):
    """`count` texts (count, length) by the encoder's next-token head, each after the first eighth of a real window."""
    device = next(encoder.parameters()).device
    start = windows(token_ids, count, max(1, length // 8))
    start[:, 0] = tokenizer.bos_id
    seed = int(torch.randint(2**31, ()))
    new = generate(encoder, start.to(device), max_new_tokens=length - start.shape[1], top_p=0.95, seed=seed)
    return torch.cat([start, new.cpu()], dim=1)


@torch.no_grad()
def next_token_loss(encoder: Encoder, token_ids: torch.Tensor, tokenizer: Tokenizer, length: int = 128) -> float:
    """Mean next-token nats over token_ids (total ≥ length,), read in windows of `length`, each after a `<bos>`."""
    if len(token_ids) < length:
        raise ValueError(f"token_ids must have at least {length} ids, has {len(token_ids)}")
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    total = torch.zeros((), dtype=torch.float64)
    targets = token_ids[: len(token_ids) // length * length].view(-1, length)
    for rows in targets.split(32):
        inputs = torch.cat([torch.full((len(rows), 1), tokenizer.bos_id), rows[:, :-1]], dim=1)
        logits = encoder(inputs.to(device), is_causal=True).logits
        total += token_cross_entropy(logits, rows.to(device)).double().cpu() * rows.numel()
    encoder.train(was_training)
    return float(total / targets.numel())
