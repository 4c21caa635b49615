"""`hovle plan`: what recipes would take on so many GPUs."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what is heavy is imported when the command runs
    from hovle_core.registry import Registry
    from hovle_train.config import Recipe
    from hovle_train.plan import Assumptions, StagePlan


def add_plan_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle plan` to the sub-parsers."""
    parser = cli.add_parser(
        "plan", help="parameters, memory, operations and hours of recipes, before they run"
    )
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="YAML files or names, of stages or pipelines"
    )
    parser.add_argument(
        "--gpus", default="8xH100", metavar="NxKIND", help="such as 8xH100 or 4x8xA100 (default: %(default)s)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a field in all of them, as `hovle train` does (may be repeated)")  # fmt: skip
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp2"), help="how GPUs share a step (default: the recipe's)"
    )
    parser.add_argument(
        "--tiles", type=float, help="tiles of a sample (default: all that model.image allows)"
    )
    parser.add_argument("--text-tokens", type=float, default=None,
                        help="text tokens of a sample (default: the middle of data.text_tokens, or 128)")  # fmt: skip
    parser.add_argument(
        "--target-share", type=float, default=1.0, help="of the text tokens that are targets (default: all)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that a step gets (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    from hovle_train.plan import plan_stage

    registry: Registry = args.plugins.registry
    for name, low, high in (
        ("tiles", 0, 1e3),
        ("text_tokens", 1, 1e6),
        ("target_share", 0, 1),
        ("mfu", 0.001, 1),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be within {low:g} and {high:g}")
    recipes = [recipe for name in args.recipes for recipe in stages_of(name, args.overrides, registry)]
    others = [*recipes, *(r for name in args.recipes for r in siblings(name, registry))]
    plans = []
    for recipe in recipes:
        strategy = args.strategy or recipe.parallel.strategy
        assumed = assumptions(args, recipe, others)
        plans.append(plan_stage(recipe, args.plugins, args.gpus, assumed, others, strategy == "fsdp2"))
        if not args.json:
            show(plans[-1], recipe, assumed, args.gpus, strategy)
    if args.json:
        print(json.dumps({"gpus": args.gpus, "stages": [asdict(plan) for plan in plans]}, indent=1))
    return 0


def stages_of(name: str, overrides: list[str], registry: Registry) -> list[Recipe]:
    """The recipe of a file or name, or those of a pipeline."""
    from hovle_train.pipeline import is_pipeline, parse_pipeline
    from hovle_train.recipe_file import load_recipe, read_recipe

    raw, path = read_recipe(name, registry)
    if is_pipeline(raw):
        return list(parse_pipeline(raw, overrides, registry, path).recipes.values())
    return [load_recipe(name, overrides, registry)]


def assumptions(args: argparse.Namespace, recipe: Recipe, others: list[Recipe]) -> Assumptions:
    """What the recipe does not say, from the command line or by default."""
    from hovle_train.plan import Assumptions

    tiles, text = args.tiles, args.text_tokens
    if tiles is None:
        first = recipe  # whoever makes the model says how pictures are cut
        while first.model.init_from is not None:
            made_by = [other for other in others if other.run_dir == first.model.init_from]
            if not made_by:
                break
            first = made_by[0]
        image = first.model.image
        tiles = image.max_tiles + (image.use_thumbnail and image.max_tiles > 1)
    if text is None:
        text = sum(recipe.data.text_tokens) / 2 if recipe.data.images else 128
    return Assumptions(float(tiles), float(text), args.target_share, args.mfu)


def siblings(name: str, registry: Registry) -> list[Recipe]:
    """Recipes in the folder of this one: a stage starts from a run that one of them makes.

    What else lies there, and recipes of former versions, are nobody's parents.
    """
    import yaml

    from hovle_data.sections import read_yaml
    from hovle_train.recipe_file import load_recipe

    path = Path(name) if Path(name).is_file() else registry.resource("recipe", name)
    found = []
    for file in sorted(path.parent.glob("*.yaml")):
        if file == path:
            continue
        with suppress(OSError, ValueError, yaml.YAMLError):
            raw = read_yaml(file.read_text())
            if isinstance(raw, dict) and raw.keys() >= {"stage", "run_dir", "optim", "train"}:
                found.append(load_recipe(file))
    return found


def show(plan: StagePlan, recipe: Recipe, assumed: Assumptions, gpus: str, strategy: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from hovle_train.plan import GIB, GPUS, parse_gpus

    table = Table("", "", show_header=False, title=f"{plan.stage} on {gpus}", min_width=72)
    table.add_row("parameters", f"{plan.parameters:,}, of which {plan.trainable:,} train")
    parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in plan.memory.items())
    capacity = GPUS[parse_gpus(gpus)[1]].memory
    total = sum(plan.memory.values()) / GIB
    table.add_row("memory a GPU", f"{total:.1f} GiB of {capacity:g} ({strategy}): {parts}")
    table.add_row("tokens", f"{plan.tokens:.3g} in {plan.steps:,} steps of {plan.tokens_per_step:,}")
    table.add_row("operations", f"{plan.operations:.3g} a step, {plan.operations * plan.steps:.3g} in all")
    table.add_row("time", f"{plan.hours:,.1f} h at {assumed.mfu:.0%} of the peak")
    table.add_row("assumed", f"{assumed.tiles:g} tiles and {assumed.text_tokens:g} text tokens a sample, "
                             f"{assumed.target_share:.0%} of them targets, full rows")  # fmt: skip
    console = Console()
    console.print(table)
    if not plan.fits:
        hint = "" if recipe.model.activation_checkpointing else "model.activation_checkpointing: true, "
        sharding = "--strategy fsdp2, " if strategy == "ddp" else ""
        console.print(
            f"[yellow]does not fit:[/] try {hint}{sharding}a smaller train.micro_batch_tokens or more GPUs"
        )
