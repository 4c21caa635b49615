"""Instruction tuning: next-token prediction on answers, everything trains (paper, section 3.3)."""

from collections.abc import Sequence

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_data.quarantine import Ledger
from hovle_data.streams import PairStream, Stream
from hovle_train.stages.base import HOVLE_FIELDS, NextTokenStage, llm_is_tied


class InstructionTuning(NextTokenStage):
    """Embedding and LLM learn to answer. Reads `data.sources` (conversations; pairs are taken too).

    The one table that stays as it is: the LLM's own text embedding, which a HoVLE does not read, unless the LLM's
    head is tied to it.
    """

    name = "instruction_tuning"
    reads = ("data.sources", "data.long_samples", *HOVLE_FIELDS)

    def trainable(self, module: HovleForConditionalGeneration) -> Sequence[str]:
        if llm_is_tied(module):
            return ["embedding.", "language_model."]
        unread = module.language_model.get_input_embeddings().weight
        llm = [
            name
            for name, p in module.named_parameters()
            if name.startswith("language_model.") and p is not unread
        ]
        return ["embedding.", *llm]

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        sources = self.mixture(self.recipe.data.sources, "sources")
        long_samples = self.recipe.data.long_samples
        return PairStream(sources, processor, long_samples=long_samples, **self.stream_options(ledger))
