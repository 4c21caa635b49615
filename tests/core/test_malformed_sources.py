"""A released folder that is malformed is told in a line with file and field, by convert and by from_pretrained."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hovle_core import HovleForConditionalGeneration
from hovle_core.cli import main
from hovle_core.testing import tiny_hovle, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "hovle-tiny"


def changed(config: dict, section: str, **fields: object) -> dict:
    return {**config, section: {**config[section], **fields}}


CONFIGS = {
    "no object": (lambda c: [], "config.json holds a list"),
    "no llm_config": (lambda c: {k: v for k, v in c.items() if k != "llm_config"}, "llm_config is None"),
    "null": (lambda c: {**c, "llm_config": None}, "llm_config is None"),
    "a list": (lambda c: {**c, "embedding_config": [1]}, r"embedding_config is \[1\]"),
    "no placeholder": (
        lambda c: {
            **c,
            "embedding_config": {k: v for k, v in c["embedding_config"].items() if k != "img_context_token_id"},
        },
        "embedding_config lacks img_context_token_id",
    ),
    "rope of a word": (lambda c: changed(c, "llm_config", rope_scaling="dynamic"), "rope_scaling|rope_parameters"),
    "rope without factor": (lambda c: changed(c, "llm_config", rope_scaling={"type": "dynamic"}), "factor"),
    "rope of others": (
        lambda c: changed(c, "embedding_config", rope_scaling={"type": "yarn", "factor": 2.0}),
        "embedding_config.rope_parameters is .*yarn",
    ),
    "a number in quotes": (lambda c: changed(c, "llm_config", hidden_size="64"), "hidden_size"),
    "a type of none": (lambda c: {**c, "torch_dtype": "floaty"}, "floaty"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "source"))


def refused(folder: Path, capsys) -> str:
    assert main(["convert", str(folder), str(folder.parent / "out"), "--to", "hovle"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert [path.name for path in folder.parent.iterdir()] == ["source"]
    return error


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_malformed_config_is_named(folder, kind, capsys):
    change, message = CONFIGS[kind]
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        HovleForConditionalGeneration.from_pretrained(folder)
    assert str(path) in (error := refused(folder, capsys)) or "rope_parameters" in error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("tokenizer.json", "{}", "the tokenizer of .* cannot be read"),
    ],
)
def test_a_malformed_file_is_named(folder, name, text, message, capsys):
    (folder / name).write_text(text)
    assert re.search(message, refused(folder, capsys))


def test_an_end_token_of_zero_is_one(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    loaded = HovleForConditionalGeneration.from_pretrained(folder).generation_config.eos_token_id
    assert 0 in (loaded if isinstance(loaded, list) else [loaded])


def test_a_destination_within_a_file_is_named(folder, capsys):
    (file := folder / "config.json").touch()
    assert main(["convert", str(GOLDEN), str(file / "x" / "y"), "--to", "hovle"]) == 2
    assert f"{file} is a file" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_damaged_adapter_is_no_adapter(tmp_path, damage):
    """transformers would draw what is missing at random, and say so in the log."""
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    tiny_hovle(tiny_tokenizer()).save_pretrained(base)
    model = HovleForConditionalGeneration.from_pretrained(base)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert HovleForConditionalGeneration.from_pretrained(tmp_path / "adapter").active_adapters()
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lora_A" if damage == "missing" else "does not fit"):
        HovleForConditionalGeneration.from_pretrained(tmp_path / "adapter")


def test_embeddings_of_another_type_are_told(folder):
    model = HovleForConditionalGeneration.from_pretrained(folder)
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).half()
    with pytest.raises(
        ValueError, match="inputs_embeds are torch.float16, and the model's are torch.float32"
    ):
        model.generate(inputs_embeds=embeds, max_new_tokens=1)
