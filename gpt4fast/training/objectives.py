"""Self-supervised objectives on token ids: pure functions of ids and a random generator (None: torch's global one).

Ids below `special_count` of the tokenizer are special tokens: never masked, never predicted by the masked objectives,
never drawn as a random replacement. Labels use torch's `ignore_index` -100.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpt4fast.data.tokenizer import Tokenizer

IGNORE = -100


def windows(token_ids: torch.Tensor, count: int, length: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """`count` stretches (count, length) of token_ids, which is (total,), or (rows, width): no stretch crosses rows."""
    rows = token_ids.reshape(1, -1) if token_ids.dim() == 1 else token_ids
    if rows.shape[1] < length:
        raise ValueError(f"token_ids must have at least {length} ids in a row, has {rows.shape[1]}")
    row = torch.randint(rows.shape[0], (count, 1), generator=generator)
    start = torch.randint(rows.shape[1] - length + 1, (count, 1), generator=generator)
    return rows[row, start + torch.arange(length)]


def masked_lm(ids: torch.Tensor, tokenizer: Tokenizer, rate: float = 0.15, generator: torch.Generator | None = None):
    """BERT's masked language modelling (Devlin et al. 2019): inputs and labels, each (batch, length).

    Each ordinary token is chosen with probability `rate`; of the chosen, 80 % become `<mask>`, 10 % a random ordinary
    token, 10 % stay. Labels hold the original ids where chosen, else -100.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < rate) & (ids >= tokenizer.special_count)
    fate = torch.rand(ids.shape, generator=generator)
    random_ids = torch.randint(tokenizer.special_count, tokenizer.vocab_size, ids.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), tokenizer.mask_id, ids)
    inputs = torch.where(chosen & (fate >= 0.9), random_ids, inputs)
    return inputs, ids.masked_fill(~chosen, IGNORE)


def next_token(ids: torch.Tensor, tokenizer: Tokenizer):
    """Next-token prediction: inputs (batch, length), and labels one to the left; the last and padding are -100."""
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    return ids, labels.masked_fill_(labels == tokenizer.pad_id, IGNORE)


def choose_spans(
    candidates: torch.Tensor,
    rate: float,
    generator: torch.Generator | None = None,
    mean_span: float = 3.8,
    longest_span: int = 10,
) -> torch.Tensor:
    """Contiguous spans as in SpanBERT (Joshi et al. 2020): a boolean mask of the shape of `candidates` (batch, length).

    Span lengths are geometric, cut at `longest_span`, starts uniform, until `rate` of the row's candidates (True) are
    covered; a span never runs over a position that is no candidate, and the count is exact, rounded down, at least 1.
    """
    spans = torch.zeros_like(candidates)
    length = candidates.shape[1]
    for row, allowed in zip(spans, candidates, strict=True):
        wanted = max(1, int(rate * int(allowed.sum()))) if bool(allowed.any()) else 0
        while (missing := wanted - int(row.sum())) > 0:
            uniform = torch.rand((), generator=generator).clamp_min(1e-6)
            span = int(uniform.log() / torch.tensor(1 - 1 / mean_span).log()) + 1
            start = int(torch.randint(length, (), generator=generator))
            stop = min(start + min(span, longest_span), length)
            free = allowed[start:stop] & ~row[start:stop]
            # Only the unbroken run from `start` on: a span never jumps over a special token or another span.
            run = int(free.long().cumprod(0).sum())
            row[start : start + min(run, missing)] = True
    return spans


def span_infilling(
    ids: torch.Tensor, tokenizer: Tokenizer, rate: float = 0.2, generator: torch.Generator | None = None
):
    """Infilling for an encoder, after SpanBERT: inputs and labels, each (batch, length).

    Whole spans are hidden: the first token of each becomes `<gap>`, the rest `<mask>`, so the encoder sees where a gap
    begins and how long it is; labels hold the original ids of the spans, else -100.
    """
    spans = choose_spans(ids >= tokenizer.special_count, rate, generator)
    first = spans.clone()
    first[:, 1:] &= ~spans[:, :-1]
    inputs = torch.where(spans, tokenizer.mask_id, ids)
    inputs = torch.where(first, tokenizer.gap_id, inputs)
    return inputs, ids.masked_fill(~spans, IGNORE)


def pad_rows(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
    """Right-padded (rows, longest)."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def gap_filling(ids: torch.Tensor, tokenizer: Tokenizer, rate: float = 0.3, generator: torch.Generator | None = None):
    """Infilling for an encoder-decoder: the encoder reads text with gaps, the decoder writes what is missing.

    Each span shrinks to one `<gap>` in the encoder's input, as in BART's text infilling (Lewis et al. 2020); the
    decoder writes the spans in order, a `<gap>` before each and `<eos>` last, as in T5 (Raffel et al. 2020).
    Returns input_ids (batch, ≤ length), attention_mask of that shape (True at real tokens), decoder_input_ids and
    labels, (batch, longest target), padding labelled -100.
    """
    spans = choose_spans(ids >= tokenizer.special_count, rate, generator)
    gap, start, end = (torch.tensor([i]) for i in (tokenizer.gap_id, tokenizer.bos_id, tokenizer.eos_id))
    sources, targets = [], []
    for row, hidden in zip(ids, spans, strict=True):
        first = hidden.clone()
        first[1:] &= ~hidden[:-1]
        sources.append(torch.where(first, tokenizer.gap_id, row)[~hidden | first])
        begins = first.nonzero().flatten().tolist()
        pieces = [torch.cat([gap, row[b:][: int(hidden[b:].long().cumprod(0).sum())]]) for b in begins]
        targets.append(torch.cat([*pieces, end]))
    lengths = torch.tensor([len(s) for s in sources])
    input_ids = pad_rows(sources, tokenizer.pad_id)
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    decoder_input_ids = pad_rows([torch.cat([start, t[:-1]]) for t in targets], tokenizer.pad_id)
    return input_ids, attention_mask, decoder_input_ids, pad_rows(targets, IGNORE)


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labels that are not -100, in float32; 0 (gradient 0) where there is none. Logits (…, vocab)."""
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (labels != IGNORE).sum().clamp_min(1)
