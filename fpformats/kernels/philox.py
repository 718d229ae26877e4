"""Counter-based random words: Philox4x32-10, the same for every library, device and shape.

Element i of an array, counted in row-major order, takes the first word of the block whose counter
is i and whose key is the seed (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def random_words(xp: ModuleType, x: Any, seed: int, bits: int) -> Any:
    """Give each element of an array its random word.

    Args:
        xp: The library of `x`, numpy or torch.
        x: Array that gives the shape and device of the words.
        seed: The seed, 0 to 2**64 - 1.
        bits: Width of the words, 1 to 32.

    Returns:
        Array of int64 words from 0 to 2**bits - 1: the high bits of the generator's words.
    """
    device = {"device": x.device} if hasattr(x, "device") else {}
    index = xp.arange(math.prod(x.shape), dtype=xp.int64, **device)
    zero = index & 0
    counter = (index & LOW, index >> 32, zero, zero)
    word, *_ = philox(counter, (seed & LOW, seed >> 32))
    return (word >> (32 - bits)).reshape(x.shape)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Give the four words of a block, in int64 arithmetic that wraps as unsigned arithmetic does.

    Args:
        counter: Four arrays of int64 from 0 to 2**32 - 1.
        key: Two integers from 0 to 2**32 - 1.

    Returns:
        Four arrays of int64 from 0 to 2**32 - 1.
    """
    a, b, c, d = counter
    for step in range(ROUNDS):
        first, second = ((k + step * w) & LOW for k, w in zip(key, KEY_STEPS, strict=True))
        low_a, high_a = _product(a, MULTIPLIERS[0])
        low_c, high_c = _product(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return a, b, c, d


def _product(words: Any, factor: int) -> tuple[Any, Any]:
    """Give the low and high halves of 32 by 32 bit products; these may wrap to negative int64."""
    product = words * factor
    return product & LOW, (product >> 32) & LOW
