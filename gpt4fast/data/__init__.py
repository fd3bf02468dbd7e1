"""Data: small real samples that come with the package, and loaders for your own pictures, sounds and texts."""

from gpt4fast.data.audio import audio_folder, augment, read_audio, resample, write_wav
from gpt4fast.data.builtin import Digits, Drums, load_digits, load_drums, load_shakespeare, load_tang_poems
from gpt4fast.data.images import image_folder, resize
from gpt4fast.data.splits import split_indices
from gpt4fast.data.text import split_text, text_file

__all__ = [
    "Digits",
    "Drums",
    "audio_folder",
    "augment",
    "image_folder",
    "load_digits",
    "load_drums",
    "load_shakespeare",
    "load_tang_poems",
    "read_audio",
    "resample",
    "resize",
    "split_indices",
    "split_text",
    "text_file",
    "write_wav",
]
