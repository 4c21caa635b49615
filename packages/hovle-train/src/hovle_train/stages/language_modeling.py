"""Language modeling: pre-train or continue the bare LLM on text, through the same loop as every stage.

No part of the paper, which takes a finished LLM. It makes small LLMs for machines and studies that need one.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.losses import next_token_loss
from hovle_core.processor import Encoded, HovleProcessor
from hovle_data.packing import PackedBatch
from hovle_data.quarantine import Ledger
from hovle_data.schema import Sample
from hovle_data.streams import ConversationStream, Stream, TextStream
from hovle_train.build import build_llm, build_processor, build_tokenizer, prepare_for_training
from hovle_train.stages.base import Stage


class TextOrChatStream(ConversationStream, TextStream):
    """Plain text with every token a target, and conversations without pictures with their answers as targets."""

    def encode(self, sample: Sample, k: int) -> Encoded:
        return TextStream.encode(self, sample, k) if sample.text is not None else super().encode(sample, k)


class LanguageModeling(Stage):
    """Next-token prediction of the LLM alone. Reads `data.sources` (text, and conversations without pictures)."""

    name = "language_modeling"
    reads = ("data.sources", "data.long_samples")
    leaves_llm = True

    def build(self) -> tuple[PreTrainedModel, HovleProcessor]:
        tokenizer = build_tokenizer(self.recipe.model, self.registry)
        model = build_llm(self.recipe.model, self.registry, tokenizer)
        prepare_for_training(model, self.recipe.model)
        # Pictures never come here, but one processor encodes text for every stage; any tile size will do.
        return model, build_processor(self.recipe.model, tokenizer, HolisticEmbeddingConfig())

    def trainable(self, module: nn.Module) -> Sequence[str]:
        return [""]

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        sources = self.mixture(self.recipe.data.sources, "sources")
        long_samples = self.recipe.data.long_samples
        return TextOrChatStream(sources, processor, long_samples=long_samples, **self.stream_options(ledger))

    def targets(self, module: nn.Module, batch: PackedBatch) -> dict[str, int]:
        return {"loss": batch.num_target_tokens}

    def loss(
        self, module: PreTrainedModel, batch: PackedBatch, totals: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        loss = next_token_loss(module, inputs, batch.labels)
        return loss / totals["loss"], {"loss": loss.detach()}

    def export(self, module: PreTrainedModel, processor: HovleProcessor, folder: Path) -> None:
        module.config.use_cache = True
        module.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
