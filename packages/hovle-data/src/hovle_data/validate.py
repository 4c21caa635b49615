"""Every problem of a data set before training: where it is, what it is, and how often each kind comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hovle_data import checks
from hovle_data.build import place, read_row
from hovle_data.mixture import Source
from hovle_data.order import hash64
from hovle_data.processors import load_counter
from hovle_data.schema import BadSample, Sample
from hovle_data.workers import progress, work

CHUNK = 256


@dataclass(frozen=True)
class Limits:
    """What else to hold a sample against. A processor's refusal and a length above `max_tokens` are problems."""

    check_images: bool = True
    processor: str | None = None
    max_tokens: int | None = None


@dataclass
class Report:
    """num_samples counts repeated rows once. problems: all of them, in the order of the data."""

    num_samples: int = 0
    problems: list[BadSample] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(problem.category for problem in self.problems)

    @property
    def num_bad(self) -> int:
        """Samples with at least one problem; those of a whole source or tar have no key."""
        return len({(problem.source, problem.key) for problem in self.problems if problem.key})

    def as_json(self) -> dict[str, Any]:
        return {
            "samples": self.num_samples,
            "bad_samples": self.num_bad,
            "reasons": dict(self.reasons.most_common()),
            "problems": [{"source": p.source, "key": p.key, "reason": p.reason} for p in self.problems],
        }


def validate(sources: Sequence[Source], limits: Limits | None = None, workers: int = 1) -> Report:
    """Look at every sample of every source, in parallel, and never stop at a bad one."""
    report, limits = Report(), limits or Limits()
    for source in sources:
        length = _length(source)
        report.num_samples += length
        of_files = [*getattr(source, "problems", ()), *getattr(source, "changed", tuple)()]
        report.problems += [BadSample("", *_split(problem)) for problem in of_files]
        chunks = [range(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
        results = work(_look, (source, limits), chunks, workers)
        names = []
        for _, found, hashes in progress(results, "validating", length, lambda result: result[0]):
            report.problems += found
            names.append(hashes)
        report.problems += _duplicates(source, np.concatenate(names))
    return report


def _look(shared: tuple[Source, Limits], rows: range) -> tuple[int, list[BadSample], NDArray[np.uint64]]:
    """One chunk: how many rows, what is wrong with them, and hashes of their ids (0: it has none)."""
    source, limits = shared
    found: list[BadSample] = []
    hashes = np.zeros(len(rows), np.uint64)
    for n, i in enumerate(rows):
        where = place(source, i)
        try:
            sample = read_row(source, i)
        except BadSample as bad:
            found += [
                BadSample(bad.key, bad.source or where, reason) for reason in (bad.reason, *bad.further)
            ]
            continue
        hashes[n] = hash64("id", _id(sample)) or 1
        reasons = list(checks.problems(sample, limits.check_images)) or list(_refusals(sample, limits))
        found += [BadSample(sample.key, where, reason) for reason in reasons]
    return len(rows), found, hashes


def _refusals(sample: Sample, limits: Limits) -> Iterator[str]:
    if limits.processor is None:
        return
    try:
        tokens = len(checks.encode(load_counter(limits.processor), sample).input_ids)
    except BadSample as bad:
        yield bad.reason
    except ValueError as error:
        yield f"does not encode: {error}"
    else:
        if limits.max_tokens is not None and tokens > limits.max_tokens:
            yield f"too long: {tokens} tokens > max_tokens {limits.max_tokens}"


def _duplicates(source: Source, hashes: NDArray[np.uint64]) -> list[BadSample]:
    """Samples whose id came before. Eight bytes a sample find the candidates; those are read again and compared."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    first: dict[str, tuple[str, Any]] = {}
    found = []
    for i in np.flatnonzero((counts[inverse] > 1) & (hashes != 0)).tolist():
        sample, where = read_row(source, i), place(source, i)
        name, row = _id(sample), sample.meta.get("from")
        if name not in first:
            first[name] = where, row
        elif row != first[name][1] or ":" not in str(
            row
        ):  # the same line again: a repetition that was asked for
            found.append(BadSample(sample.key, where, f"duplicate id: {name}, first in {first[name][0]}"))
    return found


def _id(sample: Sample) -> str:
    name = str(sample.meta.get("id", sample.key))
    return f"{sample.meta['set']}/{name}" if "set" in sample.meta else name


def _length(source: Source) -> int:
    """Without repetitions, of a source that repeats itself."""
    return int(getattr(source, "num_unique", len(source)))


def _split(problem: str) -> tuple[str, str]:
    """A `problems` line of a shard source, "place: what", as (place, reason)."""
    where, _, what = problem.partition(": ")
    return where, what
