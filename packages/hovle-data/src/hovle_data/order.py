"""Counter-based order: what stands at position k is a function of (seed, k), so seeking costs nothing.

No generator holds a state: one would have to be saved, replayed after a restart and kept apart between
workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def hash64(*parts: int | str) -> int:
    """64 random-looking bits that are the same in every process, Python and numpy version."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def uniform(low: int, high: int, *parts: int | str) -> int:
    """An integer in low..high, both included, by the counter `parts`."""
    if high < low:
        raise ValueError(f"empty range {low}..{high}: high must be at least low")
    return low + hash64(*parts) % (high - low + 1)


def mix64(x: int) -> int:
    """The finaliser of splitmix64: spreads every input bit over the whole word."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Permutation:
    """A shuffle of 0..n-1 that is never written down: O(1) memory, a few microseconds a call.

    A Feistel network permutes the smallest power of two that holds n; results outside 0..n-1 walk on along
    their cycle, which keeps it a bijection (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002).
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"n={n}: a permutation needs at least one element")
        self.n = n
        self.seed = seed
        bits = (n - 1).bit_length()
        self._low_bits = bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits - self._low_bits)) - 1
        self._keys = tuple(hash64("permutation", seed, r) for r in range(_ROUNDS))

    def __len__(self) -> int:
        return self.n

    def __call__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"position {i} is outside 0..{self.n - 1}")
        i = self._feistel(i)
        while i >= self.n:
            i = self._feistel(i)
        return i

    def __iter__(self) -> Iterator[int]:
        return map(self, range(self.n))

    def _feistel(self, i: int) -> int:
        low, high = i & self._low_mask, i >> self._low_bits
        for r in range(
            0, _ROUNDS, 2
        ):  # each half is only ever xor-ed with a function of the other: invertible
            high ^= (mix64(low ^ self._keys[r]) >> 32) & self._high_mask
            low ^= (mix64(high ^ self._keys[r + 1]) >> 32) & self._low_mask
        return (high << self._low_bits) | low


@lru_cache(maxsize=256)  # a run looks at few epochs at a time; building one costs its round keys
def _epoch_permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation(n, hash64("epoch", seed, epoch))


def position_to_index(k: int, n: int, seed: int) -> tuple[int, int]:
    """Position k of an endless walk over n samples -> (epoch, index); each epoch is a new permutation."""
    epoch, position = divmod(k, n)
    return epoch, _epoch_permutation(n, seed, epoch)(position)
