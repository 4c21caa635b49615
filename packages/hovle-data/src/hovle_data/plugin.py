"""hovle-data as a plugin: the WebDataset reader and `hovle data`. Imports no torch."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from hovle_core.hookspecs import hookimpl
from hovle_core.registry import Spec

HOVLE_HOOK_API = 1


@hookimpl
def hovle_datasets() -> list[Spec]:
    return [
        Spec(
            "webdataset",
            "hovle_data.shards:ShardSource",
            summary="a folder of WebDataset tars, by byte offset",
        )
    ]


@hookimpl
def hovle_commands(cli: Any) -> None:
    data = cli.add_parser("data", help="look into training data")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="count the samples of a folder of shards and show the first ones"
    )
    inspect.add_argument("path", help="folder of .tar shards")
    inspect.add_argument(
        "--first", type=int, default=3, metavar="N", help="samples to show (default: %(default)s)"
    )
    inspect.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Print counts by kind, what is damaged and the first records. Exit code 1 if anything is bad."""
    from hovle_data.schema import BadSample
    from hovle_data.shards import ShardSource

    source = ShardSource(args.path)
    kinds: Counter[str] = Counter()
    bad: list[BadSample] = []
    num_images = num_bytes = 0
    first: list[str] = []
    for i in range(len(source)):
        try:
            sample = source[i].validate(source.where(i))
        except BadSample as error:
            bad.append(error)
            continue
        kinds[sample.kind] += 1
        num_images += len(sample.images)
        num_bytes += sum(map(len, sample.images))
        if len(first) < args.first:
            text = sample.text if sample.messages is None else " | ".join(map(_turn, sample.messages))
            first.append(f"{sample.key}: {sample.kind}, {len(sample.images)} images: {_short(text or '')}")
    manifest = source.manifest()
    print(
        f"{source.path}: {manifest['samples']} samples in {manifest['shards']} shards, sha256 {manifest['sha256'][:16]}"
    )
    print(
        "  " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "  nothing readable"
    )
    print(f"  {num_images} images, {num_bytes / 2**20:.1f} MiB (tokens depend on the processor)")
    for line in first:
        print(f"  {line}")
    for problem in source.problems:
        print(f"  PROBLEM {problem}")
    for sample_problem in bad[:10]:
        print(f"  BAD {sample_problem}")
    if bad:
        commonest = ", ".join(
            f"{n}x {reason}" for reason, n in Counter(b.category for b in bad).most_common()
        )
        print(f"  {len(bad)} bad samples: {commonest}")
    return 1 if bad or source.problems else 0


def _turn(message: Any) -> str:
    content = message["content"]
    if not isinstance(content, str):
        content = " ".join(part["text"] if part["type"] == "text" else "<image>" for part in content)
    return f"{message['role']}: {content}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:119] + "…"
