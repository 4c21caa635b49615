"""The small contracts that plugins fill: what the platform needs of a teacher, an LLM backbone and a tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class TeacherEncoder(nn.Module, ABC):
    """A frozen vision encoder whose features the holistic embedding learns to match (paper, section 3.2).

    Subclasses set `feature_size` and implement `grid_features`. Whatever resizing and normalising the encoder
    wants happens inside, so that callers hand every teacher the same thing: the student's own uint8 tiles.
    """

    feature_size: int
    #: Channels of `connect`, the encoder's own way into an LLM; None where it has none.
    connector_size: int | None = None

    @property
    def layer_sizes(self) -> Sequence[int]:
        """Channels of each of the encoder's layers that `feature_size` joins, the first layer first."""
        return (self.feature_size,)

    @abstractmethod
    def grid_features(self, tiles: Tensor) -> Tensor:
        """uint8 tiles `[N, 3, S, S]` -> float features `[N, h, w, feature_size]` on the teacher's own grid."""

    @torch.no_grad()
    def features(self, tiles: Tensor) -> Tensor:
        """`grid_features` without gradient. Raises ValueError if tiles are not uint8 `[N, 3, S, S]`."""
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1] != 3:
            raise ValueError(
                f"tiles must be uint8 [N, 3, S, S], got {tiles.dtype} {list(tiles.shape)}; "
                "teachers normalise by themselves, pass the tiles of HovleImageProcessor as they are"
            )
        return self.grid_features(tiles)

    def connect(self, features: Tensor) -> Tensor:
        """`[N, h, w, feature_size]` -> `[N, h', w', connector_size]`: what the encoder's own LLM reads of them.

        Raises ValueError where the encoder comes without a connector.
        """
        raise ValueError(f"{type(self).__name__} has no connector (connector_size is None)")

    @torch.no_grad()
    def connected_features(self, tiles: Tensor) -> Tensor:
        """`connect(features(tiles))` without gradient."""
        return self.connect(self.features(tiles))

    def train(self, mode: bool = True) -> "TeacherEncoder":
        """A teacher stays in eval: its features must not depend on what trains around it."""
        super().train(False)
        return self


class LLMBackbone(ABC):
    """A provider of an LLM: cheap to construct, loads when asked. Any transformers causal LM will do."""

    @abstractmethod
    def config(self) -> PreTrainedConfig:
        """The causal LM's transformers config (`hidden_size`, `vocab_size`, ...)."""

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The causal LM in float32 on the CPU, its embeddings as large as the tokenizer's vocabulary."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, holding the three picture tokens of `hovle_core.processor`."""


class TokenizerProvider(ABC):
    """A provider of a tokenizer that is not the backbone's own."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, holding the three picture tokens of `hovle_core.processor`."""
