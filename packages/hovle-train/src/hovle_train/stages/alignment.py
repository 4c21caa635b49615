"""Alignment: next-token prediction on image-text pairs with the LLM frozen (paper, section 3.3)."""

from collections.abc import Sequence

from torch import nn

from hovle_core.processor import HovleProcessor
from hovle_data.quarantine import Ledger
from hovle_data.streams import PairStream, Stream
from hovle_train.stages.base import NextTokenStage


class Alignment(NextTokenStage):
    """The holistic embedding learns to write what the frozen LLM can read. Reads `data.sources` (pairs)."""

    name = "alignment"

    def trainable(self, module: nn.Module) -> Sequence[str]:
        return ["embedding."]

    def stream(self, processor: HovleProcessor, ledger: Ledger) -> Stream:
        train = self.recipe.train
        return PairStream(
            self.mixture(self.recipe.data.sources, "sources"),
            processor,
            seed=self.recipe.seed,
            max_tokens=train.micro_batch_tokens,
            max_tiles=train.micro_batch_tiles,
            ledger=ledger,
        )
