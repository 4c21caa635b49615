"""The interface of a stage: what it builds, what of it trains, which samples it reads, and its loss.

The loop knows nothing else of a stage, so a plugin's stage is as good as ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from torch import Tensor, nn

from hovle_core.losses import next_token_loss
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_core.registry import Registry
from hovle_data.mixture import Mixture, Weight
from hovle_data.packing import PackedBatch
from hovle_data.quarantine import Ledger
from hovle_data.sections import Section, explain
from hovle_data.streams import Stream
from hovle_train.build import build_hovle
from hovle_train.config import Recipe
from hovle_train.lineage import open_source
from hovle_train.recipe_sections import Source
from hovle_train.runtime import Runtime

Progress = Callable[[str, int, int], None]

# Fields of a recipe that not every stage reads: one that is set for a stage that does not is a mistake.
STAGE_FIELDS = (
    "data.sources", "data.images", "data.texts", "data.text_tokens", "data.long_samples",
    "data.tile_cache_gib",
    "model.init_from", "model.blocks_from_llm", "model.embedding", "model.image", "train.drop_path",
)  # fmt: skip
# Those of a HoVLE's stages, whatever their data.
HOVLE_FIELDS = (
    "data.tile_cache_gib",
    "model.init_from", "model.blocks_from_llm", "model.embedding", "model.image", "train.drop_path",
)  # fmt: skip
# What the loop itself counts and logs: a loss of such a name would be added to it.
LOOP_METRICS = frozenset(
    {
        "step", "stop", "look", "tokens", "grad_norm", "lr", "mfu", "fill", "tile_fill", "imbalance", "smallest_share",
        "largest_share", "tokens_per_s", "samples_per_s", "data_wait_share", "quarantined", "truncated",
    }
)  # fmt: skip


def make_stage(recipe: Recipe, registry: Registry) -> "Stage":
    """The stage that a recipe names.

    Raises ValueError for options that it does not take, and where its losses are called as what the loop measures.
    """
    stage: Stage = registry.build("stage", recipe.stage.name, recipe=recipe, registry=registry)
    if taken := sorted(LOOP_METRICS & set(stage.target_kinds)):
        raise ValueError(
            f"stage {recipe.stage.name!r} has target_kinds {taken}, which the loop itself logs: give them other names"
        )
    return stage


class Stage(ABC):
    """One stage of one run. Made once a process, before anything is loaded.

    Class attributes: `name`, as recipes call it; `Options`, what `stage.options` may hold; `reads`, which of
    `STAGE_FIELDS` do something here (all, unless it says so); `target_kinds`, the names of what its losses are sums
    over, none of `LOOP_METRICS` (an instance may have its own, where options say what these are); `leaves_llm`, true
    where the finished checkpoint is a bare LLM and no HoVLE.
    `module`, in every method that takes it, is the nn.Module that the same stage's `build` returned. It is typed Any so
    that a stage can name its own class there.
    Raises ValueError for options that do not validate, and for a field that the recipe sets and the stage does not
    read.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Section]] = Section
    reads: ClassVar[tuple[str, ...]] = STAGE_FIELDS
    target_kinds: tuple[str, ...] = ("loss",)
    leaves_llm: ClassVar[bool] = False
    processor: HovleProcessor  # set by the loop from `build`

    def __init__(self, recipe: Recipe, registry: Registry):
        self.recipe, self.registry = recipe, registry
        self._opened: dict[str, Any] = {}
        try:
            self.options: Any = self.Options.model_validate(recipe.stage.options)
        except ValidationError as error:
            raise ValueError(
                f"stage.options of {self.name!r} are not valid:\n{explain(error, self.Options)}"
            ) from None
        for field in STAGE_FIELDS:
            section, key = field.split(".")
            part = getattr(recipe, section)
            default = type(part).model_fields[key].get_default(call_default_factory=True)
            if field not in self.reads and getattr(part, key) != default:
                read = [name for name in self.reads if name.startswith(f"{section}.")]
                raise ValueError(
                    f"{field} does nothing in stage {self.name!r}: leave it out"
                    + (f" (of such fields this stage reads {', '.join(read)})" if read else "")
                )

    @abstractmethod
    def build(self) -> tuple[nn.Module, HovleProcessor]:
        """The module that the loop trains (float32, on the CPU) and the processor."""

    def wrap(self, model: HovleForConditionalGeneration) -> nn.Module:
        """What `build` gives of a HoVLE: itself, unless a stage puts something around it. `hovle plan` calls it with a
        model on the meta device."""
        return model

    @abstractmethod
    def trainable(self, module: Any) -> Sequence[str]:
        """Prefixes of parameter names that train; everything else is frozen and in eval."""

    @abstractmethod
    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        """The samples, by global position."""

    @abstractmethod
    def targets(self, module: Any, batch: PackedBatch) -> dict[str, int]:
        """How many targets of each kind a batch has. The loop sums them over the step and over ranks."""

    @abstractmethod
    def loss(
        self, module: Any, batch: PackedBatch, totals: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is optimized, and what is logged.

        The first is the batch's share of the step's loss: each sum over targets divided by the global count in
        `totals`. The second holds sums to be divided by `totals` of the same name for the log.
        """

    @abstractmethod
    def export(self, module: Any, processor: HovleProcessor, folder: Path) -> None:
        """Write the finished checkpoint in transformers' format into `folder`."""

    def stream_options(self, ledger: Ledger) -> dict[str, Any]:
        """What every stream takes from the recipe."""
        train = self.recipe.train
        return {
            "seed": self.recipe.seed,
            "max_tokens": train.micro_batch_tokens,
            "max_tiles": train.micro_batch_tiles,
            "ledger": ledger,
            "tile_cache_bytes": int(self.recipe.data.tile_cache_gib * 2**30),
        }

    def setup(
        self, module: Any, processor: HovleProcessor, runtime: Runtime, progress: Progress | None = None
    ) -> None:
        """Anything that must be ready before the first step, such as teacher features. Runs on every rank."""
        return None

    def mixture(self, sources: Sequence[Source], field: str) -> Mixture:
        """Open the sources of a recipe field. Raises ValueError naming the field if it is empty."""
        if not sources:
            raise ValueError(
                f"data.{field} is empty, and stage {self.name!r} reads it: name at least one source"
            )
        opened = [(self.open(source), self._weight(source)) for source in sources]
        return Mixture(opened, seed=self.recipe.seed)

    def open(self, source: Source) -> Any:
        """The data set of a source, opened once: a stage draws from several mixtures of the same ones."""
        key = source.model_dump_json(exclude={"weight"})
        if key not in self._opened:
            self._opened[key] = open_source(source, self.registry)
        return self._opened[key]

    def _weight(self, source: Source) -> Weight:
        """A recipe counts a curriculum in shares of the run, a mixture in positions."""
        if not isinstance(source.weight, dict):
            return source.weight
        train = self.recipe.train
        assert train.global_batch_size is not None  # the recipe's validator
        return {
            round(share * train.steps) * train.global_batch_size: weight
            for share, weight in sorted(source.weight.items())
        }


class NextTokenStage(Stage):
    """What alignment and instruction tuning share: a HoVLE, and next-token prediction on targets."""

    def build(self) -> tuple[nn.Module, HovleProcessor]:
        model, processor = build_hovle(self.recipe.model, self.registry, self.recipe.seed)
        return self.wrap(model), processor

    def targets(self, module: HovleForConditionalGeneration, batch: PackedBatch) -> dict[str, int]:
        return {"loss": batch.num_target_tokens}

    def loss(
        self, module: HovleForConditionalGeneration, batch: PackedBatch, totals: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = next_token_loss(module, model_inputs(batch, self.processor), batch.labels)
        return loss / totals["loss"], {"loss": loss.detach()}

    def export(self, module: HovleForConditionalGeneration, processor: HovleProcessor, folder: Path) -> None:
        save_hovle(module, processor, folder)


def model_inputs(batch: PackedBatch, processor: HovleProcessor) -> dict[str, Any]:
    """A packed batch as a HoVLE's arguments; tiles travel as uint8 and are normalised on the device."""
    tiles = batch.pixel_values
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "pixel_values": None if tiles is None else processor.image_processor.normalize(tiles),
    }


def save_hovle(model: HovleForConditionalGeneration, processor: HovleProcessor, folder: Path) -> None:
    """A finished HoVLE in transformers' format: config, safetensors, generation config and processor."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def llm_is_tied(model: HovleForConditionalGeneration) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.language_model.get_input_embeddings().weight
