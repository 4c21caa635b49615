"""int8 through `quantization_config`, on the CPU: quality, generation, and what is saved is what is loaded."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, TorchAoConfig

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    processor = tiny_processor(tiny_tokenizer())
    model = tiny_hovle(processor.tokenizer)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    picture = Image.radial_gradient("L").convert("RGB")
    return folder, model, processor(images=picture, text="<IMG_CONTEXT>what is this")


@pytest.mark.parametrize("kind", [Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig])
def test_int8_on_the_cpu(checkpoint, kind, tmp_path):
    folder, model, inputs = checkpoint
    quantized = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=TorchAoConfig(kind()))
    for linear in (
        quantized.embedding.layers[0].mlp.up_proj, quantized.embedding.pixel_shuffle_proj[0],
        quantized.language_model.model.layers[1].self_attn.q_proj,
    ):  # fmt: skip
        assert linear.weight.qdata.dtype == torch.int8
    assert quantized.embedding.embed_tokens.weight.dtype == torch.float32
    with torch.no_grad():
        logits, expected = quantized(**inputs).logits, model(**inputs).logits
    assert not torch.equal(logits, expected)
    assert F.cosine_similarity(logits, expected, dim=-1).min() > 0.99
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = quantized.generate(**inputs, **options)
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 4

    quantized.save_pretrained(tmp_path)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path, folder)]
    assert sizes[0] < 0.8 * sizes[1]  # here most weights are embeddings, which stay as they are
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
