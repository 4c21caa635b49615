"""The key-value cache of requests that decode together; rows join and leave between steps.

The layout is the one of `generate`: one cache for embedding blocks and LLM, rows of unlike length padded on the left.
So a step is a plain forward of the model, whatever its attention and wherever its pixel shuffle is.

Shapes: B rows, K key-value heads, T tokens of the longest row in the LLM, E in the embedding blocks, d head size,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hovle_core.cache import GrowingLayer
from hovle_core.fusion import Expansion
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import Encoded, HovleProcessor


@dataclass(frozen=True)
class Prefilled:
    """A prompt's cache, one row, and its lengths in the LLM and in the blocks (which differ for HoVLE-HD)."""

    cache: Cache
    llm_length: int
    block_length: int


def check_batchable(model: HovleForConditionalGeneration) -> None:
    """Raise ValueError unless every layer caches all tokens: rows of windowed or recurrent layers do not stack."""
    layers = DynamicCache(config=model.config).layers
    odd = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if odd:
        raise ValueError(
            f"text_config caches with {sorted(odd)}: only LLMs of full attention layers are served in batches; "
            "`hovle chat` runs this one"
        )
    if model.embedding.recurrent_layers:
        raise ValueError(
            f"embedding_config.token_mixer {model.config.embedding_config.token_mixer!r} keeps a state, and only keys "
            "and values are served in batches; `hovle chat` runs this one"
        )


def block_length(model: HovleForConditionalGeneration, prompt: Encoded) -> int:
    """How many tokens a prompt has in the embedding blocks, which is never less than in the LLM."""
    repeats = model.config.embedding_config.block_tokens_per_placeholder
    num_image_tokens = int((prompt.input_ids == model.config.image_token_id).sum())
    return len(prompt.input_ids) + num_image_tokens * (repeats - 1)


def prefill(
    model: HovleForConditionalGeneration,
    processor: HovleProcessor,
    prompt: Encoded,
    cache: Cache | None = None,
) -> tuple[Cache, Tensor]:
    """Run one prompt by itself, all its tiles in one batch, behind what `cache` holds: the cache, and the logits
    `[1, V]` of the next token."""
    inputs: dict[str, Any] = processor.batch([prompt], model.device)
    del inputs["attention_mask"]  # nothing is padded
    cache = DynamicCache(config=model.config) if cache is None else cache
    return cache, model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1]


class DecodeBatch:
    """Rows in the order they joined. Not safe for two threads; call it under `torch.inference_mode`."""

    def __init__(self, model: HovleForConditionalGeneration) -> None:
        self.model = model
        self.llm_lengths: list[int] = []
        self.block_lengths: list[int] = []
        self._layers: list[GrowingLayer] = []

    def __len__(self) -> int:
        return len(self.llm_lengths)

    @property
    def cached_tokens(self) -> int:
        """What the cache holds, padding included."""
        return len(self) * max(self.block_lengths, default=0)

    def join(self, rows: Sequence[Prefilled]) -> None:
        """Add rows behind those that are there."""
        stacks = [row.cache.layers for row in rows]
        if self._layers:
            stacks.insert(0, self._layers)
        self._layers = [_stacked(layers) for layers in zip(*stacks, strict=True)]
        self.llm_lengths += [row.llm_length for row in rows]
        self.block_lengths += [row.block_length for row in rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all but these rows, and the padding that only the others needed."""
        self.llm_lengths = [self.llm_lengths[i] for i in rows]
        self.block_lengths = [self.block_lengths[i] for i in rows]
        if not rows:
            self._layers = []
            return
        index = torch.tensor(rows, device=self._layers[0].keys.device)
        num_llm_layers = self.model.config.text_config.num_hidden_layers
        for i, layer in enumerate(self._layers):
            length = max(self.llm_lengths if i < num_llm_layers else self.block_lengths)
            keys, values = (x[index, :, x.shape[2] - length :] for x in (layer.keys, layer.values))
            self._layers[i] = _layer(keys, values)

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Append one token to every row; the logits `[B, V]` of what comes next."""
        device = self.model.device
        expansion = None
        if self.model.config.embedding_config.block_tokens_per_placeholder > 1:
            expansion = Expansion(
                source=torch.zeros(len(self), 1, dtype=torch.long, device=device),
                attention_mask=_left_padding([length + 1 for length in self.block_lengths], device),
                position_ids=torch.tensor(self.block_lengths, device=device).unsqueeze(1),
            )
        logits = self.model(
            input_ids=torch.tensor(token_ids, device=device).unsqueeze(1),
            attention_mask=_left_padding([length + 1 for length in self.llm_lengths], device),
            position_ids=torch.tensor(self.llm_lengths, device=device).unsqueeze(1),
            past_key_values=Cache(layers=self._layers),
            expansion=expansion,
            logits_to_keep=1,
        ).logits[:, -1]
        self.llm_lengths = [length + 1 for length in self.llm_lengths]
        self.block_lengths = [length + 1 for length in self.block_lengths]
        return logits


def _stacked(layers: Sequence[Any]) -> GrowingLayer:
    """Layers of unlike length `[n, K, t, d]` -> one `[B, K, T, d]`, zeros before the shorter ones."""
    T = max(layer.keys.shape[2] for layer in layers)
    keys, values = (
        torch.cat([_padded(getattr(layer, name), T) for layer in layers]) for name in ("keys", "values")
    )
    return _layer(keys, values)


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0))


def copied_layer(layer: Any, length: int) -> GrowingLayer:
    """The first `length` tokens of a layer, to be appended to without touching it."""
    return _layer(layer.keys[:, :, :length], layer.values[:, :, :length])


def _layer(keys: Tensor, values: Tensor) -> GrowingLayer:
    layer = GrowingLayer()
    layer.update(keys, values)
    return layer


def _left_padding(lengths: Sequence[int], device: torch.device) -> Tensor:
    """`[B, longest]`, 1 where a row has a token."""
    longest = max(lengths)
    starts = longest - torch.tensor(lengths, device=device).unsqueeze(1)
    return (torch.arange(longest, device=device) >= starts).long()
