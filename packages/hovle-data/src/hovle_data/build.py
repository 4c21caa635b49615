"""Sources -> shards with an index, in parallel; killed and started again, it gives the same bytes.

While it works all lies in OUT.building: finished tars, and in `.work` a marker for each of them. A tar depends on its
own rows only, so neither the number of workers nor a restart can change it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hovle_data import checks
from hovle_data.index import Member, Record, ShardIndex, ShardInfo
from hovle_data.mixture import Source
from hovle_data.processors import load_counter
from hovle_data.quarantine import TooManyBadSamples
from hovle_data.records import to_fields
from hovle_data.schema import BadSample, Sample
from hovle_data.shards import write_shard
from hovle_data.spec import BuildSpec, prefix
from hovle_data.storage import is_url, printable
from hovle_data.workers import progress, work

WORK, LEDGER = ".work", "quarantine.jsonl"


@dataclass(frozen=True)
class Task:
    """One shard: rows start..stop-1 of a source."""

    name: str
    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Job:
    """What the workers share."""

    sources: tuple[Source, ...]
    folder: Path
    processor: str | None
    check_images: bool


def plan(sources: Sequence[Source], samples_per_shard: int) -> list[Task]:
    """The shards to write, in the order of their names."""
    tasks = [
        Task(f"{prefix(source)}-{number:06d}.tar", j, start, min(start + samples_per_shard, len(source)))
        for j, source in enumerate(sources)
        for number, start in enumerate(range(0, len(source), samples_per_shard))
    ]
    return sorted(tasks, key=lambda task: task.name)


def build(
    spec: BuildSpec, sources: Sequence[Source], out: Path, workers: int = 1, restart: bool = False
) -> ShardIndex:
    """Write `out`: shards, index.json, index.safetensors and quarantine.jsonl; the folder appears whole or not at all.

    What a killed build left in OUT.building is taken up; restart: throw it away. Samples that `checks.problems`
    finds fault with, or that the processor refuses, are left out and named in quarantine.jsonl. Keys are
    "<source>-<row>"; the record's own id and place stay in `meta` as "id" and "from".

    Raises ValueError if `out` exists, another build is at it or it was begun from other data,
    `TooManyBadSamples` with the three commonest reasons above `spec.max_bad_share`.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it, or build into another folder")
    folder = out.with_name(out.name + ".building")
    total = sum(map(len, sources))
    with _locked(folder):
        work_folder = _begin(folder, _fingerprint(spec, sources), restart)
        job = Job(tuple(sources), folder, spec.processor, spec.check_images)
        tasks = plan(sources, spec.samples_per_shard)
        reasons: Counter[str] = Counter()
        markers = work(build_shard, job, tasks, workers)
        for marker in progress(markers, f"building {out.name}", total, lambda m: int(m["rows"])):
            reasons.update(BadSample(**bad).category for bad in marker["bad"])
            if reasons.total() > spec.max_bad_share * total:
                raise TooManyBadSamples(
                    f"{reasons.total()} bad samples so far, more than max_bad_share={spec.max_bad_share} of {total}: "
                    f"{commonest(reasons)}. 'hovle data validate' names them all; mend them or raise it, start again"
                )
        shards = [shard for task in tasks if (shard := _finished(work_folder, task.name)) is not None]
        if not shards:
            raise ValueError(f"no sample for {out} is usable: {commonest(reasons)}")
        index = ShardIndex(tuple(shards))
        index.save(folder)
        _write_ledger(folder / LEDGER, work_folder, tasks)
        for left in folder.glob("*.tmp"):  # of killed workers
            left.unlink()
        shutil.rmtree(work_folder)
        folder.rename(out)
    loaded = ShardIndex.load(out)
    assert loaded is not None
    return loaded


def build_shard(job: Job, task: Task) -> dict[str, Any]:
    """Write one tar and its marker, unless they are there; returns {"rows", "bad"}."""
    marker = _marker(job.folder / WORK, task.name)
    path = job.folder / task.name
    if marker.exists():
        content: dict[str, Any] = json.loads(marker.read_bytes())
        whole = not content["samples"] or (path.exists() and path.stat().st_size == content["bytes"])
        unchanged = content["state"] == _state(job, task)
        if whole and unchanged and not content["bad"]:  # a bad sample may have been mended since
            return {"rows": content["rows"], "bad": content["bad"]}
    state = _state(job, task)  # before the rows are read: what changes meanwhile is then noticed
    bad: list[dict[str, str]] = []
    counts: dict[str, list[int]] = {"tokens": [], "tiles": []} if job.processor else {}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    info = write_shard(_good_samples(job, task, bad, counts), temporary)
    if info.records:
        temporary.rename(path)
    else:
        temporary.unlink()
        path.unlink(missing_ok=True)
    content = {
        "rows": task.stop - task.start,
        "state": state,
        "samples": len(info.records),
        "bytes": info.size,
        "sha256": info.sha256,
        "bad": bad,
        "counts": counts,
        "records": [[r.key, [[m.field, m.offset, m.size] for m in r.members]] for r in info.records],
    }
    unfinished = marker.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, separators=(",", ":")))
    unfinished.replace(marker)
    return {"rows": content["rows"], "bad": bad}


def _state(job: Job, task: Task) -> str:
    """Changes with the rows of a shard, of sources that can tell; pictures in files beside them are not looked at."""
    of_row = getattr(job.sources[task.source], "state", None)
    if not callable(of_row):
        return ""
    return hashlib.sha256("".join(map(of_row, range(task.start, task.stop))).encode()).hexdigest()


def place(source: Source, i: int) -> str:
    """Where sample i comes from, as a person would look for it."""
    where = getattr(source, "where", None)
    return printable(str(where(i))) if callable(where) else f"{prefix(source)}: sample {i}"


def read_row(source: Source, i: int) -> Sample:
    """Sample i. Raises `BadSample`; ValueError naming the place for any other error, which is the source's fault."""
    try:
        return source[i]
    except BadSample:
        raise
    except Exception as error:
        raise ValueError(f"{place(source, i)}: the source failed: {type(error).__name__}: {error}") from error


def commonest(reasons: Counter[str]) -> str:
    return "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common(3))


def _good_samples(
    job: Job, task: Task, bad: list[dict[str, str]], counts: dict[str, list[int]]
) -> Iterator[dict[str, str | bytes]]:
    source = job.sources[task.source]
    for i in range(task.start, task.stop):
        where = place(source, i)
        try:
            sample = read_row(source, i)
            if reason := next(checks.problems(sample, job.check_images and job.processor is None), None):
                raise BadSample(sample.key, where, reason)
            meta = {
                "id": printable(sample.key),
                "from": where.rpartition("/")[2],
                **sample.meta,
            }  # built again: from the first
            fields = to_fields(replace(sample, key=f"{prefix(source)}-{i:08d}", meta=meta))
            if job.processor is not None:
                encoded = _encoded(job.processor, sample, where)
                counts["tokens"].append(len(encoded.input_ids))
                counts["tiles"].append(len(encoded.tiles))
        except BadSample as error:
            bad.append({"key": error.key, "source": error.source or where, "reason": error.reason})
            continue
        yield fields


def _encoded(processor: str, sample: Sample, where: str) -> Any:
    try:
        return checks.encode(load_counter(processor), sample)
    except BadSample as error:
        raise BadSample(sample.key, where, error.reason) from error
    except ValueError as error:
        raise BadSample(sample.key, where, f"does not encode: {error}") from error


def _marker(work_folder: Path, name: str) -> Path:
    return work_folder / f"{name}.json"


class _MarkedRecords(Sequence[Record]):
    """The records of a marker, read each time they are walked: those of all shards need not fit into memory."""

    def __init__(self, marker: Path, length: int) -> None:
        self.marker, self.length = marker, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Record]:
        for key, members in json.loads(self.marker.read_bytes())["records"]:
            yield Record(key, tuple(Member(*member) for member in members))

    def __getitem__(self, i: Any, /) -> Any:
        return list(self)[i]


def _finished(work_folder: Path, name: str) -> ShardInfo | None:
    marker = _marker(work_folder, name)
    content = json.loads(marker.read_bytes())
    if not content["samples"]:
        return None
    records = _MarkedRecords(marker, content["samples"])
    return ShardInfo(name, content["bytes"], content["sha256"], records, content["counts"])


def _write_ledger(path: Path, work_folder: Path, tasks: Sequence[Task]) -> None:
    written: set[str] = set()  # rows that are repeated are bad as often, and named once
    with path.open("w", encoding="utf-8") as file:
        for task in tasks:
            for bad in json.loads(_marker(work_folder, task.name).read_bytes())["bad"]:
                named = {
                    "shard": bad["source"],
                    "key": bad["key"],
                    "reason": bad["reason"],
                }  # as `Ledger` does
                line = json.dumps(named) + "\n"
                if line not in written:
                    file.write(line)
                written.add(line)


def _fingerprint(spec: BuildSpec, sources: Sequence[Source]) -> dict[str, Any]:
    """What decides the bytes, as far as a glance tells: settings, lengths, and the state of each path given, if its
    source does not know it row by row."""
    states = []
    for entry, source in zip(spec.sources, sources, strict=True):
        path = Path(entry.path)
        known = not hasattr(source, "state") and not is_url(entry.path) and path.is_file()
        states.append([len(source), path.stat().st_size, path.stat().st_mtime_ns] if known else [len(source)])
    settings = spec.model_dump(mode="json", exclude={"max_bad_share"})
    return {"spec": settings, "sources": states}


def _begin(folder: Path, fingerprint: dict[str, Any], restart: bool) -> Path:
    """The `.work` folder of a build that begins or goes on."""
    work_folder = folder / WORK
    begun = work_folder / "spec"
    if begun.exists() and not restart and json.loads(begun.read_bytes()) != fingerprint:
        raise ValueError(f"{folder} was begun from other data or settings; --restart throws it away")
    if restart or not begun.exists():
        for old in (*folder.glob("*.tar"), *folder.glob("*.tmp")):
            old.unlink()
        shutil.rmtree(work_folder, ignore_errors=True)
        work_folder.mkdir()
        unfinished = work_folder / "spec.tmp"
        unfinished.write_text(json.dumps(fingerprint))
        unfinished.rename(begun)
    return work_folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one build at a time in a folder; the lock goes with the process, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(folder.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another build is writing {folder}; wait for it, or end it") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
