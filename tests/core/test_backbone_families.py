"""LLMs of several families, tiny and random, through the default backbone: what a HoVLE needs of them holds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hovle_core.testing import tiny_tokenizer
from hovle_core.testing.conformance import BackboneTests

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
    "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip

pytestmark = pytest.mark.slow  # about two seconds a family


def suite(model_type: str, **fields) -> type[BackboneTests]:
    class Tests(BackboneTests):
        name = "transformers"

        @pytest.fixture(scope="class")
        @classmethod
        def arguments(cls, tmp_path_factory):
            folder = tmp_path_factory.mktemp(model_type)
            tokenizer = tiny_tokenizer()
            # Three embeddings short: the backbone has to make room for the picture tokens.
            config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer) - 3, **{**SIZES, **fields})
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return {"path": str(folder)}

    return Tests


class TestLlamaUntied(suite("llama", tie_word_embeddings=False)): ...


class TestQwen2Tied(suite("qwen2", tie_word_embeddings=True)): ...


class TestQwen3(suite("qwen3", head_dim=16, tie_word_embeddings=False)): ...


class TestMistral(suite("mistral", sliding_window=None, tie_word_embeddings=False)): ...


class TestPhi(suite("phi", tie_word_embeddings=False)): ...


class TestPhi3(suite("phi3", tie_word_embeddings=False)): ...


class TestGemma3(suite("gemma3_text", head_dim=16, sliding_window=256)): ...
