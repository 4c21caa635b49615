"""The sections of a recipe, each checked by itself; what holds between them is `hovle_train.config.Recipe`'s."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hovle_core.registry import did_you_mean
from hovle_data.mixture import check_weight
from hovle_data.sections import Section

# As YAML and JSON have them: tuples are lists there, and JSON's keys are strings.
Share = Annotated[float, Field(strict=False)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
]


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
    weight: float | dict[Share, float] = 1.0
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
    # Start the embedding blocks from the LLM's first ones, not from random weights.
    blocks_from_llm: bool = False
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
        given = self.model_fields_set & {
            "backbone", "tokenizer", "resize_embeddings", "blocks_from_llm", "embedding", "image",
        }  # fmt: skip
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
    text_tokens: tuple[Annotated[int, Field(ge=1)], int] = Field((16, 64), strict=False)
    # A run fails above this share of unreadable samples.
    max_quarantine_share: float = Field(0.01, ge=0, le=1)
    # Steps that a thread prepares ahead, which changes no result; 0: each is prepared when it is its turn.
    prefetch_steps: int = Field(2, ge=0)
    # Of each worker's memory, for tiles of pictures that come again: small sets, many questions about one picture.
    tile_cache_gib: float = Field(0, ge=0)
    # Threads that read and encode samples; their number changes no result.
    num_threads: int = Field(1, ge=1)
    # A conversation longer than a row: refused by name, or cut behind its last answer that fits.
    long_samples: Literal["refuse", "truncate"] = "refuse"

    @field_validator("text_tokens")
    @classmethod
    def _a_range(cls, text_tokens: tuple[int, int]) -> tuple[int, int]:
        if text_tokens[0] > text_tokens[1]:
            raise ValueError(f"text_tokens is {list(text_tokens)}: it reads [fewest, most]")
        return text_tokens


class AverageConfig(Section):
    """An exponential moving average of the weights. `export` says where it goes: into `final/` in place of the weights,
    or into `final_ema/` beside them."""

    decay: float = Field(0.999, gt=0, lt=1)
    export: Literal["final", "beside"] = "final"


class OptimConfig(Section):
    """The optimizer: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

    Muon's updates are scaled to AdamW's size (`match_rms_adamw`), so one `lr` serves both.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    betas: Betas = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    grad_clip: float | None = Field(1.0, gt=0)
    # Pattern of parameter names ("embedding.layers.*.o_proj.*") -> factor on the learning rate; the longest that
    # matches wins.
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = {}
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    # WSD decays to zero in this last share of the steps.
    decay_share: float = Field(0.2, gt=0, le=1)
    # The cosine ends at this share of the peak.
    min_lr_share: float = Field(0.0, ge=0, le=1)
    # Shares of the steps after which the cosine starts anew at the peak (SGDR, Loshchilov & Hutter 2017), such as
    # where a curriculum changes.
    restarts: list[Annotated[float, Field(gt=0, lt=1)]] = []
    ema: AverageConfig | None = None

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


class DropPathConfig(Section):
    """Stochastic depth of the embedding blocks: `rate` is the last block's, at the last step.

    `start_rate`: what it rises from, linearly over the steps; None keeps it as it is. `depth`: from 0 in the first
    block linearly up to the last one's, or the same in all.
    """

    rate: float = Field(gt=0, lt=1)
    start_rate: float | None = Field(None, ge=0, lt=1)
    depth: Literal["linear", "uniform"] = "linear"


class TrainConfig(Section):
    steps: int = Field(gt=0)
    # A step over all workers, whatever their number, is either so many samples or so many full rows.
    global_batch_size: int | None = Field(None, gt=0)
    global_batch_rows: int | None = Field(None, gt=0)
    # Budgets of one packed row; a worker's samples are packed into as few rows as fit.
    micro_batch_tokens: int = Field(4096, gt=0)
    micro_batch_tiles: int = Field(256, gt=0)
    # Rows are padded to a multiple of so many tokens: bfloat16 on a CPU makes a kernel for every length it meets, and
    # "auto" is 128 there and 1 elsewhere.
    pad_to_multiple_of: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    # A run whose rows are emptier than this share of micro_batch_tokens stops and says why.
    min_fill: float = Field(0.5, ge=0, le=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    drop_path: DropPathConfig | None = None
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    # Any fsspec URL (s3://bucket/prefix) or folder that gets a copy of checkpoints and of what the finished run leaves;
    # a run whose run_dir is gone goes on from there.
    storage_path: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_step(self) -> "TrainConfig":
        if (self.global_batch_size is None) == (self.global_batch_rows is None):
            raise ValueError(
                "give either global_batch_size (samples a step) or global_batch_rows (full rows a step)"
            )
        return self


class TeacherPoolConfig(Section):
    """Teachers of distillation as Ray actors beside the training workers, on nodes of these resources and labels."""

    actors: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    custom: dict[str, Annotated[float, Field(gt=0)]] = {}
    labels: dict[str, str] = {}


class ResourcesConfig(Section):
    """What Ray is asked for. `cpus_per_worker` also sets a worker's threads; None shares out the cores there are."""

    num_workers: int = Field(1, ge=1)
    cpus_per_worker: int | None = Field(None, ge=1)
    use_gpu: bool = False
    accelerator_type: str | None = None
    # Custom resources of a worker, as nodes offer them with `ray start --resources`, and labels its node must have.
    custom: dict[str, Annotated[float, Field(gt=0)]] = {}
    labels: dict[str, str] = {}
    # None: every worker runs the teacher of its stage itself.
    teacher_pool: TeacherPoolConfig | None = None
    # Workers that are not equally fast take samples of a step by their measured speed.
    balance: bool = False
    # Deaths of a worker or its node that the run survives by itself.
    max_failures: int = Field(3, ge=0)
    # A run in which no step ends for so long is over, with the stacks of all ranks.
    step_timeout_s: float = Field(1800, gt=0)

    @model_validator(mode="after")
    def _accelerators_are_used(self) -> "ResourcesConfig":
        if self.accelerator_type is not None and not self.use_gpu:
            raise ValueError(
                f"accelerator_type {self.accelerator_type!r} does nothing with use_gpu: false: leave it out, or set "
                "use_gpu: true"
            )
        return self


class ParallelConfig(Section):
    """How workers share a step: `ddp` keeps the weights on each, `fsdp2` a share of weights, gradients and optimizer
    state. Checkpoints are the same, so a run may go on with the other, and with another number of workers."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    # fsdp2: false keeps a layer's weights between forward and backward, for memory against communication.
    reshard_after_forward: bool = True
    # fsdp2: in which gradients are summed over workers.
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    # Norms and MLPs of transformer layers through torch.compile.
    compile: bool = False

    @model_validator(mode="after")
    def _strategy_reads_them(self) -> "ParallelConfig":
        for name in ("reshard_after_forward", "reduce_dtype"):
            if self.strategy != "fsdp2" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} does nothing with strategy {self.strategy!r}: leave it out, or "
                    "set strategy: fsdp2"
                )
        return self


class LanguageConfig(Section):
    """The language-preservation gate: perplexity on `texts` of what a stage starts from and of what it leaves.

    `texts`: name -> source of plain text that is in no training set. A stage past a bound fails; without bounds the
    perplexities are measured and noted.
    """

    texts: dict[str, Source] = Field(min_length=1)
    num_texts: int = Field(200, ge=1)
    # Of each text.
    max_tokens: int = Field(512, ge=2)
    # How much perplexity may grow: 0.1 is a tenth.
    max_increase: float | None = Field(None, ge=0)
    max_perplexity: float | None = Field(None, gt=1)
