"""Text from a model, one token at a time, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from gpt4fast.generation.sampling import Sampling
from gpt4fast.models import GPT, Encoder, EncoderDecoder, GPTConfig
from gpt4fast.models.config import TransformerConfig

if TYPE_CHECKING:
    from gpt4fast.data.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    model: GPT | EncoderDecoder | Encoder,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    bos_id: int | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
    on_token: Callable[[torch.Tensor], None] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Draws up to `max_new_tokens` tokens after `input_ids`; returns the new ones (batch, n ≤ max_new_tokens), int64.

    A GPT goes on from `input_ids` (batch, length). An EncoderDecoder reads them with its encoder, or features of sound
    (batch, mel_bins, frames) where that has `mel_bins`; its decoder starts from `bos_id`, or goes on from
    `decoder_input_ids` (batch, n). An Encoder goes on like a GPT, with the head that it has for `is_causal=True`. Rows
    of different length are padded on the left (EncoderDecoder: on either side), with `attention_mask` (batch, length)
    True at real tokens. A row ends with `eos_id`, which it keeps, or where `stop(new ids of the row)` says so; it is
    then filled with `pad_id`, and all stop when the last row has ended.

    temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; applied in the order penalty, temperature,
    top_k, top_p, min_p. `seed` makes the draw repeatable, leaves torch's global generator alone; None is a fresh one.
    `on_token` gets each new column (batch,) as soon as it is drawn. `cache_dtype=torch.int8` (or `torch.float8_e4m3fn`)
    remembers keys and values in fewer bits (`KeyValueCache`). The model's training mode is restored afterwards.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    reads_sound = isinstance(model, EncoderDecoder) and model.config.encoder.mel_bins > 0  # features, which it checks
    if not reads_sound and (input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.long):
        raise ValueError(
            "input_ids must be int64 (batch, length) with a length of at least 1, "
            f"was {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, was {max_new_tokens}")
    if attention_mask is not None and (attention_mask.shape != input_ids.shape or attention_mask.dtype != torch.bool):
        raise ValueError(
            f"attention_mask must be bool {tuple(input_ids.shape)} like input_ids, "
            f"was {attention_mask.dtype} {tuple(attention_mask.shape)}"
        )
    if decoder_input_ids is not None and (
        decoder_input_ids.dim() != 2
        or len(decoder_input_ids) != len(input_ids)
        or not isinstance(model, EncoderDecoder)
    ):
        raise ValueError(
            f"decoder_input_ids must be ({len(input_ids)}, n), and only for an EncoderDecoder, "
            f"was {tuple(decoder_input_ids.shape)} for {type(model).__name__}"
        )
    start = next((start for kind, start in _STARTS.items() if isinstance(model, kind)), None)
    if start is None:
        raise TypeError(f"model must be a GPT, EncoderDecoder or Encoder, was {type(model).__name__}")
    first = decoder_input_ids
    if first is None and isinstance(model, EncoderDecoder):
        if bos_id is None:
            raise ValueError("bos_id must be given for an EncoderDecoder: its decoder starts from it, was None")
        first = torch.full((len(input_ids), 1), bos_id, device=input_ids.device)
    was_training = model.training
    model.eval()
    try:
        logits, step, seen = start(model, input_ids, attention_mask, max_new_tokens, first, cache_dtype)
        return _draw_tokens(logits, step, seen, sampling, max_new_tokens, seed, eos_id, pad_id, stop, on_token)
    finally:
        model.train(was_training)


def _draw_tokens(logits, step, seen, sampling, max_new_tokens, seed, eos_id, pad_id, stop, on_token) -> torch.Tensor:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    batch = logits.shape[0]
    ended = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    columns: list[torch.Tensor] = []
    rows: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(max_new_tokens):
        if columns:
            logits = step(columns[-1])
        token = sampling.draw(logits, seen, generator).masked_fill(ended, pad_id)
        seen.scatter_(1, token[:, None], True)
        columns.append(token)
        if on_token is not None:
            on_token(token)
        if eos_id is not None:
            ended = ended | (token == eos_id)
        if stop is not None:
            for i, new in enumerate(token.tolist()):
                if not ended[i]:
                    rows[i].append(new)
                    ended[i] = stop(rows[i])
        if bool(ended.all()):
            break
    return torch.stack(columns, dim=1)


def _seen(vocab: int, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, vocab), True for the ids of each row that are not padding."""
    counts = torch.zeros(ids.shape[0], vocab, dtype=torch.long, device=ids.device)
    ones = torch.ones_like(ids) if mask is None else mask.long()
    return counts.scatter_add_(1, ids, ones) > 0


def _start_gpt(model: GPT, input_ids, attention_mask, max_new_tokens, first, cache_dtype):
    cache = model.make_cache(input_ids.shape[0], input_ids.shape[1] + max_new_tokens, cache_dtype)
    logits = model(input_ids, attention_mask=attention_mask, cache=cache).logits[:, -1]
    seen = _seen(logits.shape[-1], input_ids, attention_mask)
    return logits, lambda token: model(token[:, None], cache=cache).logits[:, -1], seen


def _start_encoder_decoder(model: EncoderDecoder, input_ids, attention_mask, max_new_tokens, first, cache_dtype):
    cache = model.make_cache(input_ids.shape[0], first.shape[1] + max_new_tokens, cache_dtype)
    output = model(input_ids, first, attention_mask=attention_mask, cache=cache)
    encoder_output = output.encoder_output

    def step(token):
        return model(
            None, token[:, None], attention_mask=attention_mask, encoder_output=encoder_output, cache=cache
        ).logits[:, -1]

    logits = output.logits[:, -1]
    # The prompt counts for the repetition penalty, as it does for a GPT; of sound, it is what the decoder began with.
    if model.config.encoder.mel_bins:
        return logits, step, _seen(logits.shape[-1], first, None)
    return logits, step, _seen(logits.shape[-1], input_ids, attention_mask)


def _start_encoder(model: Encoder, input_ids, attention_mask, max_new_tokens, first, cache_dtype):
    if not model.config.head:
        raise ValueError("model must have a head to generate with, and this Encoder has config.head = False")
    # Read causally, an encoder is a GPT with the same weights: this one shares them, and brings the cache.
    config = GPTConfig(**{f.name: getattr(model.config, f.name) for f in fields(TransformerConfig)})
    with torch.device("meta"):
        gpt = GPT(config).eval()
    gpt.stack, gpt.head.weight = model.stack, model.head.weight
    return _start_gpt(gpt, input_ids, attention_mask, max_new_tokens, first, cache_dtype)


_STARTS = {GPT: _start_gpt, EncoderDecoder: _start_encoder_decoder, Encoder: _start_encoder}


def continue_text(
    model: GPT | EncoderDecoder | Encoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    context: int = 64,
    overlap: int = 16,
    chunk: int = 64,
    seed: int | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    **sampling,
) -> str:
    """Writes on after `prompt` and returns what was written, without the prompt.

    The text may be longer than what the model reads at once: it is written in chunks of at most `chunk` tokens, each
    after the last `context` tokens so far, and a decoder gets the last `overlap` of them as its own beginning. Ends
    after `max_new_tokens`, at `<eos>`, or before the first of the strings in `stop`. `on_text` gets the text piece by
    piece as it is written. `sampling`: temperature, top_k, top_p, min_p, repetition_penalty.
    """
    # A token usually begins with the space before its word: after a lone space the model would start within a word.
    stem = prompt.rstrip(" ")
    ids = tokenizer.encode(stem).tolist()
    written: list[int] = []
    shown = 0
    device = next(model.parameters()).device
    seeds = torch.Generator()
    seeds.seed() if seed is None else seeds.manual_seed(seed)

    def text_so_far(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens)
        if stem != prompt:
            text = text.removeprefix(" ")
        cuts = [text.index(word) for word in stop if word in text]
        return text[: min(cuts)] if cuts else text

    def show(token: torch.Tensor) -> None:
        nonlocal shown
        piece.append(int(token))
        text = text_so_far(written + piece)
        # A character of several bytes is shown once it is whole.
        if on_text is not None and not text.endswith("\ufffd"):
            on_text(text[shown:])
            shown = len(text)

    def found_stop(tokens: list[int]) -> bool:
        text = tokenizer.decode(written + tokens)
        return any(word in text for word in stop)

    while len(written) < max_new_tokens:
        piece: list[int] = []
        so_far = ids + written
        source = torch.tensor([[tokenizer.bos_id, *so_far[-context:]]], device=device)
        start = torch.tensor([[tokenizer.bos_id, *so_far[max(0, len(so_far) - overlap) :]]], device=device)
        new = generate(
            model,
            source,
            max_new_tokens=min(chunk, max_new_tokens - len(written)),
            seed=int(torch.randint(2**62, (), generator=seeds)),
            decoder_input_ids=start if isinstance(model, EncoderDecoder) else None,
            eos_id=tokenizer.eos_id,
            stop=found_stop if stop else None,
            on_token=show,
            **sampling,
        )
        ended = int(new[0, -1]) == tokenizer.eos_id or (stop and found_stop(new[0].tolist()))
        written += new[0].tolist()
        if ended:
            break
    return text_so_far(written)
