"""Distillation: the holistic embedding learns to see from a vision teacher, and to read from the LLM's own text
embedding, on images and text that have nothing to do with each other (paper, section 3.2).

    loss = -w_I · mean cos(head(x̂_I), z_I) - w_T · mean cos(x̂_T, z_T)

z_I: features of the frozen teacher at the image token's place; head: a projection to the teacher's width that is
thrown away after training. z_T: the LLM's embedding of the token. Weights, head and teacher layer of the paper are
not published; these are ours.

Shapes: T packed tokens, N tiles, P image tokens a tile, D hidden size, C teacher channels.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from hovle_core.losses import cosine_loss
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_core.roles import TeacherEncoder
from hovle_data.decode import cut_tiles
from hovle_data.packing import PackedBatch, pack
from hovle_data.quarantine import Ledger
from hovle_data.schema import BadSample
from hovle_data.sections import Section
from hovle_data.streams import Stream, UnpairedStream
from hovle_train.build import build_hovle
from hovle_train.config import Named
from hovle_train.features import TeacherFeatures
from hovle_train.runtime import Runtime
from hovle_train.stages.base import Progress, Stage, model_inputs, save_hovle

logger = logging.getLogger(__name__)

HEAD_FILE = "distillation_head.safetensors"
TEACHER_BATCH = 64
NORM_SAMPLES = 64


class DistillationOptions(Section):
    """`head` projects the student to the teacher's width; `centre` subtracts the mean feature from targets;
    `cache_features` runs the teacher once over all images and trains from disk; `match_norms` scales the finished
    embedding so that text comes out as long as the LLM's own embeddings: a cosine leaves lengths free, and an LLM
    cannot read what is a hundred times longer than anything it has seen (ours, not the paper's)."""

    teacher: Named
    head: Literal["linear", "mlp"] = "linear"
    image_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(1.0, ge=0)
    centre: bool = True
    cache_features: bool = False
    match_norms: bool = True


class DistillationModule(nn.Module):
    """The HoVLE that is kept and the head that is not."""

    def __init__(self, model: HovleForConditionalGeneration, head: nn.Module):
        super().__init__()
        self.model, self.head = model, head


class Distillation(Stage):
    """Trains the embedding blocks and the head; the LLM is not even run. Reads `data.images` and `data.texts`."""

    name = "distillation"
    Options = DistillationOptions
    target_kinds = ("image_cosine", "text_cosine")

    def build(self) -> tuple[DistillationModule, HovleProcessor]:
        model, processor = build_hovle(self.recipe.model, self.registry, self.recipe.seed)
        teacher = self.registry.build("teacher", self.options.teacher.name, **self.options.teacher.options)
        if not isinstance(teacher, TeacherEncoder):
            raise ValueError(
                f"teacher {self.options.teacher.name!r} is a {type(teacher).__name__}, not a TeacherEncoder"
            )
        # Not a part of the module: it never trains, and no checkpoint holds it.
        tokens = model.config.embedding_config.tokens_per_tile
        self.features = TeacherFeatures(teacher.eval().requires_grad_(False), tokens, self.options.centre)
        return DistillationModule(model, self._head(model.config.embedding_config.hidden_size)), processor

    def _head(self, hidden_size: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            if self.options.head == "linear":
                return nn.Linear(hidden_size, self.features.size)
            return nn.Sequential(
                nn.Linear(hidden_size, hidden_size * 4),
                nn.GELU(),
                nn.Linear(hidden_size * 4, self.features.size),
            )

    def trainable(self, module: nn.Module) -> Sequence[str]:
        return ["model.embedding.", "head."]

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        data = self.recipe.data
        return UnpairedStream(
            images=self.mixture(data.images, "images"),
            texts=self.mixture(data.texts, "texts"),
            processor=processor,
            text_tokens=data.text_tokens,
            **self.stream_options(ledger),
        )

    def setup(
        self, module: nn.Module, processor: HovleProcessor, runtime: Runtime, progress: Progress | None = None
    ) -> None:
        """Run the teacher over the images once (`cache_features`), or take the mean feature of the first ones."""
        self.features.teacher.to(runtime.device)
        if not self.options.cache_features:
            self.features.set_mean(tiles.to(runtime.device) for _, tiles in self._teacher_batches(processor))
            return
        store = self.recipe.path / "teacher_features"
        images = [source.model_dump(mode="json") for source in self.recipe.data.images]
        made_by = [
            self.options.teacher.model_dump(mode="json"),
            self.options.centre,
            self.features.num_tokens,
            images,
        ]
        if runtime.is_main and not self.features.open_store(store, made_by):
            batches = ((keys, tiles.to(runtime.device)) for keys, tiles in self._teacher_batches(processor))
            num_images = self.mixture(self.recipe.data.images, "images").num_samples
            report = None if progress is None else lambda done: progress("teacher features", done, num_images)
            self.features.build_store(store, batches, report, made_by)
        runtime.barrier()
        if not runtime.is_main and not self.features.open_store(store, made_by):
            raise ValueError(
                f"{store} was built by rank 0 but cannot be read here: run_dir must be shared by all workers"
            )

    def _teacher_batches(self, processor: HovleProcessor) -> Iterator[tuple[list[str], Tensor]]:
        """All images in the order of their sources, as (tile keys, uint8 tiles `[N, 3, S, S]`).

        Pictures that cannot be read are passed over here: the stream quarantines and names them.
        """
        mixture = self.mixture(self.recipe.data.images, "images")
        keys: list[str] = []
        tiles: list[np.ndarray] = []
        for j, source in enumerate(mixture.sources):
            for i in range(len(source)):
                try:
                    sample = source[i]
                    images = [cut_tiles(processor, image) for image in sample.images[:1]]
                except BadSample as bad:
                    logger.info("teacher features: %s", bad)
                    continue
                for cut in images:
                    keys += [f"{mixture.names[j]}/{sample.key}#{n}" for n in range(len(cut))]
                    tiles.append(np.ascontiguousarray(cut))  # channels last: convolutions are fastest
                if len(keys) >= TEACHER_BATCH:
                    yield keys, torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2)
                    keys, tiles = [], []
        if tiles:
            yield keys, torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2)

    def targets(self, module: DistillationModule, batch: PackedBatch) -> dict[str, int]:
        images = int((batch.input_ids == module.model.config.image_token_id).sum())
        return {"image_cosine": images, "text_cosine": batch.input_ids.shape[1] - images}

    def loss(
        self, module: DistillationModule, batch: PackedBatch, totals: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model = module.model
        embedded = model.embed(**model_inputs(batch, self.processor))[0]  # [T, D]
        is_image = batch.input_ids[0] == model.config.image_token_id
        with torch.no_grad():
            text_target = model.language_model.get_input_embeddings()(batch.input_ids[0][~is_image])
        text = cosine_loss(embedded[~is_image], text_target)
        loss = self.options.text_weight * text / totals["text_cosine"]
        logged = {"text_cosine": -text.detach()}
        if batch.pixel_values is not None:
            target = self.features.get(batch.tile_keys, batch.pixel_values).flatten(0, 1)  # [N · P, C]
            image = cosine_loss(module.head(embedded[is_image]), target)
            loss = loss + self.options.image_weight * image / totals["image_cosine"]
            logged["image_cosine"] = -image.detach()
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
        first = next(m for m in module.head.modules() if isinstance(m, nn.Linear))
        first.weight.div_(teacher / student)  # so that the head gives what it gave

    def export(self, module: DistillationModule, processor: HovleProcessor, folder: Path) -> None:
        """The HoVLE alone; the head goes into a file beside it, for evaluation only."""
        if self.options.match_norms:
            self._match_norms(module.eval(), processor)
        save_hovle(module.model, processor, folder)
        head = {
            f"head.{name}": tensor.cpu().contiguous() for name, tensor in module.head.state_dict().items()
        }
        save_file({**head, "mean": self.features.mean.cpu()}, folder / HEAD_FILE)
