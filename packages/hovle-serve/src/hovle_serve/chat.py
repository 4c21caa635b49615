"""A conversation with a HoVLE in this process, and how one is loaded to be talked to."""

import json
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from hovle_core.config import HovleConfig
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.official import RELEASED_MODEL_TYPE
from hovle_core.plugins import load_plugins
from hovle_core.processor import HovleProcessor
from hovle_core.rendering import Message
from hovle_core.runs import latest_checkpoint, plugins_of
from hovle_serve.conversation import Conversation
from hovle_serve.sampling import Sampling
from hovle_serve.stream import max_answer_tokens, stream_answer

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "processor_config.json"


class ChatSession(Conversation):
    """A conversation with a model in this process; sessions that share a model may answer side by side."""

    def __init__(
        self,
        model: HovleForConditionalGeneration,
        processor: HovleProcessor,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.sampling = sampling or Sampling()
        super().__init__(system)

    def reset(self) -> None:
        """Forget everything but the system message; a seed starts anew."""
        super().reset()
        self._generator = self.sampling.generator()

    def _answer(self, messages: Sequence[Message], images: Sequence[Image]) -> Generator[str, None, None]:
        prompt = self.processor.encode(messages, images, add_generation_prompt=True)
        room = max_answer_tokens(self.model.config, prompt)
        return stream_answer(
            self.model,
            self.processor,
            prompt,
            min(self.sampling.max_new_tokens, room),
            self.sampling.logits_processors(self._generator),
        )


def load(
    path: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[HovleForConditionalGeneration, HovleProcessor]:
    """Model (in eval mode) and processor of a checkpoint, a run, a folder of runs or a hub id.

    Says which plugins are others than those that it was trained with.
    device: None picks cuda, mps or cpu. dtype: None is bfloat16 on a GPU that has it, else float32.
    Raises ValueError where there is nothing to talk to, saying why (see `hovle_core.runs.latest_checkpoint`).
    """
    checkpoint = latest_checkpoint(path)
    _check_is_hovle(checkpoint)
    for change in load_plugins().changed_since(plugins_of(checkpoint)):
        logger.warning("%s: %s", checkpoint, change)
    device = torch.device(pick_device() if device is None else device)
    if dtype is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float32
    try:
        processor = HovleProcessor.from_pretrained(checkpoint)
        model = HovleForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot load {checkpoint!r}: {_one_line(error)}") from error
    return model.to(device).eval(), processor


def pick_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_is_hovle(checkpoint: str) -> None:
    """Raise ValueError unless the checkpoint has a HoVLE's config and a processor."""
    config_file = _file(checkpoint, "config.json")
    if config_file is None:
        raise ValueError(f"{checkpoint!r} has no config.json, so it is no checkpoint")
    try:
        config: dict[str, Any] = json.loads(Path(config_file).read_text())
    except ValueError as error:
        raise ValueError(f"{config_file} is not valid JSON: {error}") from error
    model_type = config.get("model_type")
    if model_type not in (HovleConfig.model_type, RELEASED_MODEL_TYPE) or "embedding_config" not in config:
        raise ValueError(
            f"{checkpoint!r} is a plain {model_type!r} model without a holistic embedding and a processor, so it "
            "cannot be talked to; give a run or checkpoint of distillation, alignment or instruction_tuning"
        )
    # A released checkpoint says in its own files what its processor is.
    if model_type == HovleConfig.model_type and _file(checkpoint, PROCESSOR_FILE) is None:
        raise ValueError(
            f"{checkpoint!r} has no processor ({PROCESSOR_FILE} and a tokenizer): save one beside the model with "
            "HovleProcessor(...).save_pretrained"
        )


def _file(checkpoint: str, name: str) -> str | None:
    """A file of a folder (None where there is no such file) or of a hub id, fetched or cached."""
    if Path(checkpoint).is_dir():
        path = Path(checkpoint) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(checkpoint, name)
    except OSError as error:
        raise ValueError(f"{checkpoint!r} is no folder here, and on the hub: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
