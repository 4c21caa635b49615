"""LoRA through peft on the embedding blocks, on the LLM, on both: saved, loaded, merged, trained."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from hovle_core import HovleForConditionalGeneration
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

TARGETS = {
    "blocks": r"embedding\.layers\..*\.(q_proj|v_proj)",
    "llm": r"language_model\..*\.(q_proj|down_proj)",
    "both": ["q_proj", "v_proj"],
    "all": "all-linear",
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_tokenizer())


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(images=Image.radial_gradient("L").convert("RGB"), text="<IMG_CONTEXT>what is this")


@pytest.mark.parametrize("where", TARGETS)
def test_adapters_are_saved_loaded_and_merged(processor, inputs, where, tmp_path):
    model = tiny_hovle(processor.tokenizer)
    with torch.no_grad():
        plain = model(**inputs).logits
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules=TARGETS[where], init_lora_weights=False)
        )
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert any(".embedding." in name for name in trained) == (where != "llm")
        assert any(".language_model." in name for name in trained) == (where != "blocks")
        logits = adapted(**inputs).logits
        assert (logits - plain).abs().max() > 0.01
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        generated = adapted.generate(**inputs, **options)

        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(tiny_hovle(processor.tokenizer), tmp_path / "adapter")
        assert torch.equal(again(**inputs).logits, logits)

        merged = again.merge_and_unload()
        assert isinstance(merged, HovleForConditionalGeneration)
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-5, rtol=0)
        assert torch.equal(merged.generate(**inputs, **options), generated)
        merged.save_pretrained(tmp_path / "merged")
        loaded = HovleForConditionalGeneration.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)


def test_transformers_own_adapters(processor, inputs, tmp_path):
    model, again = tiny_hovle(processor.tokenizer), tiny_hovle(processor.tokenizer)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again.load_adapter(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_adapters_train_with_gradient_checkpointing(processor, inputs):
    """With every base weight frozen the first block's input needs no gradient: recomputation must not lose it."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_hovle(processor.tokenizer), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 8
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
