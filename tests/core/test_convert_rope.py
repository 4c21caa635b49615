"""RoPE between the released `config.json` and ours: unchanged it comes back as it was, changed it goes out alone."""

import copy
import json
from pathlib import Path

import pytest

from hovle_core import HovleConfig
from hovle_core.official import config_from_released, config_to_released, llm_config_from_released
from hovle_core.testing import tiny_hovle, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
STACKS = ("embedding_config", "llm_config")
LLMS = ("internlm2", "llama", "qwen2")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def released(scaling: dict | None, llm: str = "internlm2") -> dict:
    config = json.loads((GOLDEN / "hovle-tiny" / "config.json").read_text())
    config["llm_config"]["model_type"] = llm
    for stack in STACKS:
        config[stack]["rope_scaling"] = copy.deepcopy(scaling)
    return config


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("kind", ["dynamic", "linear"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_rope_comes_back_as_it_was(llm, kind, spelling, tmp_path):
    original = released({spelling: kind, "factor": 2.0}, llm)
    given = copy.deepcopy(original)
    config = config_from_released(given)
    assert given == config.released == original
    assert config.embedding_config.rope_parameters["rope_type"] == kind
    config.save_pretrained(tmp_path)
    assert config_to_released(HovleConfig.from_pretrained(tmp_path)) == original
    llm_config_from_released(given["llm_config"])
    assert given == original


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize(
    "before",
    [
        None,
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"type": "linear", "factor": 4.0},
    ],
)
@pytest.mark.parametrize(
    ("now", "scaling"),
    [
        ({"rope_type": "linear", "factor": 3.0}, {"type": "linear", "factor": 3.0}),
        ({"type": "dynamic", "factor": 3}, {"type": "dynamic", "factor": 3.0}),
        ({"rope_type": "default"}, None),
    ],
)
def test_a_changed_rope_replaces_the_old_one(llm, before, now, scaling):
    original = released(before, llm)
    config = config_from_released(original)
    for stack in (config.embedding_config, config.text_config):
        stack.rope_parameters = {**now, "rope_theta": 5e4}
    changed = config_to_released(config)
    for stack in STACKS:
        assert changed[stack].pop("rope_scaling") == scaling
        assert isinstance((scaling or {"factor": 1.0})["factor"], float)
        assert changed[stack].pop("rope_theta") == 5e4
        del original[stack]["rope_scaling"], original[stack]["rope_theta"]
    assert changed == original


@pytest.mark.parametrize("part", ["embedding_config", "text_config"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 3.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "linear"},
        {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
    ],
)
def test_rope_that_the_released_code_cannot_do_is_refused(part, rope):
    config = config_from_released(released({"type": "dynamic", "factor": 2.0}))
    getattr(config, part).rope_parameters = {**rope, "rope_theta": 1e4}
    message = (
        f"{part}.rope_parameters is .*'{rope['rope_type']}'.*'linear' and 'dynamic'.*keep this checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        config_to_released(config)


def test_a_llama_has_its_own_rope_and_the_blocks_have_not():
    config = tiny_hovle(tiny_tokenizer()).config
    rope = {"rope_type": "llama3", **LLAMA3, "rope_theta": 1e4}
    config.text_config.rope_parameters = dict(rope)
    llm = config_to_released(config)["llm_config"]
    assert llm["rope_scaling"] == {"type": "llama3", **LLAMA3}
    assert llm_config_from_released(llm).rope_parameters == {"type": "llama3", **rope}
    config.embedding_config.rope_parameters = dict(rope)
    with pytest.raises(ValueError, match=r"embedding_config\.rope_parameters is"):
        config_to_released(config)
