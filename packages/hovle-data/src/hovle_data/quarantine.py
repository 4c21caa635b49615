"""The ledger of bad samples: counted, named once, never hidden."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path

from hovle_data.schema import BadSample


class TooManyBadSamples(ValueError):
    """The share of bad samples is above what the run allows."""


class Ledger:
    """Counts what a run reads and appends each bad sample once to a JSON-lines file {"shard", "key", "reason"}.

    path: the file, None to count only. A sample already in it (from before a restart) is not written again,
        so a resumed run and an uninterrupted one leave the same file. Ranks do not share a file: give rank r
        `Ledger.rank_path(run, r)`, and `merge(run)` makes one file of them.
    max_share: share of bad samples above which `seen` and `record` raise `TooManyBadSamples` with the three
        commonest reasons. Of fewer than `min_seen` samples it is judged as if the rest of them were good: one bad
        sample among the first ten stops nothing, five do. Counts and share are this process's own: a restart
        begins at zero.

    Every attempt counts, so a bad sample met in two epochs counts twice, as do the good ones. Safe to use
    from threads.
    """

    def __init__(self, path: str | Path | None = None, max_share: float = 0.01, min_seen: int = 200) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(
                f"max_share={max_share}: give a share between 0 and 1, such as 0.01 for one percent"
            )
        self.path = None if path is None else Path(path)
        self.max_share = max_share
        self.min_seen = min_seen
        self.num_seen = 0
        self.num_bad = 0
        self.num_truncated = 0
        self.reasons: Counter[str] = Counter()
        self._examples: dict[str, BadSample] = {}
        self._lock = threading.Lock()
        self._written, self._torn_at = (set(), None) if self.path is None else _read(self.path)

    @staticmethod
    def rank_path(folder: str | Path, rank: int) -> Path:
        """The file of one rank: quarantine-rank{r}.jsonl."""
        return Path(folder) / f"quarantine-rank{rank}.jsonl"

    @staticmethod
    def merge(folder: str | Path) -> None:
        """Write what the ranks' files name into `folder`/quarantine.jsonl: each sample once, in order of shard and key,
        so that it does not tell how many ranks there were. Without such a file nothing is written."""
        lines: dict[tuple[str, str], str] = {}
        for path in sorted(Path(folder).glob("quarantine-rank*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # not a line that is being written
                record = json.loads(line)
                lines.setdefault((record["shard"], record["key"]), line)
        if lines:
            temporary = Path(folder) / f".quarantine-{os.getpid()}"
            temporary.write_text("".join(lines[name] + "\n" for name in sorted(lines)), encoding="utf-8")
            temporary.replace(Path(folder) / "quarantine.jsonl")

    def seen(self, count: int = 1) -> None:
        """Count samples that were looked at, good or bad."""
        with self._lock:
            self.num_seen += count
            self._check()

    def record(self, bad: BadSample) -> None:
        """Count a bad sample (after `seen` has counted it as looked at) and write it unless it is in the file."""
        with self._lock:
            self.num_bad += 1
            self.reasons[bad.category] += 1
            self._examples.setdefault(bad.category, bad)
            name = (bad.source, bad.key)
            if name not in self._written:
                self._written.add(name)
                self._append({"shard": bad.source, "key": bad.key, "reason": bad.reason})
            self._check()

    def truncated(self) -> None:
        """Count a sample that was cut to fit; it is not bad."""
        with self._lock:
            self.num_truncated += 1

    def _append(self, record: dict[str, str]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if self._torn_at is not None:
                os.ftruncate(descriptor, self._torn_at)
                self._torn_at = None
            os.write(descriptor, (json.dumps(record) + "\n").encode())  # one write: lines never mix
        finally:
            os.close(descriptor)

    def _check(self) -> None:
        if self.num_bad <= self.max_share * max(self.num_seen, self.min_seen):
            return
        commonest = "; ".join(
            f"{count}x {reason} (such as {self._examples[reason]})"
            for reason, count in self.reasons.most_common(3)
        )
        raise TooManyBadSamples(
            f"{self.num_bad} of {self.num_seen} samples are bad, more than max_share={self.max_share}: {commonest}. "
            f"Mend the data, or raise max_share. All are named in {self.path or 'no file: the ledger has no path'}"
        )


def _read(path: Path) -> tuple[set[tuple[str, str]], int | None]:
    """The (shard, key) already written, and where a last line begins that a kill cut short, else None."""
    if not path.exists():
        return set(), None
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    written = set()
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            record = json.loads(line)
            written.add((record["shard"], record["key"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a ledger record; move the file away") from None
    return written, end if end < len(data) else None
