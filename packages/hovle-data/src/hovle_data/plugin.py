"""hovle-data as a plugin: its sources and `hovle data`. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from hovle_core.hookspecs import hookimpl
from hovle_core.registry import Spec

HOVLE_HOOK_API = 1


@hookimpl
def hovle_datasets() -> list[Spec]:
    return [
        Spec("webdataset", "hovle_data.shards:ShardSource", summary="WebDataset tars, by path or fsspec URL"),
        Spec(
            "internvl",
            "hovle_data.sources.chats:InternVLSource",
            summary="InternVL's meta JSON, or one of its JSONL files",
        ),
        Spec(
            "llava",
            "hovle_data.sources.chats:AnnotationSource",
            summary="LLaVA's list of rows, JSON or JSONL",
        ),
        Spec(
            "images",
            "hovle_data.sources.pictures:ImageFolderSource",
            summary="a folder of pictures, with .txt or .json beside them or without",
        ),
        Spec("text", "hovle_data.sources.texts:TextSource", summary="plain text, or JSONL rows with a text"),
        Spec("parquet", "hovle_data.sources.tables:ParquetSource", summary="Parquet files (extra: parquet)"),
        Spec(
            "datasets",
            "hovle_data.sources.tables:DatasetsSource",
            summary="what Dataset.save_to_disk of Hugging Face datasets wrote (extra: datasets)",
        ),
    ]


@hookimpl
def hovle_commands(cli: Any) -> None:
    data = cli.add_parser("data", help="build, check and look into training data")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_build(commands)
    _add_validate(commands)
    _add_inspect(commands)
    clear = commands.add_parser("clear-cache", help="delete the local copies of remote files")
    clear.set_defaults(run=_run("run_clear_cache"))


def _add_build(commands: Any) -> None:
    parser = _command(commands, "build", "write shards with an index; started again, it goes on where it was")
    parser.add_argument("out", metavar="OUT", help="folder to write; it appears when it is complete")
    parser.add_argument(
        "--samples-per-shard", type=_count, metavar="N", help="default: 1000, or the file's own"
    )
    parser.add_argument("--processor", metavar="CHECKPOINT", help="count tokens and tiles with its processor")
    parser.add_argument(
        "--max-bad-share",
        type=float,
        metavar="X",
        help="of samples; more fail (default: 0.01, or the file's own)",
    )
    parser.add_argument("--workers", type=_count, metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an earlier build left unfinished"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


def _add_validate(commands: Any) -> None:
    parser = _command(commands, "validate", "find every problem before training; exit code 1 if there is one")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--no-images", action="store_true", help="do not decode pictures")
    parser.add_argument("--processor", metavar="CHECKPOINT", help="also encode every sample")
    parser.add_argument(
        "--max-tokens", type=_count, metavar="N", help="name samples that are longer (--processor)"
    )
    parser.add_argument("--workers", type=_count, metavar="N", help="processes (default: one a core)")


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", "statistics and first records; with --html a page of pictures")
    parser.add_argument(
        "--first", type=int, default=3, metavar="N", help="records to print (default: %(default)s)"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a contact sheet, one file without other resources"
    )
    parser.add_argument(
        "--pictures", type=int, default=48, metavar="N", help="on the sheet (default: %(default)s)"
    )
    parser.add_argument("--processor", metavar="CHECKPOINT", help="whose tiles and tokens the sheet shows")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="YAML file of sources, or the path or URL of one source, its kind guessed",
    )
    parser.add_argument("--kind", help="what the path holds: a dataset of `hovle plugins list`")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the source, such as root=FOLDER",
    )
    parser.set_defaults(run=_run(f"run_{name}"))
    return parser


def _count(text: str) -> int:
    """A number that is at least 1; argparse says which option has another."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _run(name: str) -> Any:
    """The function of `commands`, imported when it runs: `hovle --help` has no use for pydantic."""

    def run(args: argparse.Namespace) -> int:
        from hovle_data import commands

        try:
            return int(getattr(commands, name)(args))
        except (FileNotFoundError, BrokenPipeError):  # which the hovle command knows
            raise
        except (
            OSError
        ) as error:  # no permission, no room, a folder where a file belongs, an unreachable store
            raise ValueError(str(error)) from error

    return run
