"""Runs whose embedding mixes tokens by a plugin, as `hovle plugin new --kind token-mixer` writes it: it trains, and
generates."""

import sys

import pytest
import torch
from PIL import Image

from hovle_core import HovleForConditionalGeneration, HovleProcessor
from hovle_core.kit.new import write_package
from hovle_core.plugins import load_plugins
from hovle_core.registry import Provider, Spec
from hovle_train.cost import Row, row_cost
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.plan import meta_module
from hovle_train.runtime import Runtime

MODEL = {"num_hidden_layers": 2, "image_size": 56, "token_mixer": "fading"}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """As pip would have installed it."""
    write_package("fading", "token-mixer", tmp_path)
    source = tmp_path / "hovle-fading" / "src"
    info = source / "hovle_fading-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hovle-fading\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[hovle]\nfading = hovle_fading.plugin\n")
    monkeypatch.syspath_prepend(source)
    loaded = load_plugins()
    loaded.registry.add("teacher", Spec("grid", "hovle_core.testing:GridTeacher"), Provider("tests", "0"))
    yield loaded
    for module in [name for name in sys.modules if name.startswith("hovle_fading")]:
        del sys.modules[module]


def with_mixer(make_recipe, stage, precision="float32", **sections):
    model = {**make_recipe(stage).model.model_dump(), "embedding": MODEL, **sections.pop("model", {})}
    train = {"steps": 12, "precision": precision, **sections.pop("train", {})}
    return make_recipe(stage, model=model, train=train, **sections)


def test_distillation_then_alignment_then_an_answer(make_recipe, plugins, tmp_path):
    first = with_mixer(make_recipe, "distillation", "bfloat16", run_dir=str(tmp_path / "first"))
    Trainer(first, plugins, Runtime()).run()
    metrics = read_metrics(first.path / "metrics.jsonl")
    assert metrics[-1]["image_cosine"] > metrics[0]["image_cosine"] + 0.1
    start = {"init_from": str(first.path), "backbone": None, "embedding": {}, "image": {}}
    second = with_mixer(
        make_recipe, "alignment", "bfloat16", model=start, run_dir=str(tmp_path / "second"),
        train={"drop_path": {"rate": 0.2}, "steps": 6},
    )  # fmt: skip
    Trainer(second, plugins, Runtime()).run()

    model = HovleForConditionalGeneration.from_pretrained(second.path / "final", dtype=torch.float32).eval()
    assert model.config.embedding_config.token_mixer == "fading"
    before = HovleForConditionalGeneration.from_pretrained(first.path / "final", dtype=torch.float32)
    mixers = [m.embedding.layers[0].self_attn.state_dict() for m in (before, model)]
    assert all(not torch.equal(mixers[1][name], tensor) for name, tensor in mixers[0].items())
    processor = HovleProcessor.from_pretrained(second.path / "final")
    inputs = processor(images=Image.new("RGB", (56, 56), "red"), text="<IMG_CONTEXT>")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


def test_a_wrong_name_is_told_before_the_llm_is_loaded(make_recipe, plugins):
    recipe = with_mixer(make_recipe, "distillation")
    recipe.model.embedding["token_mixer"] = "fadding"
    recipe.model.backbone.options["path"] = "/nowhere"
    with pytest.raises(ValueError, match="there is no token_mixer 'fadding'; did you mean 'fading'"):
        Trainer(recipe, plugins, Runtime()).prepare()


def test_a_plan_counts_it_by_its_length(make_recipe, plugins):
    """Attention's operations grow with the square of a sample's length, the mixer's do not."""

    def forward(mixer: str, sample: int) -> float:
        recipe = with_mixer(make_recipe, "alignment")
        recipe.model.embedding["token_mixer"] = mixer
        stage = plugins.registry.build("stage", "alignment", recipe=recipe, registry=plugins.registry)
        return row_cost(meta_module(stage, plugins), Row(1024, sample, 0, 8), torch.float32, False).forward

    llm = forward("attention", 1024) - forward(
        "attention", 256
    )  # both stacks: two blocks and two layers alike
    assert forward("fading", 1024) - forward("fading", 256) == pytest.approx(llm / 2)
