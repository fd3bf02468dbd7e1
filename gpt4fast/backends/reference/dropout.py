"""The dropout of attention's weights: a counter-based random number for each weight, in plain integer operations.

Which weights are kept depends on the seed and on a weight's place alone, so the backward pass draws them again instead
of storing them, and every implementation that draws them so keeps the same ones. Philox4x32-10: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def draw_seed(query: Tensor) -> Tensor:
    """A seed, int64 (1,), from torch's generator of query's device."""
    return torch.randint(2**63 - 1, (1,), device=query.device)


def keep_mask(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """True where the weight of key ``j`` for query ``i`` of head ``h`` in batch row ``b`` is kept: bool, of the shape
    (B, Hq, Lq, Lk), each kept with probability ``1 - dropout_p``.

    One evaluation serves the four keys that lie 16 apart in a block of 64: counter ``(j // 64 * 16 + j % 16, i, h, b)``
    and key ``(low, high)`` of the seed give words number ``j % 64 // 16``.
    """
    batch, heads, rows, columns = shape
    blocks = -(-columns // 64)
    b, h, i, counter = (torch.arange(n, device=seed.device) for n in (batch, heads, rows, blocks * 16))
    place = counter, i[:, None], h[:, None, None], b[:, None, None, None]
    words = philox(place, (seed & WORD, (seed >> 32) & WORD))
    in_blocks = torch.stack([word.unflatten(-1, (blocks, 16)) for word in words], -2)  # (…, blocks, 4, 16)
    return in_blocks.flatten(-3)[..., :columns] >= int(dropout_p * 2**32)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random 32-bit words for each counter of four words; all of them int64 tensors, broadcast."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(10):
        # A product of two 32-bit words fills all 64 bits; what int64 takes for its sign is cut off again.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((right >> 32) & WORD) ^ b ^ low, right & WORD
        c, d = ((left >> 32) & WORD) ^ d ^ high, left & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a, b, c, d
