"""Parity with what the released code computes, in float32 (tests/golden, made with it)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from hovle_core import HovleForConditionalGeneration, HovleImageProcessor

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("hovle-tiny", "hovle-hd-tiny")
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    folder = GOLDEN / request.param
    return HovleForConditionalGeneration.from_pretrained(folder).eval(), load_file(folder / "io.safetensors")


@torch.no_grad()
def test_logits_and_loss(golden):
    model, io = golden
    out = model(input_ids=io["input_ids"], pixel_values=io["pixel_values"], labels=io["labels"])
    torch.testing.assert_close(out.logits, io["logits"], **TOLERANCE)
    torch.testing.assert_close(out.loss.reshape(1), io["loss"], **TOLERANCE)


@torch.no_grad()
def test_text_only_logits(golden):
    model, io = golden
    torch.testing.assert_close(model(input_ids=io["text_input_ids"]).logits, io["text_logits"], **TOLERANCE)


@torch.no_grad()
def test_embedding_hidden_states_and_image_features(golden):
    model, io = golden
    seen = []
    handle = model.embedding.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    embeds = model.embed(io["input_ids"], io["pixel_values"])
    handle.remove()
    torch.testing.assert_close(seen[0], io["embedding_hidden_states"], **TOLERANCE)
    features = embeds[io["input_ids"] == model.config.image_token_id]
    torch.testing.assert_close(features, io["embedding_image_features"], **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(golden, use_cache):
    model, io = golden
    out = model.generate(
        input_ids=io["input_ids"],
        pixel_values=io["pixel_values"],
        attention_mask=torch.ones_like(io["input_ids"]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
    )
    assert out[0, -12:].tolist() == io["greedy_tokens"].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_own_format_round_trip_is_exact(name, tmp_path):
    model = HovleForConditionalGeneration.from_pretrained(GOLDEN / name)
    model.save_pretrained(tmp_path)
    again = HovleForConditionalGeneration.from_pretrained(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hovle"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("language_model.model.norm.weight"), "missing language_model.model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
        (
            lambda t: t.update({"language_model.output.weight": torch.zeros(3, 64)}),
            "output.weight is \\[3, 64\\], expected \\[320, 64\\]",
        ),
    ],
)
def test_misfit_tensors_are_named(change, message, tmp_path):
    tensors = load_file(GOLDEN / "hovle-tiny" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "hovle-tiny" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        HovleForConditionalGeneration.from_pretrained(tmp_path)


def test_pickled_weights_and_remote_code_are_refused(tmp_path):
    (tmp_path / "config.json").write_text((GOLDEN / "hovle-tiny" / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are refused"):
        HovleForConditionalGeneration.from_pretrained(tmp_path)
    own = HovleForConditionalGeneration.from_pretrained(GOLDEN / "hovle-tiny")
    own.save_pretrained(tmp_path / "own")
    state = own.state_dict()
    (tmp_path / "own" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "own" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        HovleForConditionalGeneration.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="trust_remote_code"):
        HovleForConditionalGeneration.from_pretrained(GOLDEN / "hovle-tiny", trust_remote_code=True)


def test_all_released_grids():
    cases = json.loads((GOLDEN / "dynprocess" / "grids.json").read_text())
    assert len(cases) == 150
    for case in cases:
        processor = HovleImageProcessor(
            case["tile_size"], case["min_tiles"], case["max_tiles"], case["thumbnail"]
        )
        assert processor.grid(case["width"], case["height"]) == (case["columns"], case["rows"]), case
        assert processor.num_tiles(case["width"], case["height"]) == case["tiles"], case


@pytest.mark.parametrize(
    ("name", "tile_size", "max_tiles"),
    [("china_320x200_max6_size56", 56, 6), ("flower_160x350_max12_size28", 28, 12)],
)
def test_released_tiles_pixel_for_pixel(name, tile_size, max_tiles):
    pixels = load_numpy(GOLDEN / "dynprocess" / "pixels.safetensors")
    tiles = HovleImageProcessor(tile_size, 1, max_tiles).tiles(Image.fromarray(pixels[f"{name}.image"]))
    np.testing.assert_array_equal(tiles, pixels[f"{name}.tiles"])
