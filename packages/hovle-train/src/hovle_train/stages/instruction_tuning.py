"""Instruction tuning: next-token prediction on answers, everything trains (paper, section 3.3), or LoRA adapters do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_data.quarantine import Ledger
from hovle_data.sections import Section
from hovle_data.streams import PairStream, Stream
from hovle_train.lineage import parent_of
from hovle_train.lora import LoraOptions, adapt, merged, save_adapter
from hovle_train.stages.base import HOVLE_FIELDS, NextTokenStage, llm_is_tied


class InstructionTuningOptions(Section):
    """`lora`: adapters train in place of the weights; `final/` holds the merged model, and `final/adapter/` them."""

    lora: LoraOptions | None = None


class InstructionTuning(NextTokenStage):
    """Embedding and LLM learn to answer. Reads `data.sources` (conversations; pairs are taken too).

    The one table that stays as it is: the LLM's own text embedding, which a HoVLE does not read, unless the LLM's
    head is tied to it.
    """

    name = "instruction_tuning"
    Options = InstructionTuningOptions
    reads = ("data.sources", "data.long_samples", *HOVLE_FIELDS)

    def wrap(self, model: HovleForConditionalGeneration) -> nn.Module:
        lora = self.options.lora
        return model if lora is None else adapt(model, lora, self.recipe.seed)

    def trainable(self, module: Any) -> Sequence[str]:
        if self.options.lora is not None:
            return [name for name, _ in module.named_parameters() if ".lora_" in name]
        if llm_is_tied(module):
            return ["embedding.", "language_model."]
        unread = module.language_model.get_input_embeddings().weight
        llm = [
            name
            for name, p in module.named_parameters()
            if name.startswith("language_model.") and p is not unread
        ]
        return ["embedding.", *llm]

    def export(self, module: Any, processor: HovleProcessor, folder: Path) -> None:
        if self.options.lora is not None:
            save_adapter(module, folder, parent_of(self.recipe))
            module = merged(module)
        super().export(module, processor, folder)

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        sources = self.mixture(self.recipe.data.sources, "sources")
        long_samples = self.recipe.data.long_samples
        return PairStream(sources, processor, long_samples=long_samples, **self.stream_options(ledger))
