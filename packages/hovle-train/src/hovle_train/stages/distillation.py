"""Distillation: the holistic embedding learns to see from a vision teacher, and to read from the LLM's own text
embedding, on images and text that have nothing to do with each other (paper, section 3.2).

    loss = -w_I · mean cos(head(x̂_I), z_I) - w_T · mean cos(x̂_T, z_T)

z_I: features of the frozen teacher at the image token's place; head: a projection to the teacher's width that is
thrown away after training, or nothing, where the teacher's own connector brings z_I to the LLM's width. z_T: the LLM's
embedding of the token. With `blocks`, the image's part is a weighted mean over outputs of several blocks, each with a
head of its own; with `teachers`, over several teachers, each with a head of its own. Weights, head and teacher layer of
the paper are not published; these are ours.

Shapes: T packed tokens, N tiles, P image tokens a tile, D hidden size, C teacher channels.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hovle_core.losses import cosine_loss
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_core.registry import Registry
from hovle_core.roles import TeacherEncoder
from hovle_data.mixture import Mixture
from hovle_data.packing import PackedBatch, pack
from hovle_data.quarantine import Ledger
from hovle_data.streams import Stream, UnpairedStream
from hovle_train.build import build_hovle
from hovle_train.config import Recipe
from hovle_train.features import TeacherFeatures
from hovle_train.lineage import content_of
from hovle_train.recipe_sections import Named
from hovle_train.runtime import Runtime
from hovle_train.stages.base import HOVLE_FIELDS, Progress, Stage, model_inputs, save_hovle
from hovle_train.stages.distillation_options import DistillationOptions
from hovle_train.teacher_tiles import tile_batches
from hovle_train.teachers import build_teacher, heads_of, join_heads, made_by, target_names, widths

if TYPE_CHECKING:
    from hovle_train.teacher_pool import PooledTeacher  # with Ray, which not every run has

logger = logging.getLogger(__name__)

HEAD_FILE = "distillation_head.safetensors"
NORM_SAMPLES = 64


class DistillationModule(nn.Module):
    """The HoVLE that is kept and the heads that are not: the output's, and those of earlier blocks."""

    def __init__(
        self, model: HovleForConditionalGeneration, head: nn.Module, block_heads: Sequence[nn.Module] = ()
    ):
        super().__init__()
        self.model, self.head, self.block_heads = model, head, nn.ModuleList(block_heads)


class Distillation(Stage):
    """Trains the embedding blocks and the head; the LLM is not even run. Reads `data.images` and `data.texts`."""

    name = "distillation"
    Options = DistillationOptions
    reads = ("data.images", "data.texts", "data.text_tokens", *HOVLE_FIELDS)
    target_kinds: tuple[str, ...] = ("image_cosine", "text_cosine")
    pool: "PooledTeacher | None" = None

    def __init__(self, recipe: Recipe, registry: Registry):
        super().__init__(recipe, registry)
        teachers = self.options.all_teachers
        self.teacher_names = target_names(teachers) if len(teachers) > 1 else []
        self.target_kinds = (*type(self).target_kinds, *self.teacher_names)
        if self.options.head == "connector" and recipe.resources.teacher_pool is not None:
            raise ValueError(
                "stage.options.head 'connector' is not in a resources.teacher_pool, which gives the teacher's features "
                "alone: set head: linear or mlp, or leave the pool out"
            )

    def build(self) -> tuple[DistillationModule, HovleProcessor]:
        model, processor = build_hovle(self.recipe.model, self.registry, self.recipe.seed)
        return self.wrap(model), processor

    def wrap(self, model: HovleForConditionalGeneration) -> DistillationModule:
        config, connected = model.config.embedding_config, self.options.head == "connector"
        centre = not connected if self.options.centre is None else self.options.centre
        # Not a part of the module: it never trains, and no checkpoint holds it.
        teacher = self._teacher(config.tokens_per_tile)
        self.features = TeacherFeatures(teacher, config.tokens_per_tile, centre, connected)
        if connected:
            if self.features.size != config.hidden_size:
                raise ValueError(
                    f"stage.options.head: the connector of teacher {self._named.name!r} gives {self.features.size} "
                    f"channels, and the LLM reads {config.hidden_size}: set head: linear or mlp"
                )
            self.blocks, self.sizes, self.shares = [config.num_hidden_layers], [self.features.size], [1.0]
            return DistillationModule(model, nn.Identity())
        weights, self.sizes = self._distilled(model)
        self.blocks = list(weights)
        shared = [t.weight for t in self.options.teachers] if self.teacher_names else [*weights.values()]
        self.shares = [weight / sum(shared) for weight in shared]
        heads = [self._head(i, config.hidden_size, size) for i, size in enumerate(self.sizes)]
        earlier = len(self.blocks) - 1
        return DistillationModule(model, join_heads(heads[earlier:]), heads[:earlier])

    @property
    def _named(self) -> Named:
        """The only teacher, or the first one."""
        return self.options.all_teachers[0]

    def _teacher(self, num_tokens: int) -> TeacherEncoder:
        """The recipe's teachers joined, here; or its one in a pool of them. A dry run has no pool."""
        if self.recipe.resources.teacher_pool is not None:
            import ray

            from hovle_train.teacher_pool import PooledTeacher, pool_names

            if ray.is_initialized():
                # How many samples are a step of full rows is not known beforehand: each one is asked for alone.
                self.pool = PooledTeacher(pool_names(self.recipe), self.recipe.train.global_batch_size or 1)
                return self.pool
        return build_teacher(self.options.all_teachers, self.registry, num_tokens)

    def _distilled(self, model: HovleForConditionalGeneration) -> tuple[dict[int, float], list[int]]:
        """Blocks with their weights, ascending, and the teacher's channels that each head learns: one head a block, or
        one a teacher."""
        teacher, num = self.features.teacher, model.config.embedding_config.num_hidden_layers
        blocks, layers = dict(sorted((self.options.blocks or {num: 1.0}).items())), teacher.layer_sizes
        if max(blocks) != num:
            raise ValueError(
                f"stage.options.blocks {list(blocks)} must end with the last of the {num} blocks, whose output the "
                "LLM reads"
            )
        if len(blocks) > 1 and model.config.embedding_config.pixel_shuffle_loc == "post":
            raise ValueError(
                "stage.options.blocks: with pixel_shuffle_loc 'post' an earlier block's tokens are not the teacher's "
                f"grid of {self.features.num_tokens}: distil the last block alone"
            )
        if len(blocks) == 1:
            return blocks, widths(teacher)
        if len(layers) == 1:  # all that the teacher gives
            return blocks, [self.features.size] * len(blocks)
        if len(layers) != len(blocks):
            raise ValueError(
                f"stage.options.blocks names {len(blocks)} blocks, and teacher {self._named.name!r} joins "
                f"{len(layers)} layers: give as many of both, or one layer"
            )
        return blocks, list(layers)

    def _head(self, index: int, hidden_size: int, size: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed + index)
            if self.options.head == "linear":
                return nn.Linear(hidden_size, size)
            return nn.Sequential(
                nn.Linear(hidden_size, hidden_size * 4), nn.GELU(), nn.Linear(hidden_size * 4, size)
            )

    def trainable(self, module: DistillationModule) -> Sequence[str]:
        heads = [
            name for name, part in module.named_children() if name != "model" and list(part.parameters())
        ]
        return ["model.embedding.", *(f"{name}." for name in heads)]

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        data = self.recipe.data
        options: dict[str, Any] = {
            "images": self.mixture(data.images, "images"),
            "texts": self.mixture(data.texts, "texts"),
            "processor": processor,
            "text_tokens": data.text_tokens,
            **self.stream_options(ledger),
        }
        if self.pool is None or self.options.cache_features:
            return UnpairedStream(**options)
        from hovle_train.teacher_pool import AskingStream

        return AskingStream(self.pool.ask, **options)

    def setup(
        self, module: nn.Module, processor: HovleProcessor, runtime: Runtime, progress: Progress | None = None
    ) -> None:
        """Run the teacher over the images once (`cache_features`), or take the mean feature of the first ones."""
        self.features.teacher.to(runtime.device)
        if not self.options.cache_features:
            self.features.set_mean(tiles for _, _, tiles in self._batches(processor, runtime))
            return
        store = self.recipe.path / "teacher_features"
        if runtime.is_main:
            self._compute_features(store, processor, runtime, progress)
        runtime.barrier()
        if not runtime.is_main and not self.features.open_store(store):
            raise ValueError(
                f"{store} was built by rank 0 but cannot be read here: run_dir must be shared by all workers"
            )

    def _compute_features(
        self, store: Path, processor: HovleProcessor, runtime: Runtime, progress: Progress | None
    ) -> None:
        """Have the teacher look at all images, unless it has looked at these, so cut, before."""
        mixture = self._images()
        made = {
            "teacher": made_by(self.options.all_teachers),
            "centred": self.features.centre,
            "connected": self.features.connected,
            "image": [self.features.num_tokens, processor.image_processor.to_dict()],
            "data": [source.model_dump(mode="json") for source in self.recipe.data.images],
            "content": [content_of(source) for source in mixture.sources],
        }
        if self.features.open_store(store, made):
            return

        def report(done: int) -> None:
            if progress is not None:
                progress("teacher features", done, mixture.num_samples)

        self.features.build_store(store, partial(self._batches, processor, runtime), report, made)

    def _batches(
        self, processor: HovleProcessor, runtime: Runtime, first: int = 0
    ) -> Iterator[tuple[int, list[str], Tensor]]:
        """`tile_batches` of the images from the `first` on, on the worker's device."""
        batches = tile_batches(self._images(), processor, first)
        for behind, keys, tiles in batches if self.pool is None else self.pool.ahead(batches):
            yield behind, keys, tiles.to(runtime.device)

    def _images(self) -> Mixture:
        return self.mixture(self.recipe.data.images, "images")

    def targets(self, module: DistillationModule, batch: PackedBatch) -> dict[str, int]:
        images = int((batch.input_ids == module.model.config.image_token_id).sum())
        counts = {"image_cosine": images, "text_cosine": batch.num_tokens - images}
        return counts | dict.fromkeys(self.teacher_names, images)

    def loss(
        self, module: DistillationModule, batch: PackedBatch, totals: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model = module.model
        earlier = [model.embedding.layers[block - 1] for block in self.blocks[:-1]]
        with outputs_of(earlier) as outputs:
            embedded = model.embed(**model_inputs(batch, self.processor))[0]  # [T, D]
        is_image = batch.input_ids[0] == model.config.image_token_id
        is_text = ~is_image
        is_text[batch.num_tokens :] = False
        with torch.no_grad():
            text_target = model.language_model.get_input_embeddings()(batch.input_ids[0][is_text])
        text = cosine_loss(embedded[is_text], text_target)
        loss = self.options.text_weight * text / totals["text_cosine"]
        logged = {"text_cosine": -text.detach()}
        if batch.pixel_values is not None:
            target = self.features.get(batch.tile_keys, batch.pixel_values).flatten(0, 1)  # [N · P, C]
            one_each = sum(self.sizes) == target.shape[-1]
            targets = target.split(self.sizes, dim=-1) if one_each else [target] * len(self.sizes)
            heads = [*module.block_heads, *heads_of(module.head)]
            states = [output[0] for output in outputs]
            states += [embedded] * (len(heads) - len(states))
            each = [
                cosine_loss(head(state[is_image]), wanted)
                for head, state, wanted in zip(heads, states, targets, strict=True)
            ]
            image = torch.stack([share * one for share, one in zip(self.shares, each, strict=True)]).sum()
            loss = loss + self.options.image_weight * image / totals["image_cosine"]
            logged["image_cosine"] = -image.detach()
            # Of one teacher there is nothing more to say.
            logged |= {name: -one.detach() for name, one in zip(self.teacher_names, each, strict=False)}
        return loss, logged

    @torch.no_grad()
    def _match_norms(self, module: DistillationModule, processor: HovleProcessor) -> None:
        """Scale the embedding's output to the mean length of the LLM's embeddings, measured on the first samples."""
        model = module.model
        stream = self.stream(processor, Ledger(None, max_share=1.0))
        samples = [sample for k in range(NORM_SAMPLES) if (sample := stream.get(k)) is not None]
        table = model.language_model.get_input_embeddings().weight
        student, teacher = 0.0, 0.0
        for packed in pack(
            samples, self.recipe.train.micro_batch_tokens, self.recipe.train.micro_batch_tiles
        ):
            batch = packed.to(table.device)
            is_text = batch.input_ids[0] != model.config.image_token_id
            student += float(model.embed(**model_inputs(batch, processor))[0][is_text].norm(dim=-1).sum())
            teacher += float(table[batch.input_ids[0][is_text]].norm(dim=-1).sum())
        model.embedding.rescale_(teacher / student)
        for head in heads_of(module.head):
            first = next((m for m in head.modules() if isinstance(m, nn.Linear)), None)
            if first is not None:
                first.weight.div_(teacher / student)  # so that the head gives what it gave

    def export(self, module: DistillationModule, processor: HovleProcessor, folder: Path) -> None:
        """The HoVLE alone; the head goes into a file beside it, for evaluation only."""
        if self.options.match_norms:
            self._match_norms(module.eval(), processor)
        save_hovle(module.model, processor, folder)
        head = {
            f"head.{name}": tensor.cpu().contiguous() for name, tensor in module.head.state_dict().items()
        }
        of_output = sum(self.sizes[len(self.blocks) - 1 :])
        mean = self.features.mean[-of_output:].cpu().contiguous()
        save_file({**head, "mean": mean}, folder / HEAD_FILE)


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules give while in the context, in the order in which they run."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
