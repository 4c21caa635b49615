"""Messages and pictures -> `input_ids`, `labels`, tiles: the one preprocessing that train, eval, chat and serve share.

Two rules keep training and inference alike. Every answer is tokenised apart from the prompt before it, exactly as
`generate` will see that prompt. And picture tokens are placed by id: text that merely spells `<IMG_CONTEXT>`, or
any other special token, stays text.

Shapes: T tokens, N tiles, S tile side in pixels, P image tokens a tile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from hovle_core.config import HovleConfig
from hovle_core.hub import HUB_ARGUMENTS, local_folder
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.losses import IGNORE_INDEX
from hovle_core.official import is_released
from hovle_core.rendering import Message, Rendering, open_pictures, text_ids

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)

Picture = Image.Image | bytes | np.ndarray
"""A picture, its file, or its tiles uint8 `[N, S, S, 3]`, cut already."""


@dataclass
class Encoded:
    """One sample, tokenised. labels are aligned with input_ids (transformers shift them), -100 = no target."""

    input_ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    tiles: np.ndarray  # uint8 [N, S, S, 3]
    key: str = ""


class HovleProcessor(ProcessorMixin):
    """`HovleImageProcessor` and a tokenizer, and how the two meet.

    Args:
        image_processor: cuts tiles.
        tokenizer: any transformers tokenizer that has the three picture tokens (`add_image_tokens`).
        tokens_per_tile: image tokens a tile takes (`config.embedding_config.tokens_per_tile`).
        chat_template: overrides the tokenizer's.

    Raises ValueError if the tokenizer lacks a picture token, or has one that is not a special token.
    """

    def __init__(
        self,
        image_processor: HovleImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
        **kwargs: Any,
    ):
        if image_processor is None or tokenizer is None:
            raise ValueError("image_processor and tokenizer are both needed")
        missing = [token for token in IMAGE_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"tokenizer lacks {missing}; add them with hovle_core.processor.add_image_tokens first"
            )
        ordinary = [token for token in IMAGE_TOKENS if token not in tokenizer.all_special_tokens]
        if ordinary:
            raise ValueError(
                f"tokenizer takes {ordinary} for ordinary text, so that a user could type a picture; make them special "
                "with hovle_core.processor.add_image_tokens"
            )
        self.tokens_per_tile = tokens_per_tile
        self.image_token = IMAGE_CONTEXT
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "HovleProcessor":
        """As transformers', for a folder or hub id in our format or the released one.

        One that was saved beside released weights comes before what the released files say.
        Raises FileNotFoundError, saying what to do, where there is no such folder, repository or tokenizer.
        """
        from hovle_core.official_processor import processor_from_released  # which makes processors

        hub = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
        folder = local_folder(pretrained_model_name_or_path, weights=False, **hub)
        if not is_released(folder) or (folder / PROCESSOR_NAME).is_file():
            return super().from_pretrained(folder, **kwargs)
        if kwargs:
            raise ValueError(f"unknown arguments {sorted(kwargs)} for the processor of a released checkpoint")
        return processor_from_released(folder)

    # ---- training and chat -------------------------------------------------------------------------------------

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Picture] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """A conversation -> Encoded; only assistant answers are targets.

        messages: transformers style; `content` is text or a list of `{"type": "image"}` and
            `{"type": "text", "text": ...}` parts. images: one for each image part, in order.

        Raises ValueError if the counts of images and image parts differ, or if the chat template rewrites earlier
        turns when later ones come (answers could then not be told from prompts).
        """
        return self._encode(
            Rendering(self.tokenizer, messages, self.chat_template), images, add_generation_prompt
        )

    def _encode(
        self,
        rendering: Rendering,
        images: Sequence[Picture],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Encoded:
        tiles = [self.tiles(image) for image in images]
        if len(tiles) != rendering.num_images:
            raise ValueError(
                f"messages hold {rendering.num_images} image parts, but {len(tiles)} images were given; "
                'one {"type": "image"} part stands for one image'
            )
        ids: list[int] = []
        labels: list[int] = []
        pictures = iter([self._picture(len(t)) for t in tiles])
        for text, is_target in rendering.segments(add_generation_prompt, continue_final_message):
            segment = rendering.tokenize(text, pictures)
            ids += segment
            labels += self._answer_labels(segment) if is_target else [IGNORE_INDEX] * len(segment)
        return self._encoded(ids, labels, tiles)

    def encode_pair(self, image: Picture | None, text: str) -> Encoded:
        """A picture and its caption -> Encoded: picture tokens and a line break, as in conversations, then the text and
        the end token as targets."""
        tiles = [] if image is None else [self.tiles(image)]
        prefix = [token for t in tiles for token in self._picture(len(t))]
        prefix += self.text_ids("\n") if tiles else []
        target = [*self.text_ids(text), self.tokenizer.eos_token_id]
        return self._encoded(prefix + target, [IGNORE_INDEX] * len(prefix) + target, tiles)

    def encode_text(self, text: str) -> Encoded:
        """Plain text and the end token, every token a target."""
        ids = [*self.text_ids(text), self.tokenizer.eos_token_id]
        return self._encoded(ids, list(ids), [])

    def encode_image(self, image: Picture) -> Encoded:
        """A picture alone, no targets."""
        tiles = self.tiles(image)
        ids = self._picture(len(tiles))
        return self._encoded(ids, [IGNORE_INDEX] * len(ids), [tiles])

    def tiles(self, picture: Picture) -> np.ndarray:
        """uint8 `[N, S, S, 3]`. Raises `images.ImageError` for a file that is no picture."""
        if isinstance(picture, np.ndarray):
            return picture
        cutter = self.image_processor
        tiles: np.ndarray = (
            cutter.tiles_of_file(picture) if isinstance(picture, bytes) else cutter.tiles(picture)
        )
        return tiles

    def text_ids(self, text: str) -> list[int]:
        """Plain text -> token ids; spelled-out special tokens stay text."""
        return text_ids(self.tokenizer, text)

    def batch(self, samples: Sequence[Encoded], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Left-padded inputs `input_ids, attention_mask [B, T]` and `pixel_values [N, 3, S, S]` for `generate`, these
        normalised on `device` or left uint8 for the model to do (`HovleImageProcessor.do_normalize`)."""
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )
        T = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), T), pad, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            input_ids[row, T - len(sample.input_ids) :] = torch.from_numpy(sample.input_ids)
            attention_mask[row, T - len(sample.input_ids) :] = 1
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        tiles = [sample.tiles for sample in samples if len(sample.tiles)]
        if tiles:
            stacked = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).to(device)
            inputs["pixel_values"] = self.image_processor.pixel_values(stacked)
        return inputs

    # ---- transformers' own call --------------------------------------------------------------------------------

    def __call__(
        self,
        images: Image.Image | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """text (one or many) with one `<IMG_CONTEXT>` for each picture of `images`, in order -> model inputs.

        The text is a rendered prompt of the caller's own, so its special tokens count; for messages from users
        use `encode` or `apply_chat_template`. `images` may be nested, a list a text. Texts are padded on the left.
        Raises ValueError if placeholders and images disagree.
        """
        if kwargs:
            raise ValueError(
                f"unknown arguments {sorted(kwargs)}; HovleProcessor takes images, text, return_tensors, padding"
            )
        if return_tensors != "pt" or text is None or padding not in (True, "longest"):
            raise ValueError("text is needed, return_tensors must be 'pt' and padding True")
        texts = [text] if isinstance(text, str) else list(text)
        tiles = [self.image_processor.tiles(picture) for picture in _flat(images)]
        placeholders = sum(t.count(self.image_token) for t in texts)
        if placeholders != len(tiles):
            raise ValueError(
                f"text holds {placeholders} {self.image_token} placeholders for {len(tiles)} images"
            )
        remaining = iter(tiles)
        samples = []
        for t in texts:
            first, *rest = t.split(self.image_token)
            ids, own = self.tokenizer(first, add_special_tokens=False)["input_ids"], []
            for piece in rest:
                own.append(next(remaining))
                ids += (
                    self._picture(len(own[-1])) + self.tokenizer(piece, add_special_tokens=False)["input_ids"]
                )
            samples.append(self._encoded(ids, ids, own))
        return BatchFeature(self.batch(samples))

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | Tensor | BatchFeature:
        """One conversation or many, pictures inside their messages -> model inputs, as `encode` and `batch` make them.

        An image part is `{"type": "image", "image": PIL image, path or URL}` (also under "path" and "url").
        `tokenize=False` gives the text for `__call__`, with one `<IMG_CONTEXT>` a picture; kwargs are variables of
        the template. `return_dict=False` gives `input_ids [B, T]` alone.

        Raises ValueError as `encode` does, and for text that cannot be told from special tokens when not tokenized.
        """
        known = {"return_tensors": "pt", "padding": True}
        if unknown := {k: v for k, v in (processor_kwargs or {}).items() if known.get(k) != v}:
            raise ValueError(
                f"processor_kwargs {unknown} are not known; padding is always on, tensors are torch's"
            )
        if tokenize and return_tensors not in ("pt", "auto", None):
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        one = isinstance(conversation[0], Mapping)
        conversations: Any = [conversation] if one else conversation
        template = chat_template or self.chat_template
        renderings = [Rendering(self.tokenizer, messages, template, kwargs) for messages in conversations]
        prompt = (add_generation_prompt, continue_final_message)
        if not tokenize:
            texts = [rendering.text(self.image_token, *prompt) for rendering in renderings]
            return texts[0] if one else texts
        samples = [
            self._encode(rendering, open_pictures(messages), *prompt)
            for rendering, messages in zip(renderings, conversations, strict=True)
        ]
        inputs = BatchFeature(self.batch(samples))
        return inputs if return_dict else inputs["input_ids"]

    # ---- inside ------------------------------------------------------------------------------------------------

    def _picture(self, num_tiles: int) -> list[int]:
        start, end = self.tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_END])
        return [start, *[self.image_token_id] * (num_tiles * self.tokens_per_tile), end]

    def _answer_labels(self, segment: list[int]) -> list[int]:
        """An answer's targets end with its end token: what a template prints behind it is never generated."""
        eos = self.tokenizer.eos_token_id
        end = len(segment) - segment[::-1].index(eos) if eos in segment else len(segment)
        return segment[:end] + [IGNORE_INDEX] * (len(segment) - end)

    def _encoded(self, ids: list[int], labels: list[int], tiles: list[np.ndarray]) -> Encoded:
        size = self.image_processor.tile_size
        if len(tiles) == 1:  # the usual one: megabytes that need no copy
            (stacked,) = tiles
        else:
            stacked = np.concatenate(tiles) if tiles else np.zeros((0, size, size, 3), np.uint8)
        return Encoded(np.asarray(ids, np.int64), np.asarray(labels, np.int64), stacked)


def _flat(images: Any) -> list[Image.Image]:
    """One picture, a list of them, or a list a text, as transformers' pipelines hand them over."""
    if images is None or isinstance(images, Image.Image):
        return [] if images is None else [images]
    if not isinstance(images, list | tuple):
        raise ValueError(
            f"images must be PIL images, or lists of them, got {type(images).__name__}: open files with "
            "PIL.Image.open, make arrays pictures with PIL.Image.fromarray"
        )
    return [picture for part in images for picture in _flat(part)]


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the picture tokens a tokenizer lacks, and make special those it has as ordinary ones; returns how many are
    new. Resize the LLM's embeddings afterwards."""
    before = len(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(IMAGE_TOKENS)}, replace_extra_special_tokens=False
    )
    return len(tokenizer) - before


AutoProcessor.register(HovleConfig, HovleProcessor, exist_ok=True)
