"""Generative models on gpt4fast's ops: transformers for text, adversarial networks for images and sound."""

from .cache import KeyValueCache
from .dcgan import DCGANConfig, DCGANDiscriminator, DCGANGenerator
from .encoder import Encoder, EncoderConfig
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .gpt import GPT, GPTConfig
from .wavegan import WaveGANConfig, WaveGANDiscriminator, WaveGANGenerator

__all__ = [
    "GPT",
    "DCGANConfig",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPTConfig",
    "KeyValueCache",
    "WaveGANConfig",
    "WaveGANDiscriminator",
    "WaveGANGenerator",
]
