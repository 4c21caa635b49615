"""The demo's plugin: `hovle demo`, its recipes and its small LLM."""

from __future__ import annotations

import argparse
from typing import Any

from hovle_core.hookspecs import hookimpl
from hovle_core.registry import Spec

HOVLE_HOOK_API = 1

LLMS = ("small", "smollm2")


@hookimpl
def hovle_backbones() -> list[Spec]:
    return [
        Spec(
            "demo-small",
            "hovle_demo.backbone:SmallBackbone",
            summary="a small Llama with random weights for the demo's own tokenizer: tokenizer=DIRECTORY",
        )
    ]


@hookimpl
def hovle_recipes() -> list[Spec]:
    return [
        Spec("demo/pipeline", "hovle_demo:recipes/pipeline.yaml", summary="all stages, with the small LLM"),
        Spec("demo/pipeline_smollm2", "hovle_demo:recipes/pipeline_smollm2.yaml", summary="and with SmolLM2"),
        Spec(
            "demo/language_modeling",
            "hovle_demo:recipes/language_modeling.yaml",
            summary="pre-trains the small LLM",
        ),
        Spec(
            "demo/distillation", "hovle_demo:recipes/distillation.yaml", summary="the embedding learns to see"
        ),
        Spec("demo/alignment", "hovle_demo:recipes/alignment.yaml", summary="and to speak to the frozen LLM"),
        Spec(
            "demo/instruction_tuning", "hovle_demo:recipes/instruction_tuning.yaml", summary="and to answer"
        ),
    ]


@hookimpl
def hovle_commands(cli: Any) -> None:
    parser = cli.add_parser(
        "demo", help="train all three stages on real data, score the result, write a report"
    )
    parser.add_argument("--llm", choices=LLMS, default="small",
                        help="small: pre-trained here in minutes; smollm2: SmolLM2-135M, much slower")  # fmt: skip
    parser.add_argument(
        "--out", default=None, help="folder of the run (default: runs/demo, runs/demo-smollm2)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", dest="overrides",
                        help="override a recipe, such as distillation.train.steps=100 (may be repeated)")  # fmt: skip
    parser.add_argument("--local", action="store_true", help="train in this process, without Ray")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from hovle_demo.run import run_demo

    return run_demo(args)
