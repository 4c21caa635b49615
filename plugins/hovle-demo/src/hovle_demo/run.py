"""`hovle demo`: prepare, train three stages on Ray, evaluate, report. Each part once; a stopped demo goes on."""

import argparse
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hovle_core.precision import has_fast_bfloat16
from hovle_core.registry import Registry
from hovle_demo.evaluate import Evaluation, evaluate
from hovle_demo.meters import Clock, Memory, machine
from hovle_demo.prepare import Progress as Report
from hovle_demo.prepare import prepare
from hovle_demo.report import Row, results_table, write_report
from hovle_train.commands import train_pipeline
from hovle_train.config import Recipe
from hovle_train.export import git_commit, write_json
from hovle_train.lineage import parent_of
from hovle_train.metrics import read_metrics
from hovle_train.pipeline import Pipeline, load_pipeline
from hovle_train.ray_trainer import start_ray
from hovle_train.runs import METRICS_FILE, is_finished, read_summary, resolve_checkpoint

STAGES = ("language_modeling", "distillation", "alignment", "instruction_tuning")
SEED = 0
PIPELINES = {"small": "demo/pipeline", "smollm2": "demo/pipeline_smollm2"}
NOTES = (
    "The data are drawings, flags and shapes (OpenMoji, Factbook flags, easy-VQA), not photographs: nothing here says "
    "how well HoVLE does on natural images.",
    "What comes from the picture is what is lost with shuffled pictures; easy-VQA can be answered in part without "
    "looking, as its blind baseline says. Yes/no is a sample of 1,500 of its 7,136 test questions.",
    "Perplexity says what each stage costs the LLM's language. Prose joins the last quarter of instruction tuning, and "
    "other questions the last 30 % of language modeling: their curves jump there.",
    "Names of unseen emoji are ranked against nine others, not generated: at this scale nobody names the unseen.",
)
SMALL_NOTE = (
    "The LLM has a few million parameters and was pre-trained in minutes on the demo's own text alone."
)


def run_demo(args: argparse.Namespace) -> int:
    """Everything from data to report in `--out`; prints the table and what to type next."""
    console = Console()
    out = Path(args.out or ("runs/demo" if args.llm == "small" else f"runs/demo-{args.llm}"))
    out.mkdir(parents=True, exist_ok=True)
    _warn_if_slow(console)
    clock = Clock(out / "phases.json")
    # All of them before any work: a mistake in the last one's overrides must not wait for the others to train.
    registry = args.plugins.registry
    pipeline = demo_pipeline(args.llm, out, args.overrides, registry)
    with Memory() as memory:
        manifest = _prepare(args, out, clock, console)
        train_pipeline(pipeline, pipeline.recipes, registry, args.local, console, clock.phase)
        rows = _saved_rows(out)
        if rows is None:
            result = _evaluate(pipeline.recipes["distillation"], out, registry, clock, console)
            rows = result.rows
            _write(args, out, result, manifest, clock, memory)
    console.print(results_table(rows))
    _say_what_next(out, console)
    return 0


def _warn_if_slow(console: Console) -> None:
    if has_fast_bfloat16(torch.device("cpu")):
        return
    console.print(
        "[yellow]warning:[/] this CPU has no fast bfloat16 (AMX): training runs in float32, which took 20 minutes in "
        "all on two cores.",
        highlight=False,
    )


def _prepare(args: argparse.Namespace, out: Path, clock: Clock, console: Console) -> dict[str, Any]:
    """The data, of which the manifest is returned, and the LLM unless the demo pre-trains it. Ray starts meanwhile."""
    with clock.phase("prepare"), _bars(console) as progress:

        def everything() -> dict[str, Any]:
            manifest = prepare(out / "prepared", seed=SEED, progress=progress)
            if args.llm == "smollm2":
                from hovle_demo.smollm2 import prepare_smollm2

                prepare_smollm2(out / "prepared" / "smollm2", progress)
            return manifest

        preparing = _in_a_thread(everything)
        if not args.local and not is_finished(out / STAGES[-1]):
            start_ray()
        manifest = preparing.result()
    total = sum(entry["samples"] for entry in manifest["sets"].values())
    seconds = clock.seconds["prepare"]
    console.print(
        f"prepare: {seconds:.0f} s  {total:,} samples in {len(manifest['sets'])} sets", highlight=False
    )
    return manifest


def _in_a_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Call it beside this thread, which stays the one that Ray's processes were started from and die with."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()  # Ctrl-C does not wait for it
    return future


def demo_pipeline(llm: str, out: Path, overrides: list[str], registry: Registry) -> Pipeline:
    """The demo's stages with their folders under `out`. Raises ValueError for an override of no stage."""
    pipeline = load_pipeline(PIPELINES[llm], overrides, registry)
    moved = {
        stage: Recipe.model_validate(_moved(recipe.model_dump(), f"{pipeline.run_dir}/", out))
        for stage, recipe in pipeline.recipes.items()
    }
    return Pipeline(out, moved)


def _moved(value: Any, home: str, out: Path) -> Any:
    """A recipe's values with every path under `home` under `out` instead; the recipes' own home is runs/demo."""
    if isinstance(value, str):
        inside = next((prefix for prefix in (home, "runs/demo/") if value.startswith(prefix)), None)
        return value if inside is None else str(out / value.removeprefix(inside))
    if isinstance(value, dict):
        return {key: _moved(item, home, out) for key, item in value.items()}
    return [_moved(item, home, out) for item in value] if isinstance(value, list | tuple) else value


def _evaluate(
    distillation: Recipe, out: Path, registry: Registry, clock: Clock, console: Console
) -> Evaluation:
    """The LLM to compare with is the one that distillation started from, the teacher its teacher."""
    llm = Path(resolve_checkpoint(str(parent_of(distillation))))
    with clock.phase("evaluate"), _bars(console) as progress:
        return evaluate(
            out, out / "prepared" / "shards", llm, distillation.stage.options, registry, SEED, progress
        )


def _trained_at(out: Path) -> str:
    return read_summary(out / STAGES[-1])["finished_at"]


def _saved_rows(out: Path) -> list[Row] | None:
    """The table of an earlier start, if it is of the model that is there now and the report exists."""
    path = out / "results.json"
    if not path.is_file() or not (out / "report.html").is_file():
        return None
    results = json.loads(path.read_text())
    return [Row(**row) for row in results["rows"]] if results.get("trained_at") == _trained_at(out) else None


def _write(
    args: argparse.Namespace,
    out: Path,
    result: Evaluation,
    manifest: dict[str, Any],
    clock: Clock,
    memory: Memory,
) -> None:
    """`results.json`, `report.html` and a picture to ask about."""
    done = [stage for stage in STAGES if is_finished(out / stage)]
    facts: dict[str, Any] = {
        "llm": args.llm,
        "wall_s": round(sum(clock.seconds.values()), 1),
        "phases_s": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
        "steal_share": round(clock.steal_share, 3),
        "peak_rss_gib": round(clock.peak(memory.peak_gib), 2),
        "machine": machine(),
        "commit": git_commit(),
        "trained_at": _trained_at(out),
        "stages": {stage: _cost(out / stage) for stage in done},
    }
    shown = {
        "LLM": args.llm,
        "Parameters": f"{result.numbers['parameters'] / 1e6:.1f} million, "
        f"{result.numbers['parameters_embedding'] / 1e6:.1f} of them the holistic embedding's",
        "Training": ", ".join(
            f"{stage.replace('_', ' ')} {cost['steps']:,} steps, {cost['tokens']:,} tokens"
            for stage, cost in facts["stages"].items()
        ),
        "Wall time": f"{facts['wall_s']:.0f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {s:.0f}" for name, s in facts["phases_s"].items())
        + _taken(facts),
        "Peak memory": f"{facts['peak_rss_gib']} GiB, all processes",
        "Machine": facts["machine"],
        "Commit": facts["commit"] or "not a git checkout",
        "Data": ", ".join(f"{name} {package['version']}" for name, package in manifest["packages"].items()),
    }
    credits = [p["attribution"] for p in manifest["packages"].values() if p.get("attribution")]
    notes = [*NOTES, *([SMALL_NOTE] if args.llm == "small" else []), *credits]
    curves = {stage: read_metrics(out / stage / METRICS_FILE) for stage in done}
    example = result.examples[0]
    (out / "example.png").write_bytes(example.image)
    (out / "example.txt").write_text(example.question)
    write_report(out / "report.html", "HoVLE demo", result.rows, curves, result.examples, shown, notes)
    write_json(
        out / "results.json", {**result.numbers, **facts, "rows": [asdict(row) for row in result.rows]}
    )


def _taken(results: dict[str, Any]) -> str:
    """What a reader must know of a wall time on a shared machine."""
    share = results.get("steal_share", 0.0)  # results of an earlier version have none
    return f"; the host took {share:.0%} of the cores' time" if share >= 0.02 else ""


def _cost(run: Path) -> dict[str, Any]:
    summary = read_summary(run)
    return {
        name: summary[name] for name in ("steps", "seconds", "tokens", "peak_rss_gib", "precision", "metrics")
    }


def _say_what_next(out: Path, console: Console) -> None:
    results = json.loads((out / "results.json").read_text())
    phases = ", ".join(f"{name.replace('_', ' ')} {s:.0f}" for name, s in results["phases_s"].items())
    local = Path(".venv/bin/hovle")
    hovle = local if local.is_file() and "VIRTUAL_ENV" not in os.environ else "hovle"
    console.print(
        f"wall time {results['wall_s']:.0f} s ({phases}){_taken(results)}, peak memory {results['peak_rss_gib']} GiB\n"
        f"report:  {out / 'report.html'}\nnumbers: {out / 'results.json'}\n"
        f"now ask it something:\n"
        f'  {hovle} chat {out} --image {out / "example.png"} "{(out / "example.txt").read_text()}"',
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _bars(console: Console) -> Iterator[Report]:
    """A progress callback (task, done, total) over rich bars."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done, total=total)

        yield progress
