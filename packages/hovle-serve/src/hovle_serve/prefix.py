"""Prompts read lately: what a new one begins with in common need not be read again (a system message, a picture asked
about twice, the turns before). What is new in several prompts is read together.

Shapes: T tokens, N tiles, S tile side in pixels, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import Encoded, HovleProcessor
from hovle_serve.batch import Prefilled, Unread, block_length, prefill

# Below this, copying costs as much as reading.
SHORTEST_PREFIX = 16
# Prompts are read together up to so many tokens, padding included: longer ones fill a forward by themselves.
GROUP_TOKENS = 512
# So many tokens of padding a row cost less than a forward of its own does.
PADDING = 32

# Each new prompt is compared with all that are kept, however short.
MAX_ENTRIES = 256

Read = tuple[Prefilled, Tensor]


@dataclass(eq=False)
class _Asked:
    place: int
    prompt: Encoded
    digests: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        tiles = self.prompt.tiles
        self.digests = tuple(hashlib.blake2b(tile.tobytes(), digest_size=16).digest() for tile in tiles)


@dataclass(frozen=True, eq=False)
class _Entry:
    prompt: Encoded  # without its tiles: digests tell them apart
    digests: tuple[bytes, ...]
    row: Prefilled


class PrefixCache:
    """The newest prompts' caches, `max_tokens` of them in all (as the blocks count) and no more than MAX_ENTRIES; the
    least used go first.

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

    def read(self, prompts: Sequence[Encoded]) -> Iterator[tuple[int, Read | Exception]]:
        """The place in `prompts` of each, with its row and the logits `[1, V]` of its next token, or with what went
        wrong with it; as they are read."""
        asked = [_Asked(i, prompt) for i, prompt in enumerate(prompts)]
        while asked:
            now = [one for i, one in enumerate(asked) if not any(self._waits(one, two) for two in asked[:i])]
            asked = [one for one in asked if one not in now]
            for group in _groups([(one, self._unread(one)) for one in now]):
                for (one, _), read in zip(group, self._prefill([rest for _, rest in group]), strict=True):
                    if not isinstance(read, Exception):
                        self._keep(one, read[0])
                    yield one.place, read

    def _prefill(self, unread: Sequence[Unread]) -> Sequence[Read | Exception]:
        try:
            return prefill(self._model, self._processor, unread)
        except Exception as error:  # whatever it is, it may be one prompt's alone
            return [error] if len(unread) == 1 else [self._prefill([one])[0] for one in unread]

    def _waits(self, asked: _Asked, earlier: _Asked) -> bool:
        """Whether a prompt had better wait until another one is read: they have most of what is new in common."""
        shared = self._common(earlier, asked)
        if shared < SHORTEST_PREFIX or block_length(self._model, earlier.prompt) > self._max_tokens:
            return False
        known = max((self._common(entry, asked) for entry in self._entries), default=0)
        return shared - known > (len(asked.prompt.input_ids) - known) / 2

    def _unread(self, asked: _Asked) -> Unread:
        """A prompt behind what one of the entries begins with as well."""
        prompt, lengths = asked.prompt, [self._common(entry, asked) for entry in self._entries]
        length = max(lengths, default=0)
        if length < SHORTEST_PREFIX:
            return Unread(prompt)
        entry = self._entries.pop(lengths.index(length))
        self._entries.append(entry)
        self.reused_tokens += length
        ids, labels, image = prompt.input_ids, prompt.labels, self._model.config.image_token_id
        blocks = block_length(self._model, Encoded(ids[:length], labels[:length], prompt.tiles[:0]))
        num_tiles = int((ids[:length] == image).sum()) // self._processor.tokens_per_tile
        known = entry.row.first(length, blocks, self._model.config.text_config.num_hidden_layers)
        return Unread(Encoded(ids[length:], labels[length:], prompt.tiles[num_tiles:]), known)

    def _keep(self, asked: _Asked, row: Prefilled) -> None:
        """Make an entry of a prompt, which stands for those that it holds whole."""
        prompt, T = asked.prompt, len(asked.prompt.input_ids)
        self._entries = [
            entry for entry in self._entries if self._common(entry, asked, T) < len(entry.prompt.input_ids)
        ]
        self._entries.append(_Entry(without_tiles(prompt), asked.digests, row))
        while self.num_tokens > self._max_tokens or len(self._entries) > MAX_ENTRIES:
            del self._entries[0]

    def _common(self, known: _Entry | _Asked, asked: _Asked, most: int | None = None) -> int:
        """How many tokens both begin with, by default short of the prompt's last one, whose logits are wanted."""
        old, new = known.prompt.input_ids, asked.prompt.input_ids
        length = min(len(old), len(new) - 1 if most is None else most)
        differ = np.flatnonzero(old[:length] != new[:length])
        length = int(differ[0]) if len(differ) else length
        placeholders = np.flatnonzero(new == self._model.config.image_token_id)
        tiles = zip(known.digests, asked.digests, strict=False)
        same = next(
            (i for i, (a, b) in enumerate(tiles) if a != b), min(len(known.digests), len(asked.digests))
        )
        first_other = same * self._processor.tokens_per_tile
        if first_other < len(placeholders):
            length = min(length, int(placeholders[first_other]))
        return self._before_picture(old, new, length)

    def _before_picture(self, known: np.ndarray, new: np.ndarray, length: int) -> int:
        """Step back out of a picture that goes on behind `length` in either."""
        image = self._model.config.image_token_id
        if any(length < len(ids) and ids[length] == image for ids in (known, new)):
            while length and new[length - 1] == image:
                length -= 1
        return length


def without_tiles(prompt: Encoded) -> Encoded:
    """A prompt's tokens. A slice would keep all its tiles in memory."""
    return Encoded(prompt.input_ids, prompt.labels, prompt.tiles[:0].copy())


def _groups(unread: Sequence[tuple[_Asked, Unread]]) -> list[list[tuple[_Asked, Unread]]]:
    """Those of like length together, in the order in which they came."""
    groups: list[list[tuple[_Asked, Unread]]] = []
    for one in unread:
        for group in groups:
            lengths = [len(rest) for _, rest in (*group, one)]
            is_alike = max(lengths) - min(lengths) <= PADDING
            if is_alike and len(lengths) * max(lengths) <= GROUP_TOKENS:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups
