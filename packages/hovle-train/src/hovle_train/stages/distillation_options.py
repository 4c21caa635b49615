"""What a recipe can tell distillation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hovle_data.sections import Section
from hovle_train.recipe_sections import Named


class WeightedTeacher(Named):
    """One of several teachers; `weight` is its share of the image term, against the other teachers'."""

    weight: float = Field(1.0, gt=0)


class DistillationOptions(Section):
    """Only `teacher` has no default, unless there are several as `teachers`."""

    teacher: Named | None = None
    teachers: list[WeightedTeacher] = []
    # A projection of the student to the teacher's width, or the teacher's own connector in its place.
    head: Literal["linear", "mlp", "connector"] = "linear"
    # Embedding blocks that are distilled (the first is 1) and their weights; None is the last alone. Of a teacher that
    # joins as many layers each learns one.
    blocks: dict[Annotated[int, Field(ge=1, strict=False)], Annotated[float, Field(gt=0)]] | None = None
    image_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(1.0, ge=0)
    # Subtract the mean feature from targets. None: for heads, and not behind a connector, whose mean the LLM reads too.
    centre: bool | None = None
    # Run the teacher once over all images and train from disk.
    cache_features: bool = False
    # Scale the finished embedding so that text comes out as long as the LLM's own embeddings: a cosine leaves lengths
    # free, and an LLM cannot read what is a hundred times longer than anything it has seen (ours, not the paper's).
    match_norms: bool = True

    @model_validator(mode="after")
    def _teachers_are_named_once(self) -> "DistillationOptions":
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("name either one teacher, or several as a list of teachers")
        if len(self.teachers) > 1 and self.head == "connector":
            raise ValueError(
                f"head 'connector' is one teacher's, and teachers names {len(self.teachers)}: set head: linear or mlp, "
                "or name one teacher"
            )
        if len(self.teachers) > 1 and self.blocks is not None:
            raise ValueError(
                f"blocks {self.blocks} learn from one teacher, and teachers names {len(self.teachers)}, who teach the "
                "embedding's output: leave blocks out, or name one teacher"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "DistillationOptions":
        if self.image_weight == self.text_weight == 0:
            raise ValueError("image_weight and text_weight are both 0: nothing would be learnt")
        if self.blocks is not None and self.head == "connector":
            raise ValueError(
                f"blocks {self.blocks} does nothing with head 'connector', which is for the embedding's output: leave "
                "it out, or set head: linear"
            )
        return self

    @property
    def all_teachers(self) -> list[WeightedTeacher]:
        return self.teachers or [WeightedTeacher.model_validate(self.teacher.model_dump())]  # type: ignore[union-attr]
