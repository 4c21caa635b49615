"""`hovle train`: check a recipe or a pipeline, say what it would do, or do it."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from hovle_train.runs import (
    CHECKPOINTS,
    PIPELINE_FILE,
    Run,
    is_finished,
    read_summary,
    write_text,
)

if TYPE_CHECKING:  # `hovle --help` builds the parsers: what is heavy is imported when a command runs
    from rich.console import Console

    from hovle_core.plugins import HovlePlugins
    from hovle_core.registry import Registry
    from hovle_train.config import Recipe
    from hovle_train.pipeline import Pipeline


def add_train_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle train` to the sub-parsers."""
    parser = cli.add_parser("train", help="run one stage of training from a recipe, or a pipeline of stages")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe or pipeline and stop"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check data and model, print the plan, and stop"
    )
    parser.add_argument("--local", action="store_true", help="run in this process, without Ray")
    parser.set_defaults(run=run_train)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which stages to run, and how: also for those who send them elsewhere."""
    parser.add_argument(
        "recipe", help="a YAML file of a recipe or a pipeline, or the name that a plugin gave it"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a field, such as optim.lr=3e-4, of a pipeline distillation.optim.lr=3e-4 "
                        "(may be repeated)")  # fmt: skip
    parser.add_argument("--from", metavar="STAGE", dest="first", help="a pipeline's first stage to run")
    parser.add_argument("--until", metavar="STAGE", dest="last", help="a pipeline's last stage to run")


def run_train(args: argparse.Namespace) -> int:
    from hovle_train.failure import ending_with_75

    with ending_with_75():
        return _run_train(args)


def _run_train(args: argparse.Namespace) -> int:
    from hovle_train.lineage import check_run, check_texts
    from hovle_train.pipeline import Pipeline
    from hovle_train.ray_trainer import check_local

    plugins: HovlePlugins = args.plugins
    job = load(args, plugins.registry)
    recipes = job.select(args.first, args.last) if isinstance(job, Pipeline) else {job.stage.name: job}
    check_recipes(recipes, plugins)
    for recipe in recipes.values():
        if not args.print_config and not is_finished(recipe.path):
            check_texts(recipe, plugins.registry)
            if args.local:
                check_local(recipe)
    if args.print_config:
        print(job.to_yaml(), end="")
    elif isinstance(job, Pipeline):
        if args.dry_run:
            dry_run_pipeline(job, recipes, plugins)
        else:
            train_pipeline(job, recipes, plugins.registry, local=args.local)
    elif args.dry_run:
        dry_run(job, plugins)
    else:
        check_run(job, plugins.registry)
        train(job, local=args.local)
    return 0


def check_recipes(recipes: Mapping[str, Recipe], plugins: HovlePlugins, elsewhere: bool = False) -> None:
    """Raise ValueError naming a stage's option, an observer's setting, a wrapper or a `storage_path` that cannot be:
    here already, and not where the stage starts.

    elsewhere: it will run on other machines, whose file systems are not these.
    """
    from hovle_train.observers import Observers
    from hovle_train.stages.base import make_stage
    from hovle_train.storage import RemoteRun
    from hovle_train.wrappers import check_wrappers

    for recipe in recipes.values():
        make_stage(recipe, plugins.registry)
        Observers(plugins, Run(recipe.path, recipe.stage.name, recipe.model_dump(mode="json")))
        check_wrappers(plugins, recipe.model.wrappers)
        if recipe.train.storage_path and not elsewhere:
            RemoteRun(recipe.train.storage_path)


def load(args: argparse.Namespace, registry: Registry) -> Recipe | Pipeline:
    """What the command line names. Raises ValueError for `--from` and `--until` of a single recipe."""
    from hovle_train.pipeline import is_pipeline, parse_pipeline
    from hovle_train.recipe_file import load_recipe, read_recipe

    raw, path = read_recipe(args.recipe, registry)
    if is_pipeline(raw):
        return parse_pipeline(raw, args.overrides, registry, path)
    if args.first is not None or args.last is not None:
        raise ValueError(
            f"--from and --until choose stages of a pipeline, and {args.recipe} is one stage's recipe"
        )
    return load_recipe(args.recipe, args.overrides, registry)


def _no_phase(label: str) -> AbstractContextManager[None]:
    """Nobody measures the stages."""
    return nullcontext()


def train_pipeline(
    pipeline: Pipeline,
    recipes: Mapping[str, Recipe],
    registry: Registry,
    local: bool = False,
    console: Console | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = _no_phase,
) -> None:
    """Run the selected stages of a pipeline in order, each as `train` does, inside `phase(label)`.

    A finished stage is not run again. Raises ValueError before the first one runs for what could not go on, and
    Stopped, as `train` does, also between two stages.
    """
    from hovle_train.failure import Stopped

    asked = threading.Event()
    pipeline.check(recipes, registry)
    pipeline.run_dir.mkdir(parents=True, exist_ok=True)
    write_text(pipeline.run_dir / PIPELINE_FILE, pipeline.to_yaml())
    for label, recipe in recipes.items():
        if asked.is_set():  # behind the last step of the stage before
            raise Stopped(pipeline.run_dir)
        with phase(label):
            train(recipe, local=local, console=console, label=label, asked=asked)


def train(
    recipe: Recipe,
    local: bool = False,
    console: Console | None = None,
    label: str | None = None,
    asked: threading.Event | None = None,
) -> None:
    """Run a recipe to its end with a progress bar, resuming what is there; says so if it is finished already.

    `label`: what to call it, else its stage's kind. `asked`: set by SIGTERM. Raises Stopped, which ends the process
    with code 75, if that stopped the run, and LanguageLost for one past its bounds.
    """
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers.utils import logging

    from hovle_core.precision import has_fast_bfloat16
    from hovle_train.failure import Stopped, noting_failure
    from hovle_train.language_gate import reconsider
    from hovle_train.lineage import check_finished
    from hovle_train.progress import follow
    from hovle_train.ray_trainer import run_local, run_on_ray

    console, label = console or Console(stderr=True), label or recipe.stage.name
    logging.disable_progress_bar()  # there is one bar, the run's
    reconsider(recipe)
    if is_finished(recipe.path):
        check_finished(recipe)
        console.print(f"{label}: {finished_already(recipe)}", markup=False, highlight=False, soft_wrap=True)
        return
    slow = not recipe.resources.use_gpu and not has_fast_bfloat16(torch.device("cpu"))
    if recipe.train.precision == "auto" and slow and not local:  # in this process the loop says so itself
        console.print("[yellow]warning:[/] this CPU has no fast bfloat16: training runs in float32")
    try:
        with noting_failure(recipe.path), follow(recipe.path, label, recipe.train.steps, console):
            (run_local if local else run_on_ray)(recipe, asked)
    except Stopped as stopped:
        console.print(f"{label}: {stopped}", markup=False, highlight=False, soft_wrap=True)
        raise
    summary = read_summary(recipe.path)
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in summary["metrics"].items() if isinstance(v, float))
    console.print(
        f"{label}: {summary['seconds']:.0f} s  {numbers}", markup=False, highlight=False, soft_wrap=True
    )
    for name, error in summary.get("observer_errors", {}).items():
        console.print(
            f"[yellow]warning:[/] observer {name!r} failed {error['count']} times, and has missed that much; first: ",
            Text(error["first"]),
            highlight=False,
            soft_wrap=True,
        )


def finished_already(recipe: Recipe) -> str:
    """That a run is finished, where, and what the recipe asks of it that it did not do.

    Raises LanguageLost for a run past the recipe's bounds as they are now.
    """
    from hovle_train.language_gate import judge_finished

    said = f"finished already, in {recipe.path}"
    if not judge_finished(recipe):
        said += "; its language was not measured on these texts: the section `language` is newer than the run"
    storage, recorded = recipe.train.storage_path, read_summary(recipe.path)["recipe"]["train"]
    if storage is not None and recorded.get("storage_path") is None:
        said += f"; nothing was copied to {storage}: train.storage_path is newer than the run"
    return said


def dry_run_pipeline(pipeline: Pipeline, recipes: Mapping[str, Recipe], plugins: HovlePlugins) -> None:
    """`dry_run` of every selected stage that can start now; of the others, what they wait for."""
    from rich.console import Console

    from hovle_train.lineage import data_manifest, open_source, parent_of, sources_of

    pipeline.check(recipes, plugins.registry)
    folders = {str(recipe.path): label for label, recipe in pipeline.recipes.items()}
    for label, recipe in recipes.items():
        parent = parent_of(recipe) or ""
        if is_finished(recipe.path):
            said = finished_already(recipe)
        elif parent in folders and not is_finished(parent):
            found = data_manifest(recipe, lambda source: open_source(source, plugins.registry))
            missing = [
                f"{field} ({source.path})"
                for field, source in sources_of(recipe).items()
                if field not in found
            ]
            said = f"{recipe.train.steps:,} steps, once {folders[parent]} has finished"
            said += f"; no data yet in {', '.join(missing)}" if missing else "; its data are there"
        else:
            dry_run(recipe, plugins)
            continue
        Console().print(f"{label}: {said}", highlight=False, soft_wrap=True)


def dry_run(recipe: Recipe, plugins: HovlePlugins) -> None:
    """Open the data, encode one step, build the model and count parameters; nothing is written or trained."""
    from rich.console import Console
    from rich.table import Table

    from hovle_data.quarantine import Ledger
    from hovle_train.freeze import freeze_except
    from hovle_train.lineage import check_folder, checked_hash, parent_of
    from hovle_train.loop import Trainer
    from hovle_train.optim import check_factors
    from hovle_train.runtime import Runtime
    from hovle_train.wrappers import wrap_model

    check_folder(recipe)
    checked_hash(parent_of(recipe))
    trainer = Trainer(recipe, plugins, Runtime())
    module, trainer.processor = trainer.stage.build()
    freeze_except(module, trainer.stage.trainable(module))
    module = wrap_model(plugins, module, recipe.model.wrappers)
    check_factors(recipe.optim, [name for name, p in module.named_parameters() if p.requires_grad])
    ledger = Ledger(None, max_share=recipe.data.max_quarantine_share)
    with trainer.loader(ledger).iterate(0, 1) as first_step:
        ((_, batches, _),) = first_step
    tokens = sum(batch.num_tokens for batch in batches)
    parameters = list(module.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    table = Table("", "", show_header=False, title=f"{recipe.stage.name} -> {recipe.run_dir}")
    table.add_row("parameters", f"{total:,}, of which {trainable:,} train")
    rows, size = recipe.train.global_batch_rows, recipe.train.global_batch_size
    table.add_row("steps", f"{recipe.train.steps:,} of {f'{rows:,} rows' if rows else f'{size:,} samples'}")
    fill = tokens / (len(batches) or 1) / recipe.train.micro_batch_tokens
    table.add_row(
        "first step",
        f"{tokens:,} tokens and {sum(b.num_tiles for b in batches):,} tiles in {len(batches)} rows, {fill:.0%} full",
    )
    table.add_row("tokens in all", f"about {tokens * recipe.train.steps:,}")
    table.add_row("precision", str(trainer.dtype).removeprefix("torch."))
    table.add_row(
        "workers", f"{recipe.resources.num_workers}, {'GPU' if recipe.resources.use_gpu else 'CPU'}"
    )
    table.add_row(
        "optimizer state",
        f"about {trainable * 8 / 2**30:.2f} GiB beside {total * 4 / 2**30:.2f} GiB of weights",
    )
    table.add_row("would resume", "yes" if (recipe.path / CHECKPOINTS).is_dir() else "no")
    Console().print(table)
