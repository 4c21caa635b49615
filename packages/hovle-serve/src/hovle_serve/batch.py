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
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hovle_core.cache import GrowingLayer
from hovle_core.fusion import Expansion, expand_placeholders
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import Encoded, HovleProcessor

# Keys and values of a layer, `[B, K, T, d]` each.
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefilled:
    """A row's keys and values `[1, K, t, d]`, the LLM's layers first, and its lengths in the LLM and in the blocks
    (which differ for HoVLE-HD)."""

    layers: Sequence[KeysValues]
    llm_length: int
    block_length: int

    def first(self, llm_length: int, block_length: int, num_llm_layers: int) -> "Prefilled":
        """As many tokens of it from its beginning; a view."""
        lengths = [llm_length if i < num_llm_layers else block_length for i in range(len(self.layers))]
        layers = [
            (keys[:, :, :n], values[:, :, :n]) for (keys, values), n in zip(self.layers, lengths, strict=True)
        ]
        return Prefilled(layers, llm_length, block_length)


NOTHING = Prefilled((), 0, 0)


@dataclass(frozen=True)
class Unread:
    """The tokens and tiles of a prompt that follow what is `known` of it."""

    rest: Encoded
    known: Prefilled = NOTHING

    def __len__(self) -> int:
        return len(self.rest.input_ids)


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
    model: HovleForConditionalGeneration, processor: HovleProcessor, unread: Sequence[Unread]
) -> list[tuple[Prefilled, Tensor]]:
    """Read what is new in several prompts in one forward, all their tiles in one batch. Of each: its row, and the
    logits `[1, V]` of its next token.

    What is known is padded on the left and what is new as well, so a shorter row has padding between the two.
    """
    inputs: dict[str, Any] = processor.batch([one.rest for one in unread], model.device)
    new_mask, known = inputs.pop("attention_mask"), [one.known for one in unread]
    if len(unread) > 1:  # alone nothing is padded
        inputs |= _padded_view(model, inputs["input_ids"], new_mask, known)
    num_layers = len(DynamicCache(config=model.config).layers)
    cache = Cache(layers=[_known_layer(known, i) for i in range(num_layers)])
    logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return [(_row(model, cache, unread, i), logits[i : i + 1]) for i in range(len(unread))]


def _padded_view(
    model: HovleForConditionalGeneration, input_ids: Tensor, new_mask: Tensor, known: Sequence[Prefilled]
) -> dict[str, Any]:
    """The mask `[B, known + new]`, from which the model counts positions, and for HoVLE-HD the blocks' own."""
    device, lengths = new_mask.device, [row.llm_length for row in known]
    view: dict[str, Any] = {"attention_mask": torch.cat([_left_padding(lengths, device), new_mask], 1)}
    repeats = model.config.embedding_config.block_tokens_per_placeholder
    if repeats > 1:
        lengths = [row.block_length for row in known]
        new = expand_placeholders(input_ids == model.config.image_token_id, repeats, new_mask)
        view["expansion"] = Expansion(
            source=new.source,
            attention_mask=torch.cat([_left_padding(lengths, device), new.attention_mask], 1),
            position_ids=new.position_ids + torch.tensor(lengths, device=device).unsqueeze(1),
        )
    return view


def _known_layer(known: Sequence[Prefilled], place: int) -> GrowingLayer:
    """What rows know in a layer, stacked, to be appended to without touching it."""
    keys, values = next((row.layers[place] for row in known if row.layers), (None, None))
    if keys is None or values is None:
        return GrowingLayer()
    nothing = (keys[:, :, :0], values[:, :, :0])
    return _stacked([row.layers[place] if row.layers else nothing for row in known])


def _row(model: HovleForConditionalGeneration, cache: Cache, unread: Sequence[Unread], row: int) -> Prefilled:
    """One row of what was read, without padding."""
    one, layers = unread[row], [(layer.keys, layer.values) for layer in cache.layers]
    known, new = one.known, (len(one.rest.input_ids), block_length(model, one.rest))
    if len(unread) > 1:
        num_llm_layers = model.config.text_config.num_hidden_layers
        longest = max(u.known.llm_length for u in unread), max(u.known.block_length for u in unread)

        def unpadded(x: Tensor, stack: int) -> Tensor:
            past, known_here = longest[stack], (known.llm_length, known.block_length)[stack]
            parts = (
                x[row : row + 1, :, past - known_here : past],
                x[row : row + 1, :, x.shape[2] - new[stack] :],
            )
            return torch.cat(parts, 2)

        layers = [
            (unpadded(keys, int(i >= num_llm_layers)), unpadded(values, int(i >= num_llm_layers)))
            for i, (keys, values) in enumerate(layers)
        ]
    return Prefilled(layers, known.llm_length + new[0], known.block_length + new[1])


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
        stacks = [row.layers for row in rows]
        if self._layers:
            stacks.insert(0, [(layer.keys, layer.values) for layer in self._layers])
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


def _stacked(layers: Sequence[KeysValues]) -> GrowingLayer:
    """Keys and values of unlike length `[n, K, t, d]` -> one layer `[B, K, T, d]`, zeros before the shorter ones."""
    if len(layers) == 1:
        return _layer(*layers[0])
    T = max(keys.shape[2] for keys, _ in layers)
    keys, values = (
        torch.cat([F.pad(x, (0, 0, T - x.shape[2], 0)) for x in both]) for both in zip(*layers, strict=True)
    )
    return _layer(keys, values)


def _layer(keys: Tensor, values: Tensor) -> GrowingLayer:
    layer = GrowingLayer()
    layer.update(keys, values)
    return layer


def _left_padding(lengths: Sequence[int], device: torch.device) -> Tensor:
    """`[B, longest]`, 1 where a row has a token."""
    longest = max(lengths)
    starts = longest - torch.tensor(lengths, device=device).unsqueeze(1)
    return (torch.arange(longest, device=device) >= starts).long()
