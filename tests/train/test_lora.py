"""LoRA instruction tuning: only adapters train, they are saved, and the export is them merged: peft is the oracle."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hovle_core import HovleForConditionalGeneration
from hovle_data.quarantine import Ledger
from hovle_train.build import build_hovle
from hovle_train.loop import Trainer
from hovle_train.runs import is_finished
from hovle_train.runtime import Runtime
from hovle_train.stages.base import model_inputs

LORA = {"lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}}


class Killed(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_are_saved_merged_and_resumed(precision, make_recipe, plugins, tmp_path):
    def recipe(name):
        train, optim = {"precision": precision}, {"lr": 5e-2}
        return make_recipe("instruction_tuning", LORA, run_dir=str(tmp_path / name), train=train, optim=optim)

    whole = Trainer(recipe("whole"), plugins, Runtime())
    whole.run()
    broken = Trainer(recipe("broken"), plugins, Runtime())
    done = broken.step

    def step(number, batches):
        if number == 3:
            raise Killed
        return done(number, batches)

    broken.step = step
    with pytest.raises(Killed):
        broken.run()
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


def test_options_are_checked(make_recipe, plugins):
    def prepare(stage, **lora):
        Trainer(make_recipe(stage, {"lora": lora}), plugins, Runtime()).prepare()

    with pytest.raises(ValueError, match="stage.options.lora: .*nothing_like_it"):
        prepare("instruction_tuning", target_modules=["nothing_like_it"])
    with pytest.raises(ValueError, match="lora.rank: unknown key"):
        prepare("instruction_tuning", rank=4)
    with pytest.raises(ValueError, match="lora: unknown key"):
        prepare("alignment", r=4)
