"""The default backbone and tokenizer: whatever transformers can load from a hub id or a folder."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hovle_core.processor import add_image_tokens
from hovle_core.roles import LLMBackbone, TokenizerProvider


class TransformersBackbone(LLMBackbone):
    """A causal LM that `AutoModelForCausalLM` can load from safetensors.

    Args:
        path: hub id or folder.
        from_config: make random weights of that config (the folder then needs `config.json` and a tokenizer only).
        seed: seeds those weights, and the embeddings of tokens that the folder's weights lack.
        overrides: config fields to replace, with `from_config` only.

    Raises ValueError where the folder has no config, naming it.
    """

    def __init__(self, path: str, from_config: bool = False, seed: int = 0, overrides: dict | None = None):
        if Path(path).exists() and not (Path(path) / "config.json").is_file():
            raise ValueError(
                f"backbone path {path!r} holds no config.json; give the folder of a saved causal LM"
            )
        if overrides and not from_config:
            raise ValueError(
                "overrides change the architecture, so they need from_config=True (random weights)"
            )
        self.path, self.from_config, self.seed, self.overrides = path, from_config, seed, overrides or {}

    def config(self) -> PreTrainedConfig:
        config = AutoConfig.from_pretrained(self.path)
        for name, value in self.overrides.items():
            setattr(config, name, value)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        add_image_tokens(tokenizer)
        return tokenizer

    def model(self) -> PreTrainedModel:
        if self.from_config:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, use_safetensors=True)
        size = len(self.tokenizer())
        if model.get_input_embeddings().weight.shape[0] < size:
            with torch.random.fork_rng(devices=[]):  # the new rows are drawn around the mean of the old ones
                torch.manual_seed(self.seed)
                model.resize_token_embeddings(size)
        return model


class TransformersTokenizer(TokenizerProvider):
    """A tokenizer that `AutoTokenizer` can load without remote code; picture tokens that it lacks are added.

    Args:
        path: hub id or folder.

    `tokenizer()` raises ValueError naming `path` where there is no such tokenizer.
    """

    def __init__(self, path: str):
        self.path = path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.tokenizer path {self.path!r} holds no tokenizer that transformers can load: {error}"
            ) from error
        add_image_tokens(tokenizer)
        return tokenizer
