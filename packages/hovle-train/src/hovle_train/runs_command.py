"""`hovle runs`: which runs there are, what made one, and its curves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from hovle_train.run_table import RunInfo


def add_runs_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle runs list|show|plot` to the sub-parsers."""
    parser = cli.add_parser("runs", help="list runs, show what made one, draw its curves")
    commands = parser.add_subparsers(dest="runs_command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="all runs below a folder")
    listing.add_argument("folder", nargs="?", default="runs", help="default: runs")
    listing.set_defaults(run=run_list)
    show = commands.add_parser("show", help="stages, lineage and last metrics of a run or a pipeline")
    show.add_argument("path", metavar="RUN", help="the folder of a run or of a pipeline")
    show.set_defaults(run=run_show)
    plot = commands.add_parser("plot", help="draw loss, learning rate and tokens per second, as PNG and HTML")
    plot.add_argument("path", metavar="RUN", help="the folder of a run or of a pipeline")
    plot.add_argument("--out", help="folder for curves.png and curves.html (default: RUN)")
    plot.set_defaults(run=run_plot)
    for command in (listing, show, plot):
        command.set_defaults(tolerates_broken_plugins=True)


def run_list(args: argparse.Namespace) -> int:
    from hovle_train.run_table import RunInfo, find_runs

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {args.folder!r}; name the one that holds your runs")
    runs = {str(path): RunInfo(path) for path in find_runs(folder)}
    if not runs:
        raise ValueError(f"{args.folder} holds no run (a folder with a recipe.yaml)")
    _print(_stage_table(f"runs in {folder}", runs))
    return 0


def run_show(args: argparse.Namespace) -> int:
    from hovle_train.run_table import stages_of

    stages = stages_of(Path(args.path))
    if len(stages) > 1:
        _print(_stage_table(args.path, stages))
    for label, run in stages.items():
        if run.state != "not started":
            _print(_lineage_table(label, run))
    return 0


def run_plot(args: argparse.Namespace) -> int:
    from hovle_train.curves import write_curves
    from hovle_train.run_table import stages_of

    runs = {label: run for label, run in stages_of(Path(args.path)).items() if run.metrics}
    if not runs:
        raise ValueError(f"{args.path} has logged no metrics yet")
    facts = {label: _facts(run) for label, run in runs.items()}
    for path in write_curves(Path(args.out or args.path), Path(args.path).name, runs, facts):
        print(path)
    return 0


def _print(table: Table) -> None:
    from rich.console import Console

    # Piped into a file or grep, a row is a line, however long.
    Console(width=None if Console().is_terminal else 400).print(table)


def _stage_table(title: str, runs: Mapping[str, RunInfo]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in ("Run", "Stage", "State", "Tokens", "Time", "Last", "Finished"):
        table.add_column(column, justify="right" if column in ("Tokens", "Time") else "left")
    for label, run in runs.items():
        if run.state == "not started":
            table.add_row(Text(label), "", run.state)
            continue
        card = run.card
        tokens, seconds = card.get("tokens"), card.get("seconds")
        cells = [run.stage, run.state, f"{tokens:,}" if tokens else "", _duration(seconds), run.last]
        table.add_row(Text(label), *cells, card.get("finished_at", ""))
    return table


def _lineage_table(label: str, run: RunInfo) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{label}: {run.state}"), title_justify="left", show_header=False)
    for name, text in _facts(run).items():
        table.add_row(name, Text(text))
    return table


def _facts(run: RunInfo) -> dict[str, str]:
    """What made a run and how it went, in words, as far as it is known."""
    card = run.card
    ancestors = [f"{r.path.name} ({str(r.card.get('parent_weights') or '')[:12]})" for r in run.lineage()]
    last = run.metrics[-1] if run.metrics else {}
    facts: dict[str, Any] = {
        "folder": run.path,
        "stage": run.stage,
        "error": run.error,
        "steps": f"{run.recipe['train']['steps']:,}" if run.recipe else None,
        "parent": card.get("parent"),
        "parent weights": card.get("parent_weights"),
        "lineage": " <- ".join(ancestors) if len(ancestors) > 1 else None,
        "commit": card.get("commit"),
        "plugins": ", ".join(f"{name} = {version}" for name, version in card.get("plugins", {}).items()),
        **{field: _source(source) for field, source in card.get("data_manifest", {}).items()},
        "language": _language(card.get("language")),
        "cost": f"{card['tokens']:,} tokens in {_duration(card['seconds'])}"
        if {"tokens", "seconds"} <= card.keys()
        else None,
        "last metrics": "  ".join(f"{k} {v:.4g}" for k, v in last.items() if isinstance(v, int | float)),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _source(source: Mapping[str, Any]) -> str:
    digest = f", sha256 {source['sha256'][:12]}" if "sha256" in source else ""
    return f"{source['path']}: {source['samples']:,} samples{digest}"


def _language(measured: Mapping[str, Any] | None) -> str | None:
    if not measured:
        return None
    pairs = ((name, measured["before"][name], after) for name, after in measured["after"].items())
    return ", ".join(
        f"{name}: perplexity {before:.2f} before, {after:.2f} after" for name, before, after in pairs
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
