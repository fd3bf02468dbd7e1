"""Deterministic, disjoint train / validation / test splits."""

from __future__ import annotations

import torch

SPLITS = ("train", "validation", "test")


def check_split(split: str) -> str:
    """Returns `split`; raises ValueError if it is not "train", "validation" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split


def split_indices(n: int, seed: int = 0, *, validation: float = 0.1, test: float = 0.1) -> dict[str, torch.Tensor]:
    """Shuffles 0..n-1 and cuts it in three.

    The same (n, seed, validation, test) always gives the same split, whatever the global random state.

    Args:
        n: number of examples, at least 1.
        seed: seed of the shuffle.
        validation, test: shares in [0, 1) of the two held-out parts, rounded down; the rest is for training.

    Returns:
        {"train", "validation", "test"}: sorted int64 indices, disjoint, together 0..n-1.

    Raises:
        ValueError: n < 1, a share outside [0, 1), or nothing left to train on.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be a share in [0, 1), got {share}")
    n_validation, n_test = int(n * validation), int(n * test)
    if n_validation + n_test >= n:
        raise ValueError(f"validation + test = {validation + test} leaves none of the {n} examples to train on")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = order.split([n - n_validation - n_test, n_validation, n_test])
    return {name: part.sort().values for name, part in zip(SPLITS, parts, strict=True)}
