"""From a trained model to text, pictures, sound and moving pictures."""

from gpt4fast.generation.metrics import longest_copy, word_share
from gpt4fast.generation.text import continue_text, generate

__all__ = ["continue_text", "generate", "longest_copy", "word_share"]
