"""Recipes: what a run is, checked before anything starts. Unknown keys are errors that suggest a right one."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from hovle_data.sections import Section
from hovle_train.recipe_sections import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    Named,
    OptimConfig,
    ParallelConfig,
    ResourcesConfig,
    TrainConfig,
)


class Recipe(Section):
    """A run of one stage. `run_dir` holds all it writes; the same recipe and folder resume it."""

    stage: Named
    run_dir: str
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig
    train: TrainConfig
    language: LanguageConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()
    parallel: ParallelConfig = ParallelConfig()
    # Settings of plugins that observe runs, by the plugin's name; they know their own fields.
    observers: dict[str, Any] = {}

    @model_validator(mode="after")
    def _every_phase_of_the_schedule_has_steps(self) -> "Recipe":
        optim, steps = self.optim, self.train.steps
        if optim.warmup_steps >= steps:
            raise ValueError(
                f"optim.warmup_steps {optim.warmup_steps} must be fewer than train.steps {steps}: the learning rate "
                "would never reach its peak"
            )
        if optim.schedule == "wsd" and optim.warmup_steps > steps - round(optim.decay_share * steps):
            raise ValueError(
                f"optim.decay_share {optim.decay_share} of {steps} steps begins before warmup_steps "
                f"{optim.warmup_steps} are over: lower one of them"
            )
        starts = [optim.warmup_steps, *(round(share * steps) for share in optim.restarts), steps]
        for share, before, at, after in zip(optim.restarts, starts, starts[1:], starts[2:], strict=False):
            if not before < at < after:
                raise ValueError(
                    f"optim.restarts {share} is step {at} of {steps}, and there is no step between it and what comes "
                    f"before or after it (steps {before} and {after}; warmup_steps is {optim.warmup_steps})"
                )
        for source in (*self.data.sources, *self.data.images, *self.data.texts):
            shares = sorted(source.weight) if isinstance(source.weight, dict) else []
            if len({round(share * steps) for share in shares}) < len(shares):
                raise ValueError(
                    f"weight of {source.path} is {source.weight}: two of these shares are the same one of {steps} steps"
                )
        return self

    @model_validator(mode="after")
    def _curricula_know_their_positions(self) -> "Recipe":
        for source in (*self.data.sources, *self.data.images, *self.data.texts):
            if isinstance(source.weight, dict) and self.train.global_batch_size is None:
                raise ValueError(
                    f"weight of {source.path} is {source.weight}: how many samples full rows will hold is not known "
                    "beforehand; set train.global_batch_size in place of global_batch_rows, or give one weight"
                )
        return self

    @model_validator(mode="after")
    def _copies_lie_elsewhere(self) -> "Recipe":
        storage = self.train.storage_path
        if storage is None or ("://" in storage and not storage.startswith("file://")):
            return self
        copies, run = Path(storage.removeprefix("file://")).resolve(), self.path.resolve()
        if copies == run or run in copies.parents:
            raise ValueError(
                f"train.storage_path {storage} is in run_dir {self.run_dir}: copies would replace what they are of; "
                "name a place outside"
            )
        return self

    @model_validator(mode="after")
    def _a_pool_has_a_teacher(self) -> "Recipe":
        if self.resources.teacher_pool is None:
            return self
        if self.stage.options.get("teachers"):
            raise ValueError(
                "resources.teacher_pool runs one teacher, and stage.options.teachers is a list of them: leave the pool "
                "out, or name one as stage.options.teacher"
            )
        if "teacher" not in self.stage.options:
            raise ValueError(
                f"resources.teacher_pool does nothing in stage {self.stage.name!r}, which names no teacher: leave it "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _what_is_balanced(self) -> "Recipe":
        if not self.resources.balance:
            return self
        for wrong, reason in (
            (self.resources.num_workers == 1, "does nothing with num_workers 1: leave it out"),
            (
                self.train.global_batch_size is None,
                "shares out samples: set train.global_batch_size in place of global_batch_rows",
            ),
            (
                self.parallel.strategy == "fsdp2",
                "cannot tell a rank's own work from its wait in FSDP2's layers: set parallel.strategy: ddp",
            ),
        ):
            if wrong:
                raise ValueError(f"resources.balance {reason}")
        return self

    @property
    def path(self) -> Path:
        return Path(self.run_dir)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
