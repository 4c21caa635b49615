"""hovle-lora: adapters train in place of the weights under them, are saved as peft reads them, and are merged into a
plain HoVLE at the end."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hovle_core import HovleForConditionalGeneration
from hovle_core.cli import main
from hovle_data.quarantine import Ledger
from hovle_train.build import build_hovle
from hovle_train.loop import Trainer
from hovle_train.runs import is_finished
from hovle_train.runtime import Runtime
from hovle_train.stages.base import model_inputs

ALONE = {
    "r": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "freeze": ["embedding.", "language_model."],
}  # fmt: skip


def run(recipe, plugins) -> tuple[dict, dict]:
    """The weights before and after."""
    trainer = Trainer(recipe, plugins, Runtime())
    before = {name: p.detach().clone() for name, p in trainer.stage.build()[0].named_parameters()}
    Trainer(recipe, plugins, Runtime()).run()
    model = HovleForConditionalGeneration.from_pretrained(recipe.path / "final")
    return before, dict(model.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_train_and_are_merged(make_recipe, plugins, precision):
    recipe = make_recipe("instruction_tuning", train={"steps": 4, "precision": precision})
    recipe.model.wrappers = {"lora": {"r": 4}}
    before, after = run(recipe, plugins)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    in_llm = {name for name in changed if name.startswith("language_model.")}
    assert {name.split(".")[-2] for name in in_llm} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for name in in_llm:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3) <= 4, name
    assert "embedding.patch_embed.patch_embedding.weight" in changed


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_alone_are_saved_merged_and_resumed(
    precision, make_recipe, plugins, tmp_path, run_killed_after
):
    """peft is the oracle: the adapter on the model that the run started from is the finished model."""

    def recipe(name):
        sections = {"train": {"precision": precision, "steps": 4}, "optim": {"lr": 5e-2}}
        made = make_recipe("instruction_tuning", run_dir=str(tmp_path / name), **sections)
        made.model.wrappers = {"lora": ALONE}
        return made

    whole = Trainer(recipe("whole"), plugins, Runtime())
    whole.run()
    broken = Trainer(recipe("broken"), plugins, Runtime())
    run_killed_after(broken, 3)
    assert not is_finished(broken.recipe.path)
    kept = load_file(next((broken.recipe.path / "checkpoints").glob("step-*")) / "model.safetensors")
    assert all(".lora_" in name for name in kept), "a checkpoint holds what trains"
    Trainer(recipe("broken"), plugins, Runtime()).run()
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / run / "final" / name) for run in ("whole", "broken"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name

    final = tmp_path / "whole" / "final"
    base, processor = build_hovle(whole.recipe.model, plugins.registry, whole.recipe.seed)
    (batch, *_) = whole.loader(Ledger()).batches(0)
    inputs = model_inputs(batch, processor)
    with torch.no_grad():
        plain = base.eval()(**inputs).logits
        adapted = PeftModel.from_pretrained(base, final / "adapter").eval()(**inputs).logits
        exported = HovleForConditionalGeneration.from_pretrained(final).eval()(**inputs).logits
    torch.testing.assert_close(exported, adapted, atol=1e-4, rtol=1e-4)
    assert (exported - plain).abs().max() > 0.05
    after = load_file(final / "model.safetensors")
    untouched = [name for name in after if "q_proj" not in name and "v_proj" not in name]
    assert len(untouched) > 10
    fresh, _ = build_hovle(whole.recipe.model, plugins.registry, whole.recipe.seed)
    assert all(torch.equal(fresh.state_dict()[name], after[name]) for name in untouched)


def test_an_average_beside_has_adapters_of_its_own(make_recipe, plugins):
    recipe = make_recipe("instruction_tuning", optim={"ema": {"decay": 0.5, "export": "beside"}})
    recipe.model.wrappers = {"lora": {"r": 2}}
    Trainer(recipe, plugins, Runtime()).run()
    plain, averaged = (
        [
            load_file(recipe.path / folder / name)
            for name in ("model.safetensors", "adapter/adapter_model.safetensors")
        ]
        for folder in ("final", "final_ema")
    )
    for a, b in zip(plain, averaged, strict=True):
        assert a.keys() == b.keys()
        assert any(not torch.equal(a[name], b[name]) for name in a)
    assert not any("lora" in name for name in plain[0])


def test_the_embedding_learns_to_see_through_adapters(make_recipe, plugins):
    """In distillation the module has a head around the HoVLE: names are the HoVLE's."""
    options = {"teacher": {"name": "grid"}, "match_norms": False}
    recipe = make_recipe("distillation", options, train={"steps": 2})
    target = r"embedding\.layers\..*(o|down)_proj"  # new blocks end in zeros: these learn first
    recipe.model.wrappers = {"lora": {"r": 2, "target_modules": target, "freeze": ["embedding."]}}
    Trainer(recipe, plugins, Runtime()).run()
    tensors = load_file(recipe.path / "final" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.embedding.layers.0.self_attn.o_proj.lora_A.weight" in tensors
    before, _ = build_hovle(recipe.model, plugins.registry, recipe.seed)
    after = HovleForConditionalGeneration.from_pretrained(recipe.path / "final").state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[-2] for name in changed} == {"o_proj", "down_proj"}


def test_nothing_is_said_before_a_step(make_recipe, plugins, tmp_path):
    """Adapters begin at zero: the first loss is that of the model without them."""
    losses = []
    for wrappers in ({}, {"lora": {}}):
        recipe = make_recipe("instruction_tuning", run_dir=str(tmp_path / str(len(losses))))
        recipe.model.wrappers = wrappers
        trainer = Trainer(recipe, plugins, Runtime())
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
        ({"lora": {"target_modules": ["nothing"]}}, r"\['nothing'\] matches no module; there are"),
        ({"lora": {"freeze": ["llm."]}}, "freeze 'llm.' matches no parameter; there are"),
    ],
)
def test_settings_are_checked(make_recipe, plugins, wrappers, message):
    recipe = make_recipe("instruction_tuning")
    recipe.model.wrappers = wrappers
    with pytest.raises(ValueError, match=message):
        Trainer(recipe, plugins, Runtime()).prepare()


def test_a_wrapper_that_is_not_there_is_an_error_of_the_resolved_recipe(make_recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe("instruction_tuning", model={"wrappers": {"lorra": {}}}).to_yaml())
    assert main(["train", str(path), "--print-config"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err
