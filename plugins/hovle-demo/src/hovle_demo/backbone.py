"""The demo's small LLM: a Llama of a few million parameters for the tokenizer that `prepare` trained."""

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hovle_core.roles import LLMBackbone


class SmallBackbone(LLMBackbone):
    """Random weights; the stage `language_modeling` pre-trains them.

    Args:
        tokenizer: folder of the tokenizer; the vocabulary is its size.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in LlamaConfig.
        seed: seeds the weights.
    """

    def __init__(
        self,
        tokenizer: str,
        hidden_size: int = 256,
        intermediate_size: int = 704,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        seed: int = 0,
    ):
        self.path, self.seed = tokenizer, seed
        self.sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path)

    def config(self) -> PreTrainedConfig:
        tokenizer = self.tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **self.sizes,
        )

    def model(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return LlamaForCausalLM(self.config())
