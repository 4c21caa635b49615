"""The default backbone and tokenizers: whatever transformers can load from a hub id or a folder, and GGUF, InternLM2
and tiktoken files besides."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hovle_core.hub import local_folder
from hovle_core.llm_files import (
    GGUF,
    PUBLISHED_INTERNLM2,
    gguf_config,
    gguf_model,
    gguf_tokenizer,
    internlm2_config,
    internlm2_model,
    internlm2_tokenizer,
)
from hovle_core.official import INTERNLM2, llm_config_from_released
from hovle_core.processor import add_image_tokens
from hovle_core.roles import LLMBackbone, TokenizerProvider
from hovle_core.tiktoken_file import tiktoken_tokenizer


class TransformersBackbone(LLMBackbone):
    """A causal LM that `AutoModelForCausalLM` can load from safetensors; an InternLM2, which becomes the Llama that it
    is; or a GGUF file, which is dequantised.

    Args:
        path: hub id, folder, or a file `*.gguf`.
        from_config: make random weights of that config (the folder then needs `config.json` and a tokenizer only).
        seed: seeds those weights, and the embeddings of tokens that the folder's weights lack.
        overrides: config fields to replace, with `from_config` only.

    Raises ValueError where the folder has no config, naming it; so do `config()`, `tokenizer()` and `model()` where
    there is no such folder or hub id, or where its files are missing or damaged.
    """

    def __init__(self, path: str, from_config: bool = False, seed: int = 0, overrides: dict | None = None):
        self.gguf = _gguf_file(path)
        if self.gguf is None and Path(path).exists() and not (Path(path) / "config.json").is_file():
            raise ValueError(
                f"backbone path {path!r} holds no config.json; give the folder of a saved causal LM, or a .gguf file"
            )
        if overrides and not from_config:
            raise ValueError(
                "overrides change the architecture, so they need from_config=True (random weights)"
            )
        self.path, self.from_config, self.seed, self.overrides = path, from_config, seed, overrides or {}

    def config(self) -> PreTrainedConfig:
        with self._named():
            config = self._config()
        for name, value in self.overrides.items():
            setattr(config, name, value)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        with self._named():
            tokenizer = _tokenizer(self.path)
        add_image_tokens(tokenizer)
        return tokenizer

    def model(self) -> PreTrainedModel:
        with self._named():
            model = self._model()
        size = len(self.tokenizer())
        if model.get_input_embeddings().weight.shape[0] < size:
            with torch.random.fork_rng(devices=[]):  # the new rows are drawn around the mean of the old ones
                torch.manual_seed(self.seed)
                model.resize_token_embeddings(size)
        return model

    def _config(self) -> PreTrainedConfig:
        if self.gguf is not None:
            return gguf_config(self.gguf)
        if self.path in PUBLISHED_INTERNLM2:
            return llm_config_from_released({**PUBLISHED_INTERNLM2[self.path], "model_type": INTERNLM2})
        if _is_internlm2(self.path):
            return internlm2_config(local_folder(self.path, weights=False))
        return AutoConfig.from_pretrained(self.path)

    def _model(self) -> PreTrainedModel:
        if self.from_config:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                return AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        if self.gguf is not None:
            return gguf_model(self.gguf)
        if _is_internlm2(self.path):
            return internlm2_model(local_folder(self.path, weights=True))
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, use_safetensors=True)

    def _named(self) -> AbstractContextManager[None]:
        return name_what_fails(f"model.backbone path {self.path!r}")


class TransformersTokenizer(TokenizerProvider):
    """A tokenizer that `AutoTokenizer` can load without remote code, an InternLM2's, or that of a GGUF file; picture
    tokens that it lacks are added.

    Args:
        path: hub id, folder, or a file `*.gguf`.

    `tokenizer()` raises ValueError naming `path` where there is no such tokenizer.
    """

    def __init__(self, path: str):
        self.path = path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = _tokenizer(self.path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.tokenizer path {self.path!r} holds no tokenizer that transformers can load: {error}"
            ) from error
        add_image_tokens(tokenizer)
        return tokenizer


class TiktokenTokenizer(TokenizerProvider):
    """A tiktoken vocabulary; picture tokens are added behind its special tokens.

    Args:
        path: a file `*.tiktoken`.
        pattern: what cuts text into words first: `gpt2`, `cl100k_base`, `qwen`, or a regular expression.
        special_tokens: token -> id, as the encoding has them, behind the ids of the file.
        eos_token: the one that ends an answer.
        chat_template: Jinja, as transformers has it.

    Raises ValueError for a path that is no file; `tokenizer()` raises ValueError for one that is no such vocabulary.
    """

    def __init__(
        self,
        path: str,
        special_tokens: dict[str, int],
        eos_token: str,
        pattern: str = "cl100k_base",
        chat_template: str | None = None,
    ):
        if not Path(path).is_file():
            raise ValueError(f"model.tokenizer path {path!r} must be a .tiktoken file")
        self.path, self.pattern, self.special_tokens = Path(path), pattern, special_tokens
        self.eos_token, self.chat_template = eos_token, chat_template

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = tiktoken_tokenizer(self.path, self.pattern, self.special_tokens, self.eos_token)
        tokenizer.chat_template = self.chat_template
        add_image_tokens(tokenizer)
        return tokenizer


@contextmanager
def name_what_fails(setting: str) -> Iterator[None]:
    """Raise ValueError naming `setting` where transformers finds no model, no weights, or damaged ones within."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) is not None:  # the machine's own, such as a full disk
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{setting} is no folder or hub id that can be loaded: {reason}") from error


def _gguf_file(path: str) -> Path | None:
    """`path` as a GGUF file, or None where it is a folder or a hub id. Raises ValueError where the file is missing."""
    if not path.endswith(GGUF):
        return None
    if not Path(path).is_file():
        raise ValueError(f"backbone path {path!r} does not exist; give a .gguf file that is here")
    return Path(path)


def _is_internlm2(path: str) -> bool:
    return PreTrainedConfig.get_config_dict(path)[0].get("model_type") == INTERNLM2


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    if (file := _gguf_file(path)) is not None:
        return gguf_tokenizer(file)
    if _has_config(path) and _is_internlm2(path):
        return internlm2_tokenizer(local_folder(path, weights=False))
    return AutoTokenizer.from_pretrained(path)


def _has_config(path: str) -> bool:
    """A tokenizer's folder needs no config.json; of a hub id nothing is known yet."""
    return not Path(path).is_dir() or (Path(path) / "config.json").is_file()
