"""A released folder loaded directly generates as the one that `hovle convert` makes of it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from hovle_core import HovleForConditionalGeneration
from hovle_core.cli import main
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
END = 2  # <|im_end|> of tiny_tokenizer


@pytest.fixture
def golden(tmp_path):
    """The golden released folder, which has no tokenizer."""
    return shutil.copytree(GOLDEN / "hovle-tiny", tmp_path / "released", ignore=lambda *_: ["io.safetensors"])


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A released folder with a tokenizer, whose chat template the released code's `template` stands for."""
    path = tmp_path_factory.mktemp("own")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tiny_hovle(tokenizer).save_pretrained(path / "own")
    tiny_processor(tokenizer).save_pretrained(path / "own")
    assert main(["convert", str(path / "own"), str(path / "released"), "--to", "released"]) == 0
    return path / "released"


def generation(folder: Path) -> dict:
    return HovleForConditionalGeneration.from_pretrained(folder).generation_config.to_dict()


def converted(folder: Path) -> dict:
    out = folder.with_name("converted")
    assert main(["convert", str(folder), str(out), "--to", "hovle", "--force"]) == 0
    return generation(out)


@pytest.mark.parametrize(
    "given",
    [None, {"eos_token_id": [2, 7]}, {"eos_token_id": 9, "pad_token_id": 3, "do_sample": True, "top_k": 5}],
)
def test_generation_config_is_read(golden, given):
    if given is not None:
        (golden / "generation_config.json").write_text(json.dumps(given))
    found = generation(golden)
    assert found == converted(golden)
    ends = (given or {}).get("eos_token_id", 2)
    assert found["eos_token_id"] == (ends if isinstance(ends, list) else [ends])
    assert found["suppress_tokens"] == [313]
    assert found["bos_token_id"] == 1  # llm_config's, as pad_token_id
    assert found["pad_token_id"] == (given or {}).get("pad_token_id", 0)
    assert found["top_k"] == (given or {}).get("top_k")


def test_an_answer_ends_where_the_chat_template_says(with_tokenizer):
    (with_tokenizer / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    found = generation(with_tokenizer)
    assert found == converted(with_tokenizer)
    assert found["eos_token_id"] == [END, 5, 7]


def test_a_tokenizer_that_cannot_be_read_is_logged(golden, caplog):
    (golden / "tokenizer.json").write_text("{}")
    assert generation(golden)["eos_token_id"] == [2]
    assert "for want of a tokenizer" in caplog.text


def test_the_callers_generation_config_goes_first(golden):
    own = GenerationConfig(eos_token_id=5)
    model = HovleForConditionalGeneration.from_pretrained(golden, generation_config=own)
    assert model.generation_config.eos_token_id == 5
