"""hovle-lora: adapters train in place of the LLM's weights, and the finished checkpoint is a plain HoVLE."""

import pytest
import torch

from hovle_core import HovleForConditionalGeneration
from hovle_core.plugins import load_plugins
from hovle_data.quarantine import Ledger
from hovle_train.loop import Trainer
from hovle_train.runtime import Runtime


@pytest.fixture(scope="module")
def loaded():
    return load_plugins()


def run(recipe, plugins) -> tuple[dict, dict]:
    """The weights before and after."""
    trainer = Trainer(recipe, plugins, Runtime())
    before = {name: p.detach().clone() for name, p in trainer.stage.build()[0].named_parameters()}
    Trainer(recipe, plugins, Runtime()).run()
    model = HovleForConditionalGeneration.from_pretrained(recipe.path / "final")
    return before, dict(model.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_train_and_are_merged(make_recipe, loaded, precision):
    recipe = make_recipe("instruction_tuning", train={"steps": 4, "precision": precision})
    recipe.model.wrappers = {"lora": {"r": 4}}
    before, after = run(recipe, loaded)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    in_llm = {name for name in changed if name.startswith("language_model.")}
    assert {name.split(".")[-2] for name in in_llm} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for name in in_llm:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3) <= 4, name
    assert "embedding.patch_embed.patch_embedding.weight" in changed


def test_a_resumed_run_goes_on_with_its_adapters(make_recipe, loaded, tmp_path):
    recipes = []
    for name in ("whole", "killed"):
        recipe = make_recipe("instruction_tuning", train={"steps": 4}, run_dir=str(tmp_path / name))
        recipe.model.wrappers = {"lora": {"r": 2, "dropout": 0.1}}
        recipes.append(recipe)
    Trainer(recipes[0], loaded, Runtime()).run()
    killed = Trainer(recipes[1], loaded, Runtime())
    with pytest.MonkeyPatch.context() as patch:
        step = killed.step
        patch.setattr(killed, "step", lambda s, b: step(s, b) if s < 3 else pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            killed.run()
    assert (tmp_path / "killed" / "checkpoints").is_dir()
    Trainer(recipes[1], loaded, Runtime()).run()
    a, b = (HovleForConditionalGeneration.from_pretrained(recipe.path / "final") for recipe in recipes)
    assert all(torch.equal(p, dict(b.named_parameters())[name]) for name, p in a.named_parameters())


def test_nothing_is_said_before_a_step(make_recipe, loaded, tmp_path):
    """Adapters begin at zero: the first loss is that of the model without them."""
    losses = []
    for wrappers in ({}, {"lora": {}}):
        recipe = make_recipe("instruction_tuning", run_dir=str(tmp_path / str(len(losses))))
        recipe.model.wrappers = wrappers
        trainer = Trainer(recipe, loaded, Runtime())
        trainer.prepare()
        losses.append(trainer.step(0, trainer.loader(Ledger()).batches(0))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("wrappers", "message"),
    [
        ({"lorra": {}}, "no installed plugin of that name wraps models; did you mean 'lora'"),
        ({"lora": {"rank": 4}}, "model.wrappers.lora has no 'rank'"),
        ({"lora": {"r": 0}}, "must be a rank of at least 1, got 0"),
        ({"lora": {"target_modules": "nothing"}}, "'nothing' matches no module; there are"),
    ],
)
def test_settings_are_checked(make_recipe, loaded, wrappers, message):
    recipe = make_recipe("instruction_tuning")
    recipe.model.wrappers = wrappers
    with pytest.raises(ValueError, match=message):
        Trainer(recipe, loaded, Runtime()).prepare()
