"""Small pictures, samples and a fake processor: nothing here imports transformers."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from hovle_core.images import decode_image
from hovle_data.schema import Sample

IMG, IMG_END, EOS = 1, 2, 3
TOKENS_PER_TILE = 4
SIDE = 8


@dataclass
class Encoded:
    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    key: str = ""


class FakeProcessor:
    """A token a word; a picture is one tile of TOKENS_PER_TILE tokens between two marks."""

    def tiles(self, picture):
        return np.asarray(decode_image(picture).resize((SIDE, SIDE)))[None]

    def encode(self, messages, images=()):
        ids, labels, tags = [], [], 0
        for message in messages:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                is_image = part["type"] == "image"
                tags += is_image
                piece = self._picture() if is_image else self._words(part["text"])
                is_target = message["role"] == "assistant" and not is_image
                ids += piece
                labels += piece if is_target else [-100] * len(piece)
        if tags != len(images):
            raise ValueError(f"{tags} tags, {len(images)} images")
        return self._encoded(ids, labels, images)

    def encode_pair(self, image, text):
        prefix = [] if image is None else self._picture()
        target = [*self._words(text), EOS]
        return self._encoded(prefix + target, [-100] * len(prefix) + target, [] if image is None else [image])

    def encode_text(self, text):
        ids = [*self._words(text), EOS]
        return self._encoded(ids, ids, [])

    def encode_image(self, image):
        ids = self._picture()
        return self._encoded(ids, [-100] * len(ids), [image])

    def _picture(self):
        return [IMG, *[0] * TOKENS_PER_TILE, IMG_END]

    def _words(self, text):
        return [10 + int(word) if word.isdigit() else 4 + len(word) % 5 for word in text.split()]

    def _encoded(self, ids, labels, images):
        stacked = np.concatenate(images) if images else np.zeros((0, SIDE, SIDE, 3), np.uint8)
        return Encoded(np.asarray(ids, np.int64), np.asarray(labels, np.int64), stacked)


@pytest.fixture
def processor():
    return FakeProcessor()


@pytest.fixture
def encoded_type():
    return Encoded


def image_bytes(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


@pytest.fixture
def encode_image_file():
    return image_bytes


@pytest.fixture
def png():
    def make(value: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
        return image_bytes(Image.new("RGB", size, (value % 256, value // 256 % 256, 7)))

    return make


@pytest.fixture
def pairs(png):
    """n pairs; the caption of number i is the words "i"."""

    def make(n: int, prefix: str = "s") -> list[Sample]:
        return [Sample(key=f"{prefix}{i:04d}", images=(png(i),), text=f"{i} {i}") for i in range(n)]

    return make


@pytest.fixture
def texts():
    def make(n: int, words: int = 40) -> list[Sample]:
        return [
            Sample(key=f"t{i:04d}", text=" ".join(str(1000 * i + w) for w in range(words))) for i in range(n)
        ]

    return make
