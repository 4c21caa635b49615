"""Weighted mixtures of sources whose draws are a function of the position."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hovle_data.order import hash64, position_to_index
from hovle_data.schema import Sample

logger = logging.getLogger(__name__)

MAX_BLOCK = 4096
Weight = float | Mapping[int, float]


class Source(Protocol):
    """What a dataset plugin builds: random access to samples, `BadSample` for those it cannot read.

    Optional: `name` (prefix of keys in batches), `where(i) -> str` (the place named in the ledger).
    """

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Sample: ...


class Draw(NamedTuple):
    """One draw, read. `where` is the place to name in the ledger."""

    source_name: str
    where: str
    sample: Sample


class Phase(NamedTuple):
    """A stretch of positions with the same weights. `walked` is how often each source was drawn before it."""

    start: int
    counts: tuple[int, ...]
    walked: tuple[int, ...]


class Mixture:
    """Endless draws from several sources: position k -> (source, sample), the same in every process and run.

    sources: (source, weight) pairs; weights are shares of the draws and need not sum to one. Positions fall
        into blocks (at most 4096 long) and every block has exactly its phase's `counts` draws of each source,
        shuffled. Weights whose common denominator is larger than that are rounded, no source below one draw a
        block. A curriculum gives a mapping {position: weight} instead: the weight from that position on, zero
        before the first and wherever it says zero.
    seed: of the shuffles. Each source is walked in epochs: every sample once before any comes again, whatever the
        weights become.
    """

    def __init__(self, sources: Sequence[tuple[Source, Weight]], seed: int) -> None:
        if not sources:
            raise ValueError("sources is empty: give at least one (source, weight)")
        self.sources = [source for source, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.seed = seed
        self.names = [str(getattr(source, "name", f"source{j}")) for j, source in enumerate(self.sources)]
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"sources share a name: {self.names}; give each another name=, keys are prefixed with it"
            )
        for name, source, weight in zip(self.names, self.sources, self.weights, strict=True):
            if len(source) == 0:
                raise ValueError(f"source {name} is empty: leave it out")
            check_weight(weight, f"weight of {name}")
        self.phases = _phases(self.weights, seed)
        self._warn_of_rounding()

    @property
    def num_samples(self) -> int:
        """Samples in all sources."""
        return sum(len(source) for source in self.sources)

    def _warn_of_rounding(self) -> None:
        for start, counts, _ in self.phases:
            now = [_weight_at(weight, start) for weight in self.weights]
            for name, weight, count in zip(self.names, now, counts, strict=True):
                asked, drawn = weight / sum(now), count / sum(counts)
                if weight and not 0.9 < drawn / asked < 1.1:
                    logger.warning(
                        "%s: its weight asks for %.2g of the draws and it gets %.2g", name, asked, drawn
                    )

    def apart_from(self, other: Mixture) -> Mixture:
        """This mixture, with another seed where its shuffles would follow the other one's: of lengths between the same
        powers of two, permutations of one seed agree on many positions, of equal lengths on all."""
        sizes = [{(len(source) - 1).bit_length() for source in mixture.sources} for mixture in (self, other)]
        if self.seed != other.seed or sizes[0].isdisjoint(sizes[1]):
            return self
        return Mixture(list(zip(self.sources, self.weights, strict=True)), hash64("apart", self.seed))

    def draw(self, k: int) -> tuple[int, int]:
        """Position k = 0, 1, 2, ... -> (source_index, sample_index). Costs one block, wherever k is."""
        if k < 0:
            raise IndexError(f"position {k} is negative")
        number = bisect_right(self.phases, k, key=lambda phase: phase.start) - 1
        start, counts, before = self.phases[number]
        block, position = divmod(k - start, sum(counts))
        if sum(counts) == 1:  # one source: there is nothing to shuffle, and every position would be a block
            j, ordinal = counts.index(1), 0
        else:
            of_source, ordinals = _block(counts, _phase_seed(self.seed, number), block)
            j, ordinal = int(of_source[position]), int(ordinals[position])
        walked = before[j] + block * counts[j] + ordinal
        _, i = position_to_index(walked, len(self.sources[j]), hash64("source", self.seed, j))
        return j, i

    def read(self, k: int) -> Draw:
        """Draw and read position k. Raises `BadSample` naming the place if it does not read or validate."""
        j, i = self.draw(k)
        where = self.where(j, i)
        return Draw(self.names[j], where, self.sources[j][i].validate(where))

    def where(self, j: int, i: int) -> str:
        """The place of sample i of source j, as the ledger names it."""
        where = getattr(self.sources[j], "where", None)
        return str(where(i)) if callable(where) else self.names[j]


def check_weight(weight: float | Mapping[Any, float], what: str = "weight") -> None:
    """Raises ValueError for a weight that is not positive, or a curriculum that is never or nowhere drawn."""
    if not isinstance(weight, Mapping):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{what} is {weight}: give a positive number, or leave the source out")
        return
    if any(start < 0 for start in weight) or any(not (w >= 0 and math.isfinite(w)) for w in weight.values()):
        raise ValueError(f"{what} is {dict(weight)}: neither starts nor weights may be negative")
    if not any(weight.values()):
        raise ValueError(f"{what} is {dict(weight)}: it is never drawn, leave the source out")


def _phases(weights: Sequence[Weight], seed: int) -> list[Phase]:
    """Where any weight changes a phase begins; sources go on where their earlier phases left them."""
    phases: list[Phase] = []
    walked = (0,) * len(weights)
    changes = {start for weight in weights if isinstance(weight, Mapping) for start in weight}
    for start in sorted({0, *changes}):
        now = [_weight_at(weight, start) for weight in weights]
        if not any(now):
            raise ValueError(f"no source has a weight from position {start} on: give at least one")
        if phases:
            last = phases[-1]
            blocks, rest = divmod(start - last.start, sum(last.counts))
            of_source, _ = _block(last.counts, _phase_seed(seed, len(phases) - 1), blocks)
            partial = np.bincount(of_source[:rest], minlength=len(weights))
            walked = tuple(
                w + blocks * count + int(more)
                for w, count, more in zip(walked, last.counts, partial, strict=True)
            )
        phases.append(Phase(start, _block_counts(now), walked))
    return phases


def _weight_at(curriculum: Weight, position: int) -> float:
    """The weight at a position."""
    if not isinstance(curriculum, Mapping):
        return curriculum
    started = [start for start in curriculum if start <= position]
    return curriculum[max(started)] if started else 0.0


def _phase_seed(seed: int, number: int) -> int:
    return seed if number == 0 else hash64("phase", seed, number)


def _block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of the weights; rounded (largest remainder) above MAX_BLOCK."""
    exact = [
        Fraction(str(weight)) for weight in weights
    ]  # str: 0.3 means 3/10, not the nearest binary fraction
    denominator = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= MAX_BLOCK:
        return tuple(counts)
    floors = [max(1, count * MAX_BLOCK // total) if count else 0 for count in counts]
    remainders = sorted(range(len(counts)), key=lambda j: (-(counts[j] * MAX_BLOCK % total), j))
    for j in remainders[: max(0, MAX_BLOCK - sum(floors))]:
        floors[j] += 1
    return tuple(floors)


@lru_cache(maxsize=64)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One block's shuffled sources `[size]`, and for each draw how many of its source came before it."""
    of_source = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(
        _mix64(np.arange(len(of_source), dtype=np.uint64) ^ np.uint64(hash64("mixture", seed, block)))
    )
    of_source = of_source[order]
    ordinals = np.empty_like(of_source)
    for j, count in enumerate(counts):
        ordinals[of_source == j] = np.arange(count)
    return of_source, ordinals


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`order.mix64` for arrays; a bijection, so no two positions tie in the shuffle."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
