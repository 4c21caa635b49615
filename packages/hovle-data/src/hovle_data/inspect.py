"""What a source holds, in numbers and first records."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hovle_data.build import place, read_row
from hovle_data.checks import text_of
from hovle_data.mixture import Source
from hovle_data.schema import BadSample, Kind


@dataclass
class Statistics:
    """characters, images, image_bytes: of each good sample."""

    kinds: Counter[Kind] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    good: list[int] = field(default_factory=list)  # their positions in the source
    first: list[str] = field(default_factory=list)


def look(source: Source, first: int = 3) -> Statistics:
    """Read every sample once, without decoding pictures."""
    statistics = Statistics()
    for i in range(len(source)):
        where = place(source, i)
        try:
            sample = read_row(source, i).validate(where)
        except BadSample as error:
            statistics.bad.append(BadSample(error.key, error.source or where, error.reason))
            continue
        text = text_of(sample)
        statistics.good.append(i)
        statistics.kinds[sample.kind] += 1
        statistics.characters.append(len(text))
        statistics.images.append(len(sample.images))
        statistics.image_bytes.append(sum(map(len, sample.images)))
        if len(statistics.first) < first:
            line = _short(text.replace("\n", " | "))
            statistics.first.append(f"{sample.key}: {sample.kind}, {len(sample.images)} images: {line}")
    return statistics


def describe(source: Source, statistics: Statistics) -> str:
    """A few lines for the terminal."""
    title = f"{getattr(source, 'path', getattr(source, 'name', 'source'))}: "
    manifest = getattr(source, "manifest", None)
    if callable(manifest):
        of = manifest()
        title += f"{of['samples']} samples in {of['shards']} shards, sha256 {of['sha256'][:16]}"
    else:
        title += f"{len(source)} samples"
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(statistics.kinds.items()))
    size = sum(statistics.image_bytes) / 2**20
    lines = [
        title,
        f"  {kinds or 'nothing readable'}",
        f"  {sum(statistics.images)} images, {size:.1f} MiB, {sum(statistics.characters)} characters of text",
        *(f"  {line}" for line in statistics.first),
        *(f"  PROBLEM {problem}" for problem in getattr(source, "problems", ())),
        *(f"  BAD {bad}" for bad in statistics.bad[:10]),
    ]
    if statistics.bad:
        counted = Counter(bad.category for bad in statistics.bad).most_common()
        reasons = ", ".join(f"{n}x {reason}" for reason, n in counted)
        lines.append(f"  {len(statistics.bad)} bad samples: {reasons}")
    return "\n".join(lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:119] + "…"
