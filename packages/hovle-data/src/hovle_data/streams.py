"""Streams: a global sample position -> token ids, labels and tiles, with no state in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hovle_data.decode import TileCache
from hovle_data.mixture import Draw, Mixture
from hovle_data.order import hash64, uniform
from hovle_data.packing import IGNORE_INDEX
from hovle_data.quarantine import Ledger
from hovle_data.schema import BadSample, Message, Sample

if TYPE_CHECKING:
    from hovle_core.processor import Encoded

Tiles = NDArray[np.uint8]


class Processor(Protocol):
    """The part of `hovle_core.processor.HovleProcessor` that streams use. Images come as tiles uint8 `[N, S, S, 3]`."""

    def tiles(self, picture: bytes) -> Tiles: ...
    def encode(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Tiles]) -> Encoded: ...
    def encode_pair(self, image: Tiles | None, text: str) -> Encoded: ...
    def encode_text(self, text: str) -> Encoded: ...
    def encode_image(self, image: Tiles) -> Encoded: ...


class Stream(ABC):
    """What training draws from: `get(k)` is a pure function of (mixture, processor, seed, k), for k = 0, 1, 2, ...

    max_tokens, max_tiles: a sample beyond either is refused as bad, by name; it is never cut in the middle of
        a picture.
    ledger: counts every `get` and records the bad ones.
    tile_cache_bytes: of the tiles cut last, kept for pictures that come again.

    Keys in batches are "<source name>/<sample key>", so those of two sources never meet in a cache of tile
    features.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        seed: int,
        max_tokens: int,
        ledger: Ledger,
        max_tiles: int | None = None,
        tile_cache_bytes: int = 0,
    ) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens}: give at least 2, a token and one to predict")
        self.mixture = mixture
        self.processor = processor
        self.seed = seed
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.ledger = ledger
        self.cut_tiles = TileCache(processor, tile_cache_bytes)

    def get(self, k: int) -> Encoded | None:
        """The sample at position k, or None where it is quarantined (the same k every time, never another sample).

        Raises `TooManyBadSamples` once the ledger's share is passed.
        """
        self.ledger.seen()
        try:
            draw = self.mixture.read(k)
            with _naming(draw):
                encoded = self.encode(draw.sample, k)
                if (too_long := self.too_long(encoded)) is not None:
                    raise _refuse(too_long)
        except BadSample as bad:
            self.ledger.record(bad)
            return None
        return replace(encoded, key=f"{draw.source_name}/{draw.sample.key}")

    @abstractmethod
    def encode(self, sample: Sample, k: int) -> Encoded:
        """Encode the sample drawn at position k. Raises any ValueError for what it cannot use."""

    def too_long(self, encoded: Encoded) -> str | None:
        """Which budget a sample exceeds, as a reason; None if neither."""
        if len(encoded.input_ids) > self.max_tokens:
            return f"too long: {len(encoded.input_ids)} tokens > max_tokens {self.max_tokens}"
        if self.max_tiles is not None and len(encoded.tiles) > self.max_tiles:
            return f"too many tiles: {len(encoded.tiles)} > max_tiles {self.max_tiles}"
        return None


class ConversationStream(Stream):
    """Conversations with any number of images; only answers are targets (the processor's rule).

    long_samples: what becomes of one beyond the budgets. "refuse": it is bad, by name. "truncate": it is cut
        behind its last answer that leaves it within both, and counted in the ledger; refused if there is none.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        seed: int,
        max_tokens: int,
        ledger: Ledger,
        max_tiles: int | None = None,
        long_samples: Literal["refuse", "truncate"] = "refuse",
        tile_cache_bytes: int = 0,
    ) -> None:
        super().__init__(mixture, processor, seed, max_tokens, ledger, max_tiles, tile_cache_bytes)
        if long_samples not in ("refuse", "truncate"):
            raise ValueError(f"long_samples={long_samples!r}: give 'refuse' or 'truncate'")
        self.long_samples = long_samples

    def encode(self, sample: Sample, k: int) -> Encoded:
        if sample.messages is None:
            raise _refuse(f"no conversation: the sample is {sample.kind}")
        images = [self.cut_tiles(image) for image in sample.images]
        encoded = self.processor.encode(sample.messages, images=images)
        if self.long_samples == "truncate" and self.too_long(encoded) is not None:
            encoded = self._truncated(sample.messages, images, encoded)
        if not (encoded.labels[1:] != IGNORE_INDEX).any():
            raise _refuse("nothing to learn: no answer in the conversation")
        return encoded

    def _truncated(self, messages: Sequence[Message], images: list[Tiles], whole: Encoded) -> Encoded:
        """The longest beginning of a conversation that ends with an answer and fits; `whole` if none does."""
        ends = [i + 1 for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
        longest = whole
        while ends:  # each turn adds tokens: bisect
            middle = len(ends) // 2
            beginning = messages[: ends[middle]]
            encoded = self.processor.encode(beginning, images=images[: _num_images(beginning)])
            if self.too_long(encoded) is None:
                longest, ends = encoded, ends[middle + 1 :]
            else:
                ends = ends[:middle]
        if longest is not whole:
            self.ledger.truncated()
        return longest


class PairStream(ConversationStream):
    """A picture and its text, all text being target; text alone and conversations are taken too."""

    def encode(self, sample: Sample, k: int) -> Encoded:
        if sample.text is None:
            return super().encode(sample, k)
        if len(sample.images) > 1:
            raise _refuse(f"more than one image in a pair: {len(sample.images)}")
        image = self.cut_tiles(sample.images[0]) if sample.images else None
        return self.processor.encode_pair(image, sample.text)


class TextStream(Stream):
    """Plain text, every token a target; of a text longer than `max_tokens` a random window."""

    def encode(self, sample: Sample, k: int) -> Encoded:
        if sample.text is None:
            raise _refuse(f"no text: the sample is {sample.kind}")
        encoded = self.processor.encode_text(sample.text)
        surplus = len(encoded.input_ids) - self.max_tokens
        if surplus <= 0:
            return encoded
        start = uniform(0, surplus, "window", self.seed, k)
        window = slice(start, start + self.max_tokens)
        return replace(encoded, input_ids=encoded.input_ids[window], labels=encoded.labels[window])


class UnpairedStream(Stream):
    """Distillation: picture k of `images` beside an unrelated piece of text; no token is a target.

    texts: its draw k is the paragraph; of it a window is taken with a random number of tokens in
        `text_tokens` (both ends included; a shorter paragraph whole) at a random offset. A coin says which of
        the two comes first. Offset, length and coin are hashes of (seed, k). Beside a large picture the text
        is shortened to fit `max_tokens`.
    """

    def __init__(
        self,
        images: Mixture,
        texts: Mixture,
        processor: Processor,
        seed: int,
        max_tokens: int,
        ledger: Ledger,
        text_tokens: tuple[int, int] = (16, 128),
        max_tiles: int | None = None,
        cached_paragraphs: int = 16384,
        tile_cache_bytes: int = 0,
    ) -> None:
        super().__init__(images, processor, seed, max_tokens, ledger, max_tiles, tile_cache_bytes)
        low, high = text_tokens
        if not 1 <= low <= high:
            raise ValueError(f"text_tokens={text_tokens}: give (min, max) with 1 <= min <= max")
        self.texts = texts.apart_from(
            images
        )  # captions of the same pairs must not come back to their pictures
        self.text_tokens = text_tokens
        self._paragraph = lru_cache(maxsize=cached_paragraphs)(self._tokenize)

    def encode(self, sample: Sample, k: int) -> Encoded:
        if len(sample.images) != 1:
            raise _refuse(f"not one image: the sample has {len(sample.images)}")
        picture = self.processor.encode_image(self.cut_tiles(sample.images[0]))
        room = self.max_tokens - len(picture.input_ids)
        text_ids = self._window(self._paragraph(*self.texts.draw(k)), k, room)
        picture_first = hash64("coin", self.seed, k) & 1
        parts = (picture.input_ids, text_ids) if picture_first else (text_ids, picture.input_ids)
        input_ids = np.concatenate(parts)
        return replace(picture, input_ids=input_ids, labels=np.full_like(input_ids, IGNORE_INDEX))

    def _tokenize(self, j: int, i: int) -> NDArray[np.int64]:
        where = self.texts.where(j, i)
        sample = self.texts.sources[j][i].validate(where)
        if sample.text is None:
            raise BadSample(sample.key, where, f"no text: the sample is {sample.kind}")
        with _naming(Draw(self.texts.names[j], where, sample)):
            return self.processor.encode_text(sample.text).input_ids

    def _window(self, ids: NDArray[np.int64], k: int, room: int) -> NDArray[np.int64]:
        low, high = self.text_tokens
        length = min(uniform(low, high, "length", self.seed, k), len(ids), max(0, room))
        start = uniform(0, len(ids) - length, "offset", self.seed, k)
        return ids[start : start + length]


def _num_images(messages: Sequence[Message]) -> int:
    parts = [
        part for message in messages if not isinstance(message["content"], str) for part in message["content"]
    ]
    return sum(part["type"] == "image" for part in parts)


def _refuse(reason: str) -> BadSample:
    return BadSample("", "", reason)  # `_naming` fills in which sample it is


@contextmanager
def _naming(draw: Draw) -> Iterator[None]:
    """Name the sample in every failure on it: a processor's ValueError becomes a `BadSample` with key, place."""
    try:
        yield
    except BadSample as bad:
        if bad.key:  # already named, such as the text of an unpaired sample
            raise
        raise BadSample(draw.sample.key, draw.where, bad.reason) from bad
    except ValueError as error:
        raise BadSample(draw.sample.key, draw.where, f"does not encode: {error}") from error
