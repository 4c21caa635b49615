"""`hovle train`: check a recipe, say what it would do, or do it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hovle_train.runs import is_finished, read_summary

if TYPE_CHECKING:  # `hovle --help` builds the parsers: what is heavy is imported when a command runs
    from rich.console import Console

    from hovle_core.plugins import HovlePlugins
    from hovle_train.config import Recipe


def add_train_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle train` to the sub-parsers."""
    parser = cli.add_parser("train", help="run one stage of training from a recipe")
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that a plugin offers")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a field, such as optim.lr=3e-4 (may be repeated)")  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check data and model, print the plan, and stop"
    )
    parser.add_argument("--local", action="store_true", help="run in this process, without Ray")
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    from hovle_train.config import load_recipe

    plugins: HovlePlugins = args.plugins
    recipe = load_recipe(args.recipe, args.overrides, plugins.registry)
    if args.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    plugins.registry.get("stage", recipe.stage.name)
    if args.dry_run:
        dry_run(recipe, plugins)
        return 0
    train(recipe, local=args.local)
    return 0


def train(recipe: Recipe, local: bool = False, console: Console | None = None) -> None:
    """Run a recipe to its end with a progress bar, resuming what is there; says so if it is finished already."""
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers.utils import logging

    from hovle_train.lineage import check_finished
    from hovle_train.progress import follow
    from hovle_train.ray_trainer import run_local, run_on_ray
    from hovle_train.runtime import has_fast_bfloat16

    console = console or Console(stderr=True)
    logging.disable_progress_bar()  # there is one bar, the run's
    if is_finished(recipe.path):
        check_finished(recipe)
        console.print(f"{recipe.stage.name}: finished already, in {recipe.path}", highlight=False)
        return
    device = torch.device("cuda" if recipe.resources.use_gpu else "cpu")
    if recipe.train.precision == "auto" and not recipe.resources.use_gpu and not has_fast_bfloat16(device):
        console.print("[yellow]warning:[/] this CPU has no fast bfloat16: float32, about three times slower")
    with follow(recipe.path, recipe.stage.name, recipe.train.steps, console):
        (run_local if local else run_on_ray)(recipe)
    summary = read_summary(recipe.path)
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in summary["metrics"].items() if isinstance(v, float))
    console.print(
        f"{recipe.stage.name}: {summary['seconds']:.0f} s  {numbers}", highlight=False, soft_wrap=True
    )
    for name, error in summary.get("observer_errors", {}).items():
        console.print(
            f"[yellow]warning:[/] observer {name!r} failed {error['count']} times, and has missed that much; first: ",
            Text(error["first"]),
            highlight=False,
            soft_wrap=True,
        )


def dry_run(recipe: Recipe, plugins: HovlePlugins) -> None:
    """Open the data, encode one step, build the model and count parameters; nothing is written or trained."""
    from rich.console import Console
    from rich.table import Table

    from hovle_data.quarantine import Ledger
    from hovle_train.freeze import freeze_except
    from hovle_train.loop import Trainer
    from hovle_train.runtime import Runtime
    from hovle_train.wrappers import wrap_model

    trainer = Trainer(recipe, plugins, Runtime())
    module, trainer.processor = trainer.stage.build()
    freeze_except(module, trainer.stage.trainable(module))
    module = wrap_model(plugins, module, recipe.model.wrappers)
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
    table.add_row("would resume", "yes" if (Path(recipe.run_dir) / "checkpoints").is_dir() else "no")
    Console().print(table)
