"""`hovle demo`: prepare, train three stages on Ray, evaluate, report. Each part once; a stopped demo goes on."""

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hovle_core.plugins import HovlePlugins
from hovle_demo.evaluate import evaluate
from hovle_demo.prepare import prepare
from hovle_demo.report import results_table, write_report
from hovle_train.commands import train
from hovle_train.config import Recipe, load_recipe
from hovle_train.export import git_commit, write_json
from hovle_train.metrics import read_metrics
from hovle_train.runs import METRICS_FILE
from hovle_train.runtime import has_fast_bfloat16

STAGES = ("language_modeling", "distillation", "alignment", "instruction_tuning")
SEED = 0
NOTES = (
    "The data are drawings, flags and shapes (OpenMoji, Factbook flags, easy-VQA), not photographs: this shows that all "
    "three stages work and that the answers come from the picture, not how well HoVLE does on natural images.",
    "The LLM of the default demo has a few million parameters and was pre-trained in about a minute on this text. It "
    "knows nothing beyond it.",
    "easy-VQA can be answered in part without looking; compare with the blind baseline and with shuffled pictures.",
    "Names of unseen emoji are ranked against nine others, not generated: at this scale nobody names the unseen.",
)


def run_demo(args: argparse.Namespace) -> int:
    """Everything from data to report in `--out`; prints the table and what to type next."""
    console = Console()
    out = Path(args.out or ("runs/demo" if args.llm == "small" else f"runs/demo-{args.llm}"))
    out.mkdir(parents=True, exist_ok=True)
    if not has_fast_bfloat16(torch.device("cpu")) and not torch.cuda.is_available():
        console.print(
            "[yellow]warning:[/] this CPU has no fast bfloat16 (AMX): training runs in float32 and will take about "
            "three times as long as on a CPU with it, 30 to 45 minutes on two cores.",
            highlight=False,
        )
    clock = Clock(out / "phases.json")
    with Memory() as memory:
        with clock.phase("prepare"), _bars(console) as progress:
            manifest = prepare(out / "prepared", seed=SEED, progress=progress)
            llm = _llm(args.llm, out, progress)
        total = sum(entry["samples"] for entry in manifest["sets"].values())
        console.print(f"prepare: {total:,} samples in {len(manifest['sets'])} sets, {clock.seconds['prepare']:.0f} s")
        for stage in STAGES[1:] if llm else STAGES:
            recipe = demo_recipe(stage, out, llm, args.overrides, args.plugins)
            with clock.phase(stage):
                train(recipe, local=args.local, console=console)
        llm = llm or out / "language_modeling" / "final"
        with clock.phase("evaluate"), _bars(console) as progress:
            teacher = demo_recipe("distillation", out, llm, args.overrides, args.plugins).stage.options["teacher"]
            result = evaluate(out, out / "prepared" / "shards", llm, teacher, args.plugins.registry, SEED, progress)
    peak = max(memory.peak_gib, clock.remembered("peak_rss_gib"))
    clock.remember("peak_rss_gib", peak)
    facts = {
        "llm": args.llm,
        "wall_s": round(sum(clock.seconds.values()), 1),
        "phases_s": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
        "peak_rss_gib": round(peak, 2),
        "machine": _machine(),
        "commit": git_commit(),
        "stages": {stage: _cost(out / stage) for stage in STAGES if (out / stage / "summary.json").is_file()},
    }
    write_json(out / "results.json", {**result.numbers, **facts})
    curves = {stage: read_metrics(out / stage / METRICS_FILE) for stage in STAGES if (out / stage).is_dir()}
    shown = {
        "LLM": args.llm,
        "wall time": f"{facts['wall_s']:.0f} s ({', '.join(f'{k} {v:.0f}' for k, v in facts['phases_s'].items())})",
        "peak memory": f"{facts['peak_rss_gib']} GiB",
        "machine": facts["machine"],
        "commit": facts["commit"] or "not a git checkout",
        "data": ", ".join(f"{name} {package['version']}" for name, package in manifest["packages"].items()),
    }
    attributions = [p["attribution"] for p in manifest["packages"].values() if p.get("attribution")]
    write_report(
        out / "report.html", "HoVLE demo", result.rows, curves, result.examples, shown, [*NOTES, *attributions]
    )
    console.print(results_table(result.rows))
    console.print(f"wall time {shown['wall time']}, peak memory {shown['peak memory']}", highlight=False, soft_wrap=True)
    picture = out / "example.png"
    picture.write_bytes(result.examples[0].image)
    console.print(f"report:  {out / 'report.html'}\nnumbers: {out / 'results.json'}\nnow ask it something:", highlight=False)
    command = f'hovle chat {out} --image {picture} "{result.examples[0].question}"'
    console.print(f"  {_hovle()} {command.removeprefix('hovle ')}", highlight=False, soft_wrap=True)
    return 0


def demo_recipe(
    stage: str, out: Path, llm: Path | None, overrides: list[str], plugins: HovlePlugins
) -> Recipe:
    """The stage's recipe with this demo's folders. Raises ValueError for an override of no stage."""
    for override in overrides:
        if override.split(".", 1)[0] not in STAGES:
            raise ValueError(f"--set {override!r} must start with one of {', '.join(STAGES)}")
    own = [o.removeprefix(f"{stage}.") for o in overrides if o.startswith(f"{stage}.")]
    recipe = load_recipe(f"demo/{stage}", own, plugins.registry)
    recipe = Recipe.model_validate(yaml.safe_load(recipe.to_yaml().replace("runs/demo/", f"{out}/")))
    if stage == "distillation" and llm is not None and recipe.model.backbone is not None:
        recipe.model.backbone.options["path"] = str(llm)
    return recipe


def _llm(name: str, out: Path, progress) -> Path | None:
    """The folder of a ready LLM, or None for the small one that the demo pre-trains."""
    if name == "small":
        return None
    from hovle_demo.smollm2 import prepare_smollm2

    return prepare_smollm2(out / "prepared" / name, progress)


def _cost(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {name: summary[name] for name in ("steps", "seconds", "tokens", "peak_rss_gib", "precision", "metrics")}


def _machine() -> str:
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    fast = "AMX" if has_fast_bfloat16(torch.device("cpu")) else "no AMX"
    return f"{os.cpu_count()} x {model} ({fast}), {psutil.virtual_memory().total / 2**30:.0f} GiB"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _hovle() -> str:
    """How this very command was reached, so that what is printed can be typed."""
    local = Path(".venv/bin/hovle")
    return str(local) if local.is_file() and "VIRTUAL_ENV" not in os.environ else "hovle"


@contextmanager
def _bars(console: Console) -> Iterator[Any]:
    """A progress callback (task, done, total) over rich bars."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done, total=total)

        yield progress


class Clock:
    """Seconds of each phase, over all starts of the demo, so that a resumed one does not look fast."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seconds": {}}

    @property
    def seconds(self) -> dict[str, float]:
        return self.content["seconds"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, started = self.seconds.get(name, 0.0), time.perf_counter()
        try:
            yield
        finally:
            # What was found done costs nothing: the time that counts is the one that did it.
            spent = time.perf_counter() - started
            self.seconds[name] = before + spent if before == 0 or spent > 5 else before
            write_json(self.path, self.content)

    def remember(self, name: str, value: float) -> None:
        self.content[name] = value
        write_json(self.path, self.content)

    def remembered(self, name: str) -> float:
        return float(self.content.get(name, 0.0))


class Memory:
    """The most memory that this process and all it started held together (PSS: shared pages count once)."""

    INTERVAL_S = 2.0

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self.INTERVAL_S):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    info = process.memory_full_info()
                except psutil.Error:
                    continue  # gone since it was listed
                total += getattr(info, "pss", info.rss)
            self.peak_gib = max(self.peak_gib, total / 2**30)
