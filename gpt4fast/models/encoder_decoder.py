"""EncoderDecoder: one stack reads, the other writes while looking at what was read (Vaswani et al. 2017).

The encoder may come from elsewhere, pre-trained: it is used as it is, the very module, so training the whole trains it
further. The decoder is the stack of GPT with cross attention in each block; by default it has the encoder's sizes and
shares its token embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .cache import KeyValueCache
from .config import TransformerConfig
from .encoder import Encoder, EncoderConfig
from .gpt import GPTConfig
from .inputs import Padding, check_labels, check_token_ids
from .layers import Stack, init_weights, softcap, token_loss
from .pretrained import Pretrained


@dataclass
class EncoderDecoderConfig:
    """The configurations of both halves.

    Raises:
        ValueError: share_embeddings, while the two stacks differ in vocab_size or embed_dim.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: GPTConfig | None = None  # None: every size and style as the encoder's
    share_embeddings: bool = True  # one token embedding for both

    def __post_init__(self) -> None:
        if self.decoder is None:
            self.decoder = GPTConfig(**{f.name: getattr(self.encoder, f.name) for f in fields(TransformerConfig)})
        for name in ("vocab_size", "embed_dim") if self.share_embeddings else ():
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ValueError(f"share_embeddings needs equal {name}, got {ours} in encoder and {theirs} in decoder")


class EncoderDecoderOutput(NamedTuple):
    logits: Tensor  # (B, L, vocab_size)
    loss: Tensor | None  # scalar
    encoder_output: Tensor | None  # (B, S, encoder embed_dim); None in a cached step that did not need it


class EncoderDecoder(Pretrained, nn.Module):
    """Sequence to sequence.

    forward(input_ids, decoder_input_ids, labels=None, *,
            attention_mask=None, decoder_attention_mask=None, encoder_output=None, cache=None):
        input_ids: (B, S), what is read, or a spectrogram where the encoder has `mel_bins`. None where encoder_output is
            given, or the cache is past its first step.
        decoder_input_ids: (B, L), what is written so far; with a cache, the tokens since the last call.
        labels: (B, L), the token that each decoder position should predict; -100 is ignored. Nothing is shifted.
        attention_mask: (B, S) of input_ids, true at real tokens, one run per row.
        decoder_attention_mask: (B, L) of decoder_input_ids, likewise.
        encoder_output: (B, S, encoder embed_dim), as an earlier call returned it; the encoder is not run again.
        cache: from `make_cache`. Its first step makes each layer's cross keys and values, and keeps them.
    """

    model_type: ClassVar[str] = "encoder_decoder"
    config_class: ClassVar[type] = EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig, encoder: Encoder | None = None):
        super().__init__()
        if encoder is not None and encoder.config != config.encoder:
            raise ValueError(f"encoder has the configuration {encoder.config}, but config.encoder is {config.encoder}")
        self.config = config
        self.decoder = Stack(config.decoder, encoder_dim=config.encoder.embed_dim)
        self.head = nn.Linear(config.decoder.embed_dim, config.decoder.vocab_size, bias=config.decoder.head_bias)
        init_weights(self, num_residuals=3 * config.decoder.num_layers)
        self.encoder = Encoder(config.encoder) if encoder is None else encoder  # after init_weights: its values stay
        if config.share_embeddings:
            self.decoder.tokens = self.encoder.stack.tokens
        if config.decoder.tie_embeddings:
            self.head.weight = self.decoder.tokens.weight

    def forward(
        self,
        input_ids: Tensor | None,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_output: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> EncoderDecoderOutput:
        check_token_ids("decoder_input_ids", decoder_input_ids, self.config.decoder)
        padding = Padding.from_mask(decoder_attention_mask, decoder_input_ids, "decoder_attention_mask")
        if cache is not None and cache.cross is not None:
            cross, cross_padding = cache.cross, cache.cross_padding
        else:
            if encoder_output is None:
                if input_ids is None:
                    raise ValueError(
                        "input_ids is None, and neither encoder_output nor a cache past its first step was given"
                    )
                encoder_output = self.encoder.encode(input_ids, attention_mask=attention_mask)
            if encoder_output.dim() != 3 or encoder_output.shape[::2] != (
                len(decoder_input_ids),
                self.config.encoder.embed_dim,
            ):
                raise ValueError(
                    f"encoder_output must be ({len(decoder_input_ids)}, S, {self.config.encoder.embed_dim}) "
                    f"for these decoder_input_ids, got {tuple(encoder_output.shape)}"
                )
            cross_padding = Padding.from_mask(attention_mask, encoder_output[..., 0])
            cross = [block.cross_attention.project(encoder_output) for block in self.decoder.blocks]
            if cache is not None:
                cache.cross, cache.cross_padding = [(k.detach(), v.detach()) for k, v in cross], cross_padding
        hidden = self.decoder(
            decoder_input_ids, padding, is_causal=True, cache=cache, cross=cross, cross_padding=cross_padding
        )
        logits = softcap(self.head(hidden), self.config.decoder.logit_softcap)
        if labels is None:
            return EncoderDecoderOutput(logits, None, encoder_output)
        check_labels(labels, decoder_input_ids, self.config.decoder, "decoder_input_ids")
        return EncoderDecoderOutput(logits, token_loss(logits, labels), encoder_output)

    def make_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An empty cache for batch rows of up to max_length decoder tokens, on the model's device and in its dtype,
        or with ``dtype=torch.int8`` or ``torch.float8_e4m3fn`` in a fraction of the memory."""
        return KeyValueCache(self.config.decoder, batch, max_length, like=self.decoder.tokens.weight, dtype=dtype)
