"""Tiny models with random weights: real classes, real shapes, nothing learned."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.layers import TransformerBlock
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import IMAGE_CONTEXT, HovleProcessor, add_image_tokens
from hovle_core.roles import TeacherEncoder

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(texts: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """A byte-level BPE of about 300 tokens with ChatML and picture tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([*texts, "user assistant what is this a red blue square circle"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    tokenizer.chat_template = CHATML
    add_image_tokens(tokenizer)
    return tokenizer


def tiny_llm(vocab_size: int, seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A two-layer Llama of width 32, tied head, for a tokenizer of `vocab_size` tokens."""
    fields = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
    } | fields  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **fields))


def tiny_embedding_config(vocab_size: int, **fields: Any) -> HolisticEmbeddingConfig:
    """Two blocks of width 32 over 56-pixel tiles: 4 image tokens a tile."""
    fields = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "image_size": 56, "max_position_embeddings": 512,
    } | fields  # fmt: skip
    return HolisticEmbeddingConfig(vocab_size=vocab_size, **fields)


def tiny_processor(tokenizer: PreTrainedTokenizerBase | None = None, max_tiles: int = 4) -> HovleProcessor:
    """A processor of 56-pixel tiles for `tiny_embedding_config`."""
    return HovleProcessor(
        HovleImageProcessor(56, 1, max_tiles), tokenizer or tiny_tokenizer(), tokens_per_tile=4
    )


def tiny_hovle(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, **embedding: Any
) -> HovleForConditionalGeneration:
    """A HoVLE of the above, every weight random: also the block projections that training starts at zero."""
    size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HovleForConditionalGeneration.from_language_model(
            tiny_llm(size, seed),
            tiny_embedding_config(size, **embedding),
            tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        )
        for block in cast(Iterable[TransformerBlock], model.embedding.layers):
            torch.nn.init.normal_(block.self_attn.o_proj.weight, std=0.2)
            torch.nn.init.normal_(block.mlp.down_proj.weight, std=0.2)
    return model.eval()


class GridTeacher(TeacherEncoder):
    """A teacher without weights: mean colours of a grid of cells, spread over `feature_size` fixed directions, as if
    they were joined from `layers` equal layers. Its connector repeats them up to `connector_size` channels."""

    directions: Tensor  # a buffer

    def __init__(
        self, feature_size: int = 8, grid: int = 2, layers: int = 1, connector_size: int | None = None
    ):
        super().__init__()
        self.feature_size, self.grid, self.layers = feature_size, grid, layers
        self.connector_size = connector_size
        self.register_buffer(
            "directions", torch.randn(3, feature_size, generator=torch.Generator().manual_seed(0))
        )

    def grid_features(self, tiles: Tensor) -> Tensor:
        colours = F.adaptive_avg_pool2d(tiles.float() / 255, self.grid)  # [N, 3, grid, grid]
        return colours.permute(0, 2, 3, 1) @ self.directions

    @property
    def layer_sizes(self) -> list[int]:
        return [self.feature_size // self.layers] * self.layers

    def connect(self, features: Tensor) -> Tensor:
        if self.connector_size is None:
            return super().connect(features)
        return features.repeat(1, 1, 1, self.connector_size // self.feature_size)
