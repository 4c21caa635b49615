"""The small contracts that plugins fill: what the platform needs of a teacher, a token mixer, an LLM
backbone and a tokenizer."""

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


class TokenMixer(nn.Module):
    """What mixes tokens in a block of the holistic embedding, self attention or another, `[B, T, D] -> [B, T, D]`.

    It is made as `target(config, layer_idx, **embedding_config.token_mixer_options)`, and called as

        forward(x, position_ids=, padding_mask=, past_key_values=, position_embeddings=, attention_mask=) -> Tensor

    - It is causal, and samples of a packed row, whose `position_ids [B, T]` restart (`fusion.number_samples`), do not
      see each other.
    - `padding_mask [B, past + T]`, None where nothing is padded, is 0 at tokens that must change no other.
    - With a cache it goes on behind the tokens that it was called with before: through
      `past_key_values.update(keys, values, layer_idx)`, or, if `is_recurrent`, through
      `past_key_values.layers[layer_idx]`, a `cache.StateLayer`.
    - `position_embeddings` (cos and sin) and `attention_mask` (as `attn_implementation` has it) are what
      self attention reads.
    - `o_proj` gives the result: a new HoVLE starts it at zero, so that training begins with the LLM as it was.
    - Parameters have at least one dimension, which FSDP shards; what is not in the state dict is lost on loading.
    """

    is_recurrent: bool = False
    o_proj: nn.Linear


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
