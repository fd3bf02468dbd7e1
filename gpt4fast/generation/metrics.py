"""Plain measures of generated text: are its words words, and are they its own?"""

from __future__ import annotations

import re

WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")


def words(text: str) -> list[str]:
    """Lower-case words of letters, inner apostrophes and hyphens kept ("o'er", "love-sick")."""
    return [word.lower() for word in WORD.findall(text)]


def word_share(text: str, corpus: str) -> float:
    """The share of the words of `text` that occur in `corpus`, 0 to 1; 0 for a text without words."""
    known = set(words(corpus))
    written = words(text)
    return sum(word in known for word in written) / len(written) if written else 0.0


def longest_copy(text: str, corpus: str) -> str:
    """The longest stretch of characters of `text` that stands in `corpus` word for word."""
    best = ""
    start = 0
    for end in range(1, len(text) + 1):
        # text[start:end] is the longest suffix found so far: both ends only move forward.
        while text[start:end] not in corpus:
            start += 1
        if end - start > len(best):
            best = text[start:end]
    return best
