"""A request's messages -> the model's prompt. Pictures come within the request, or were fetched before."""

import base64
import binascii
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from hovle_core.images import ImageError, decode_image, image_size
from hovle_core.processor import Encoded, HovleProcessor
from hovle_core.rendering import Message
from hovle_serve.media import FetchError, MediaFetcher
from hovle_serve.protocol import ChatRequest, ImagePart, Limits, RequestError

# Longer texts are tokenised apart from all others: it takes a second for the longest.
LONG_TEXT = 20_000  # characters

Fetched = Mapping[str, bytes | FetchError]


@dataclass(frozen=True)
class Picture:
    """How the model sees a picture: `columns` by `rows` tiles, and perhaps the whole as one more."""

    width: int
    height: int
    columns: int
    rows: int
    thumbnail: bool


@dataclass(frozen=True)
class _File:
    """A picture's place in the body, where it is, and the grid of tiles that it is to have if not its own."""

    place: str
    url: str
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Prompt:
    encoded: Encoded
    pictures: tuple[Picture, ...]


class PromptEncoder:
    """One processor for many threads: a tokenizer holds state while it works, so prompts are tokenised one by one, and
    those of LONG_TEXT by another copy."""

    def __init__(self, processor: HovleProcessor, limits: Limits) -> None:
        for_long = copy.copy(processor)
        for_long.tokenizer = copy.deepcopy(processor.tokenizer)
        self._processors = {False: (processor, Lock()), True: (for_long, Lock())}
        self._limits = limits

    async def fetch(self, body: ChatRequest, media: MediaFetcher) -> Fetched:
        """The pictures that are given by URL, for `encode`. Nothing is fetched for a body that has too many."""
        _, files = _read_messages(body, self._limits)
        urls = [file.url for file in files if not _is_data(file.url)]
        return await media.fetch_all(urls, self._limits.max_body_bytes) if urls else {}

    def encode(self, body: ChatRequest, fetched: Fetched | None = None) -> Prompt:
        """Raises RequestError (400) naming the part at fault. No picture is decoded before all passed the limits."""
        messages, files = _read_messages(body, self._limits)
        data = [(file, _data(file.place, file.url, fetched or {})) for file in files]
        processor, lock = self._processors[is_long(body)]
        pictures = _measured(data, processor, self._limits)
        tiles = _cut(data, processor, self._limits)  # takes long, and nothing of the tokenizer
        try:
            with lock:
                encoded = processor.encode(messages, tiles, add_generation_prompt=True)
        except ValueError as error:  # such as the chat template's own, about the order of roles
            raise RequestError(400, str(error), "messages") from error
        return Prompt(encoded, pictures)


def is_long(body: ChatRequest) -> bool:
    contents = [message.content for message in body.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts = [content for content in contents if isinstance(content, str)]
    texts += [part.text for part in parts if not isinstance(part, ImagePart)]
    return sum(map(len, texts)) > LONG_TEXT


def has_pictures(body: ChatRequest) -> bool:
    return any(True for _ in _urls(body))


def has_links(body: ChatRequest) -> bool:
    """Whether pictures are to be fetched."""
    return any(not _is_data(url) for url in _urls(body))


def _urls(body: ChatRequest) -> Iterator[str]:
    lists = (message.content for message in body.messages if not isinstance(message.content, str))
    return (part.image_url.url for parts in lists for part in parts if isinstance(part, ImagePart))


def _read_messages(body: ChatRequest, limits: Limits) -> tuple[list[Message], list[_File]]:
    """Messages as the processor takes them, and their pictures."""
    messages: list[Message] = []
    files: list[_File] = []
    characters = 0
    for i, message in enumerate(body.messages):
        parts: list[dict[str, str]] = []
        for j, part in enumerate([message.content] if isinstance(message.content, str) else message.content):
            if isinstance(part, ImagePart):
                grid = (1, 1) if part.image_url.detail == "low" else None
                files.append(_File(f"messages.{i}.content.{j}.image_url.url", part.image_url.url, grid))
                parts.append({"type": "image"})
            else:
                text = part if isinstance(part, str) else part.text
                characters += len(text)
                parts.append({"type": "text", "text": text})
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": parts})
    if characters > limits.max_characters:
        raise RequestError(
            400, f"{characters} characters, at most {limits.max_characters} are taken", "messages"
        )
    return messages, files


def _measured(
    files: Sequence[tuple[_File, bytes]], processor: HovleProcessor, limits: Limits
) -> tuple[Picture, ...]:
    """From the files' headers alone."""
    pixels, cutter = 0, processor.image_processor
    tiles, pictures = 0, []
    for file, data in files:
        place = file.place
        try:
            width, height = image_size(data, max_pixels=limits.max_pixels)
        except ImageError as error:
            raise RequestError(400, f"{place}: {error}", place, "invalid_image") from error
        columns, rows = file.grid or cutter.grid(width, height)
        number = columns * rows if file.grid else cutter.num_tiles(width, height)
        pictures.append(Picture(width, height, columns, rows, number > columns * rows))
        pixels += width * height
        tiles += number
        for what, number, most in (("pixels", pixels, limits.max_pixels), ("tiles", tiles, limits.max_tiles)):
            if number > most:
                raise RequestError(400, f"{place}: with this picture the request has {number} {what}, at most {most} "
                                   "are taken: send fewer or smaller pictures", place)  # fmt: skip
    return tuple(pictures)


def _cut(files: Sequence[tuple[_File, bytes]], processor: HovleProcessor, limits: Limits) -> list[np.ndarray]:
    """Tiles of each. Only one picture is there whole at a time."""
    tiles = []
    for file, data in files:
        try:
            image = decode_image(data, max_pixels=limits.max_pixels)
        except ImageError as error:
            raise RequestError(400, f"{file.place}: {error}", file.place, "invalid_image") from error
        tiles.append(processor.image_processor.tiles(image, file.grid))
    return tiles


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _data(place: str, url: str, fetched: Fetched) -> bytes:
    if not _is_data(url):
        got = fetched.get(url)
        if isinstance(got, bytes):
            return got
        why = got or "only data URIs (data:image/png;base64,...) are taken, the server fetches nothing"
        raise RequestError(400, f"{place}: {why}", place, None if got is None else "image_not_fetched")
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise RequestError(400, f"{place}: a data URI needs ';base64,' before its data", place)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise RequestError(400, f"{place}: the data URI is not valid base64: {error}", place) from error
