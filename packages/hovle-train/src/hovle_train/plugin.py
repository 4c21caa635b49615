"""Train's plugin: the stages, recipes of real models, `hovle train`, `plan`, `runs` and `submit`."""

from typing import Any

from hovle_core.hookspecs import hookimpl
from hovle_core.registry import Spec

HOVLE_HOOK_API = 1


@hookimpl
def hovle_stages() -> list[Spec]:
    return [
        Spec("language_modeling", "hovle_train.stages.language_modeling:LanguageModeling",
             summary="the bare LLM on text (no part of the paper)"),
        Spec("distillation", "hovle_train.stages.distillation:Distillation",
             summary="embedding matches a vision teacher and the LLM's text embedding, on unpaired data"),
        Spec("alignment", "hovle_train.stages.alignment:Alignment",
             summary="next-token prediction on pairs, LLM frozen"),
        Spec("instruction_tuning", "hovle_train.stages.instruction_tuning:InstructionTuning",
             summary="next-token prediction on answers, everything trains"),
    ]  # fmt: skip


@hookimpl
def hovle_recipes() -> list[Spec]:
    summaries = {
        "distillation": "the embedding learns to see",
        "alignment": "and to write what the LLM reads",
        "instruction_tuning": "and to answer",
        "pipeline": "all three stages",
    }
    return [
        Spec(f"{model}/{stage}", f"hovle_train:recipes/{model}/{stage}.yaml", summary=f"{summary}, on {llm}")
        for model, llm in (("hovle-2.6b", "InternLM2-1.8B"), ("hovle-10b", "InternLM2-7B"))
        for stage, summary in summaries.items()
    ]


@hookimpl
def hovle_commands(cli: Any) -> None:
    from hovle_train.commands import add_train_parser
    from hovle_train.plan_command import add_plan_parser
    from hovle_train.runs_command import add_runs_parser
    from hovle_train.submit import add_submit_parser

    add_train_parser(cli)
    add_plan_parser(cli)
    add_runs_parser(cli)
    add_submit_parser(cli)
