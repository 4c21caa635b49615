"""The moving average of the weights: what it is, that a stop does not show in it, and where it is exported."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hovle_train.average import WeightAverage
from hovle_train.loop import Trainer
from hovle_train.runs import RUN_CARD, is_finished
from hovle_train.runtime import Runtime


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_an_average_by_hand():
    p = nn.Parameter(torch.tensor([0.0]))
    average = WeightAverage({"p": p}, decay=0.5)
    seen = []
    for step in range(12):
        with torch.no_grad():
            p.fill_(float(step % 3))
        average.update(step)
        seen.append(float(average.gather()["p"]))
    expected, value = [], 0.0
    for step in range(12):
        decay = (1 + step) / (10 + step) if step < 8 else 0.5
        value = decay * value + (1 - decay) * (step % 3)
        expected.append(value)
    assert seen == pytest.approx(expected, rel=1e-6)
    assert p.tolist() == [2.0]


def averaged_recipe(make_recipe, folder, precision, export="final"):
    ema = {"decay": 0.7, "export": export}
    return make_recipe("alignment", run_dir=str(folder), train={"precision": precision}, optim={"ema": ema})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_average_is_that_of_an_uninterrupted_run(
    precision, make_recipe, plugins, tmp_path, run_killed_after
):
    """And both are what is written down step by step, outside of the loop."""
    whole = Trainer(averaged_recipe(make_recipe, tmp_path / "whole", precision), plugins, Runtime())
    history, original = [], whole.save

    def note(step, *args):
        history.append({name: p.detach().clone() for name, p in whole.weights.masters.items()})
        original(step, *args)

    whole.save = note
    whole.run()
    broken = averaged_recipe(make_recipe, tmp_path / "broken", precision)
    trainer = Trainer(broken, plugins, Runtime())
    run_killed_after(trainer, 3)
    assert not is_finished(broken.path)
    Trainer(broken, plugins, Runtime()).run()
    a, b = weights_of(tmp_path / "whole" / "final"), weights_of(tmp_path / "broken" / "final")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = "embedding.layers.0.mlp.down_proj.weight"
    start = torch.zeros_like(history[0][name])  # where a new embedding's blocks begin
    for number, weights in enumerate(history):
        decay = min(0.7, (1 + number) / (10 + number))
        start = decay * start + (1 - decay) * weights[name]
    torch.testing.assert_close(a[name], start, atol=1e-7, rtol=1e-5)
    assert not torch.equal(a[name], history[-1][name])


def test_the_average_is_exported_beside_the_weights(make_recipe, plugins, tmp_path):
    """For distillation, whose export rescales what it writes: neither may see the other's."""
    exported = {}
    for export in (None, "final", "beside"):
        optim = {} if export is None else {"ema": {"decay": 0.7, "export": export}}
        recipe = make_recipe("distillation", run_dir=str(tmp_path / str(export)), optim=optim)
        Trainer(recipe, plugins, Runtime()).run()
        exported[export] = recipe.path
    raw, average = weights_of(exported[None] / "final"), weights_of(exported["final"] / "final")
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    for name, weights in raw.items():
        assert torch.equal(weights, weights_of(exported["beside"] / "final")[name]), name
        assert torch.equal(average[name], weights_of(exported["beside"] / "final_ema")[name]), name
    assert (exported["beside"] / "final_ema" / RUN_CARD).is_file()
    assert not (exported["final"] / "final_ema").exists()
