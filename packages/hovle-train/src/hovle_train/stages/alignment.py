"""Alignment: next-token prediction on image-text pairs with the LLM frozen (paper, section 3.3)."""

from collections.abc import Sequence

from torch import nn

from hovle_core.processor import HovleProcessor
from hovle_data.quarantine import Ledger
from hovle_data.streams import PairStream, Stream
from hovle_train.stages.base import HOVLE_FIELDS, NextTokenStage


class Alignment(NextTokenStage):
    """The holistic embedding learns to write what the frozen LLM can read. Reads `data.sources` (pairs)."""

    name = "alignment"
    reads = ("data.sources", "data.long_samples", *HOVLE_FIELDS)

    def trainable(self, module: nn.Module) -> Sequence[str]:
        return ["embedding."]

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        sources = self.mixture(self.recipe.data.sources, "sources")
        long_samples = self.recipe.data.long_samples
        return PairStream(sources, processor, long_samples=long_samples, **self.stream_options(ledger))
