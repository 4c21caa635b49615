"""Prompts read lately: what a new one begins with in common need not be read again (a system message, a picture asked
about twice, the turns before).

Shapes: T tokens, N tiles, S tile side in pixels.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import Cache

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import Encoded, HovleProcessor
from hovle_serve.batch import Prefilled, block_length, copied_layer, prefill

# Below this, copying costs as much as reading.
SHORTEST_PREFIX = 16


@dataclass(frozen=True)
class _Entry:
    prompt: Encoded  # without its tiles: digests tell them apart
    digests: tuple[bytes, ...]
    row: Prefilled


class PrefixCache:
    """The newest prompts' caches, `max_tokens` of them in all (as the blocks count); the least used go first.

    Pictures are told apart by their pixels, and are taken whole or not at all.
    """

    def __init__(
        self, model: HovleForConditionalGeneration, processor: HovleProcessor, max_tokens: int
    ) -> None:
        self._model, self._processor, self._max_tokens = model, processor, max_tokens
        self._entries: list[_Entry] = []  # the least used first
        self.reused_tokens = 0

    @property
    def num_tokens(self) -> int:
        return sum(entry.row.block_length for entry in self._entries)

    def prefill(self, prompt: Encoded) -> tuple[Prefilled, Tensor]:
        """As `batch.prefill`, of no more than what is new in the prompt."""
        digests = tuple(hashlib.blake2b(tile.tobytes(), digest_size=16).digest() for tile in prompt.tiles)
        lengths = [self._common(entry, prompt, digests) for entry in self._entries]
        length = max(lengths, default=0)
        if length < SHORTEST_PREFIX:
            cache, logits = prefill(self._model, self._processor, prompt)
        else:
            entry = self._entries.pop(lengths.index(length))
            cache, logits = self._extend(entry.row.cache, prompt, length)
            self.reused_tokens += length
            if length < len(entry.prompt.input_ids):  # else the new prompt holds all of it
                self._entries.append(entry)
        row = Prefilled(cache, len(prompt.input_ids), block_length(self._model, prompt))
        bare = Encoded(prompt.input_ids, prompt.labels, prompt.tiles[:0])
        self._entries.append(_Entry(bare, digests, row))
        while self.num_tokens > self._max_tokens:
            del self._entries[0]
        return row, logits

    def _common(self, entry: _Entry, prompt: Encoded, digests: tuple[bytes, ...]) -> int:
        """How many tokens both begin with, short of the prompt's last one, whose logits are wanted."""
        known, new = entry.prompt.input_ids, prompt.input_ids
        length = min(len(known), len(new) - 1)
        differ = np.flatnonzero(known[:length] != new[:length])
        length = int(differ[0]) if len(differ) else length
        placeholders = np.flatnonzero(new == self._model.config.image_token_id)
        tiles = zip(entry.digests, digests, strict=False)
        same = next((i for i, (a, b) in enumerate(tiles) if a != b), min(len(entry.digests), len(digests)))
        first_other = same * self._processor.tokens_per_tile
        if first_other < len(placeholders):
            length = min(length, int(placeholders[first_other]))
        return self._before_picture(known, new, length)

    def _before_picture(self, known: np.ndarray, new: np.ndarray, length: int) -> int:
        """Step back out of a picture that goes on behind `length` in either."""
        image = self._model.config.image_token_id
        if any(length < len(ids) and ids[length] == image for ids in (known, new)):
            while length and new[length - 1] == image:
                length -= 1
        return length

    def _extend(self, known: Cache, prompt: Encoded, length: int) -> tuple[Cache, Tensor]:
        """Read what follows the first `length` tokens, behind a copy of their cache."""
        image, ids, labels = self._model.config.image_token_id, prompt.input_ids, prompt.labels
        old_blocks = block_length(self._model, Encoded(ids[:length], labels[:length], prompt.tiles[:0]))
        num_llm_layers = self._model.config.text_config.num_hidden_layers
        layers = [
            copied_layer(layer, length if i < num_llm_layers else old_blocks)
            for i, layer in enumerate(known.layers)
        ]
        num_tiles = int((ids[:length] == image).sum()) // self._processor.tokens_per_tile
        rest = Encoded(ids[length:], labels[length:], prompt.tiles[num_tiles:])
        return prefill(self._model, self._processor, rest, Cache(layers=layers))
