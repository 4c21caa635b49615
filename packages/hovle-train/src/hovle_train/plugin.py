"""Train's plugin: the stages, `hovle train`, `runs` and `submit`."""

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
def hovle_commands(cli: Any) -> None:
    from hovle_train.commands import add_train_parser
    from hovle_train.runs_command import add_runs_parser
    from hovle_train.submit import add_submit_parser

    add_train_parser(cli)
    add_runs_parser(cli)
    add_submit_parser(cli)
