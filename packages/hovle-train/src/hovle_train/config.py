"""Recipes: what a run is, in YAML, checked before anything starts. Unknown keys are errors that suggest a right one."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from hovle_core.registry import Registry, did_you_mean
from hovle_data.mixture import check_weight
from hovle_data.sections import Section, explain

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Named(Section):
    """Something that a plugin provides, by name, with options for its constructor."""

    name: str
    options: dict[str, Any] = {}


class Source(Section):
    """A data set in a mixture. `name` is a registered dataset kind, `weight` its share of the draws.

    A curriculum is a weight that changes: `weight: {0: 3, 0.7: 1}` is 3 for the first 70 % of the steps and then 1.
    """

    path: str
    name: str = "webdataset"
    weight: float | dict[float, float] = 1.0
    options: dict[str, Any] = {}

    @field_validator("weight")
    @classmethod
    def _weight_is_drawn(cls, weight: float | dict[float, float]) -> float | dict[float, float]:
        check_weight(weight)
        if isinstance(weight, dict) and max(weight) >= 1:
            raise ValueError(f"weight is {weight}: it changes at shares of the steps, from 0 to below 1")
        return weight


class ImageConfig(Section):
    """How pictures are tiled; the tile's side is the embedding's `image_size`."""

    min_tiles: int = Field(1, ge=1)
    max_tiles: int = Field(12, ge=1)
    use_thumbnail: bool = True
    # Pictures decoded at a reduced scale and resized by PyTorch: faster, a level or two off the released pixels.
    fast: bool = False


class ModelConfig(Section):
    """Either `init_from` (a HoVLE checkpoint or a finished run), or a `backbone` and a new `embedding` around it."""

    init_from: str | None = None
    backbone: Named | None = None
    tokenizer: Named | None = None
    # Lay the LLM's embeddings out anew for `tokenizer`: tokens that both know keep their rows.
    resize_embeddings: bool = False
    # Fields of HolisticEmbeddingConfig; width, heads and vocabulary come from the LLM where they are not given.
    embedding: dict[str, Any] = {}
    image: ImageConfig = ImageConfig()
    # Settings of plugins that wrap the model while it trains (hovle_build_model), by the plugin's name.
    wrappers: dict[str, Any] = {}
    attention: str = "hovle_packed"
    activation_checkpointing: bool = False

    @field_validator("embedding")
    @classmethod
    def _fields_of_the_embedding(cls, embedding: dict[str, Any]) -> dict[str, Any]:
        if not embedding:
            return embedding
        from hovle_core.config import HolisticEmbeddingConfig  # imports torch
        from hovle_core.official import own_fields

        known = own_fields(HolisticEmbeddingConfig)
        if unknown := sorted(embedding.keys() - known):
            hint = did_you_mean(unknown[0], known) or f" (known: {', '.join(sorted(known))})"
            raise ValueError(f"unknown field {unknown[0]!r}{hint}")
        return embedding

    @model_validator(mode="after")
    def _resized_for_a_tokenizer(self) -> "ModelConfig":
        if self.resize_embeddings and self.tokenizer is None:
            raise ValueError(
                "resize_embeddings fits the LLM to a tokenizer of another: name it in model.tokenizer"
            )
        return self

    @model_validator(mode="after")
    def _init_from_is_whole(self) -> "ModelConfig":
        given = self.model_fields_set & {"backbone", "tokenizer", "resize_embeddings", "embedding", "image"}
        if self.init_from is None or not given:
            return self
        default = ModelConfig()
        if changed := [name for name in sorted(given) if getattr(self, name) != getattr(default, name)]:
            raise ValueError(f"init_from brings its own {changed}: leave them out, or start from a backbone")
        return self


class DataConfig(Section):
    """Mixtures: `sources` for pairs, conversations and plain text; `images` and `texts` for unpaired distillation."""

    sources: list[Source] = []
    images: list[Source] = []
    texts: list[Source] = []
    # Text tokens beside each image in distillation, drawn uniformly from this range.
    text_tokens: tuple[int, int] = (16, 64)
    # A run fails above this share of unreadable samples.
    max_quarantine_share: float = Field(0.01, ge=0, le=1)
    prefetch_steps: int = Field(2, ge=1)
    # Threads that read and encode samples; their number changes no result.
    num_threads: int = Field(1, ge=1)
    # A conversation longer than a row: refused by name, or cut behind its last answer that fits.
    long_samples: Literal["refuse", "truncate"] = "refuse"


class OptimConfig(Section):
    """The optimizer: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

    Muon's updates are scaled to AdamW's size (`match_rms_adamw`), so one `lr` serves both.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    grad_clip: float | None = Field(1.0, gt=0)
    # Pattern of parameter names ("embedding.layers.*.o_proj.*") -> factor on the learning rate; the longest that
    # matches wins.
    lr_factors: dict[str, float] = {}
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    # Share of the steps in which WSD decays to zero.
    decay_share: float = Field(0.2, gt=0, le=1)
    # The cosine ends at this share of the peak.
    min_lr_share: float = Field(0.0, ge=0, le=1)
    # Shares of the steps after which the cosine starts anew at the peak (SGDR, Loshchilov & Hutter 2017), such as
    # where a curriculum changes.
    restarts: list[Annotated[float, Field(gt=0, lt=1)]] = []

    @model_validator(mode="after")
    def _schedule_reads_them(self) -> "OptimConfig":
        for name, schedule in (("decay_share", "wsd"), ("min_lr_share", "cosine"), ("restarts", "cosine")):
            if self.schedule != schedule and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {getattr(self, name)} does nothing with schedule {self.schedule!r}: leave it out, or set "
                    f"schedule: {schedule}"
                )
        if self.restarts != sorted(set(self.restarts)):
            raise ValueError(f"restarts {self.restarts} must ascend")
        return self


class TrainConfig(Section):
    steps: int = Field(gt=0)
    # A step over all workers, whatever their number, is either so many samples or so many full rows.
    global_batch_size: int | None = Field(None, gt=0)
    global_batch_rows: int | None = Field(None, gt=0)
    # Budgets of one packed row; a worker's samples are packed into as few rows as fit.
    micro_batch_tokens: int = Field(4096, gt=0)
    micro_batch_tiles: int = Field(256, gt=0)
    # A run whose rows are emptier than this share of micro_batch_tokens stops and says why.
    min_fill: float = Field(0.5, ge=0, le=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _one_kind_of_step(self) -> "TrainConfig":
        if (self.global_batch_size is None) == (self.global_batch_rows is None):
            raise ValueError(
                "give either global_batch_size (samples a step) or global_batch_rows (full rows a step)"
            )
        return self


class ResourcesConfig(Section):
    """What Ray is asked for. `cpus_per_worker` also sets a worker's threads; None shares out this machine's cores."""

    num_workers: int = Field(1, ge=1)
    cpus_per_worker: int | None = Field(None, ge=1)
    use_gpu: bool = False
    accelerator_type: str | None = None
    max_failures: int = Field(3, ge=0)

    @model_validator(mode="after")
    def _accelerators_are_used(self) -> "ResourcesConfig":
        if self.accelerator_type is not None and not self.use_gpu:
            raise ValueError(
                f"accelerator_type {self.accelerator_type!r} does nothing with use_gpu: false: leave it out, or set "
                "use_gpu: true"
            )
        return self


class Recipe(Section):
    """A run of one stage. `run_dir` holds all it writes; the same recipe and folder resume it."""

    stage: Named
    run_dir: str
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig
    train: TrainConfig
    resources: ResourcesConfig = ResourcesConfig()
    # Settings of plugins that observe runs, by the plugin's name; they know their own fields.
    observers: dict[str, Any] = {}

    @model_validator(mode="after")
    def _curricula_know_their_positions(self) -> "Recipe":
        for source in (*self.data.sources, *self.data.images, *self.data.texts):
            if isinstance(source.weight, dict) and self.train.global_batch_size is None:
                raise ValueError(
                    f"weight of {source.path} is {source.weight}: how many samples full rows will hold is not known "
                    "beforehand; set train.global_batch_size in place of global_batch_rows, or give one weight"
                )
        return self

    @property
    def path(self) -> Path:
        return Path(self.run_dir)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(
    recipe: str | Path, overrides: list[str] | None = None, registry: Registry | None = None
) -> Recipe:
    """Read a recipe from a file, or by the name a plugin gave it, and apply `a.b=value` overrides (values are YAML).

    Raises FileNotFoundError for no such file or name, ValueError naming every bad key with a suggestion.
    """
    path = Path(recipe)
    if not path.is_file():
        names = [spec.name for spec in registry.specs("recipe")] if registry else []
        if registry is None or str(recipe) not in names:
            raise FileNotFoundError(
                f"no recipe file {str(recipe)!r}, and no plugin offers one by that name (known: {names})"
            )
        path = registry.resource("recipe", str(recipe))
    raw = yaml.safe_load(path.read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path} must be a mapping of sections, got {type(raw).__name__}")
    return parse_recipe(apply_overrides(raw, overrides or []), source=str(path))


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `a.b.0.c=value` in a nested mapping; a number indexes a list. Raises ValueError for a malformed override."""
    raw = json.loads(json.dumps(raw))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} must read key.sub_key=value")
        *parents, last = key.split(".")
        node: Any = raw
        for part in parents:
            node = (
                node[_list_index(node, part, override)]
                if isinstance(node, list)
                else node.setdefault(part, {})
            )
            if not isinstance(node, dict | list):
                raise ValueError(f"override {override!r}: {part!r} is a value, not a section")
        parsed = yaml.safe_load(value)
        # YAML 1.1 reads 3e-4 as a string; people mean a number.
        if isinstance(parsed, str) and _EXPONENT.fullmatch(parsed):
            parsed = float(parsed)
        node[_list_index(node, last, override) if isinstance(node, list) else last] = parsed
    return raw


def _list_index(node: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override {override!r}: {part!r} must index a list of {len(node)}")
    return int(part)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping. Raises ValueError with one line for each problem."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source} is not valid:\n" + explain(error, Recipe)) from None
