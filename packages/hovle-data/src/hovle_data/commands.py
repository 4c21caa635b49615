"""`hovle data build | validate | inspect | clear-cache`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hovle_core.plugins import load_plugins
from hovle_core.registry import Registry
from hovle_data.mixture import Source
from hovle_data.sections import explain
from hovle_data.spec import BuildSpec, load_spec, open_sources, prefix
from hovle_data.storage import is_url
from hovle_data.workers import default_workers


def run_build(args: argparse.Namespace) -> int:
    """Write shards, or with --dry-run say what would be written."""
    from hovle_data import build

    spec = _spec(args)
    if is_url(args.out):
        raise ValueError(f"{args.out} is a URL; build into a folder here, then copy it there")
    options = {name: getattr(args, name) for name in ("samples_per_shard", "processor", "max_bad_share")}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        spec = BuildSpec.model_validate(spec.model_dump() | given)
    except ValidationError as error:
        raise ValueError("options are not valid:\n" + explain(error, BuildSpec)) from None
    sources = open_sources(spec, _registry(args))
    out = Path(args.out)
    if args.dry_run:
        _print_plan(spec, sources, out)
        return 0
    index = build.build(spec, sources, out, _workers(args), args.restart)
    total, bad = sum(map(len, sources)), sum(1 for _ in (out / build.LEDGER).open())
    print(f"{out}: {index.num_samples} samples in {len(index.shards)} shards, {index.size / 2**20:.1f} MiB")
    for name in ("tokens", "tiles"):
        if all(name in shard.counts for shard in index.shards):
            print(f"  {sum(int(sum(shard.counts[name])) for shard in index.shards)} {name}")
    if bad:
        print(f"  {bad} of {total} samples were left out and are named in {out / build.LEDGER}")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Print every problem and a summary by reason; exit code 1 if there is any."""
    from hovle_data.validate import Limits, validate

    spec = _spec(args)
    processor = args.processor or spec.processor
    if args.max_tokens is not None and processor is None:
        raise ValueError("--max-tokens needs --processor: tokens are its own")
    sources = open_sources(spec, _registry(args))
    limits = Limits(not args.no_images, processor, args.max_tokens)
    report = validate(sources, limits, _workers(args))
    if args.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        for problem in report.problems:
            print(problem)
        others = sum(1 for problem in report.problems if not problem.key)
        beside = f", {others} other problems" if others else ""
        print(f"{report.num_samples} samples, {report.num_bad} with problems{beside}")
        for reason, count in report.reasons.most_common():
            print(f"  {count} {reason}")
    return 1 if report.problems else 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print statistics and the first records, and write the contact sheet. Exit code 1 if anything is bad."""
    from hovle_data import inspect, sheet

    (source,) = _one(open_sources(_spec(args), _registry(args)), args.spec)
    statistics = inspect.look(source, args.first)
    print(inspect.describe(source, statistics))
    if args.html is not None:
        page = sheet.contact_sheet(source, statistics, args.processor, args.pictures)
        Path(args.html).write_text(page, encoding="utf-8", errors="backslashreplace")
        print(f"  wrote {args.html}: open it in a browser")
    return 1 if statistics.bad or getattr(source, "problems", None) else 0


def run_clear_cache(args: argparse.Namespace) -> int:
    from hovle_data.storage import FileCache, cache_folder

    folder = cache_folder() / "files"
    print(f"freed {FileCache(folder, 0).clear() / 2**20:.1f} MiB in {folder}")
    return 0


def _spec(args: argparse.Namespace) -> BuildSpec:
    options = {}
    for option in args.option:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ValueError(f"--option {option!r} must read key=value")
        options[key] = yaml.safe_load(value)
    return load_spec(args.spec, args.kind, options)


def _workers(args: argparse.Namespace) -> int:
    return default_workers() if args.workers is None else int(args.workers)


def _registry(args: argparse.Namespace) -> Registry:
    plugins: Any = getattr(args, "plugins", None) or load_plugins()
    registry: Registry = plugins.registry
    return registry


def _one(sources: Sequence[Source], spec: str) -> Sequence[Source]:
    if len(sources) != 1:
        raise ValueError(
            f"{spec} names {len(sources)} sources; inspect one of them, or what is built of them"
        )
    return sources


def _print_plan(spec: BuildSpec, sources: Sequence[Source], out: Path) -> None:
    """What a build would do, from a few samples of each source."""
    from hovle_data import build, checks
    from hovle_data.schema import BadSample

    tasks = build.plan(sources, spec.samples_per_shard)
    print(f"{out} would hold {len(tasks)} shards of {sum(map(len, sources))} samples:")
    for j, (entry, source) in enumerate(zip(spec.sources, sources, strict=True)):
        probes = sorted({len(source) * n // 16 for n in range(16)})
        size, kinds, bad = 0, set(), []
        for i in probes:
            try:
                sample = build.read_row(source, i)
            except BadSample as error:
                bad.append(str(error))
                continue
            bad += [f"{build.place(source, i)}: {reason}" for reason in checks.problems(sample)]
            kinds.add(sample.kind)
            size += sum(map(len, sample.images)) + len(checks.text_of(sample).encode("utf-8", "replace"))
        gib = size / max(1, len(probes) - len(bad)) * len(source) / 2**30
        shards = sum(task.source == j for task in tasks)
        print(
            f"  {prefix(source)} ({entry.name} {entry.path}): {len(source)} samples in {shards} shards, "
            f"about {gib:.2g} GiB, {', '.join(sorted(kinds)) or 'nothing readable'}"
        )
        for problem in bad:
            print(f"    BAD {problem}")
    print("nothing was written (--dry-run)")
    sys.stdout.flush()
