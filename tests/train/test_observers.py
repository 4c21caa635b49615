"""An observer that raises is named, and costs the run nothing."""

import json
import logging
from types import ModuleType

import pytest
import yaml

from hovle_core.cli import main
from hovle_core.hookspecs import hookimpl
from hovle_core.plugins import load_plugins
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime


@pytest.fixture
def observed(plugins, monkeypatch):
    """The plugins with two more: one that raises at every call, and one behind it that listens."""
    loaded = load_plugins()
    loaded.registry._specs.update(plugins.registry._specs)
    broken, listener, heard = ModuleType("broken"), ModuleType("listener"), []

    @hookimpl
    def hovle_on_log(run, step, metrics):
        raise RuntimeError(f"no connection [{step}]")

    @hookimpl
    def hovle_on_checkpoint(path):
        raise SystemExit(1)

    broken.hovle_on_log, broken.hovle_on_checkpoint = hovle_on_log, hovle_on_checkpoint
    listener.hovle_on_log = hookimpl(lambda step: heard.append(step), specname="hovle_on_log")
    loaded.manager.register(broken, "broken")
    loaded.manager.register(listener, "listener")
    monkeypatch.setattr(
        type(loaded), "versions", property(lambda self: {"core": "hovle-core 1", "broken": "dist-broken 1.0"})
    )
    return loaded, heard


def test_a_run_outlives_an_observer(make_recipe, observed, caplog):
    plugins, heard = observed
    recipe = make_recipe("alignment", train={"steps": 4, "checkpoint_every": 2})
    with caplog.at_level(logging.WARNING):
        Trainer(recipe, plugins, Runtime()).run()
    named = [record for record in caplog.records if "observer 'broken'" in record.message]
    assert len(named) == 1
    assert "of dist-broken 1.0 failed" in named[0].message
    summary = json.loads((recipe.path / "summary.json").read_text())
    errors = summary["observer_errors"]["broken"]
    assert errors == {"count": 6, "first": "hovle_on_log: RuntimeError: no connection [0]"}
    assert heard == [0, 1, 2, 3]
    assert len(read_metrics(recipe.path / "metrics.jsonl")) == 4
    assert (recipe.path / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("observers", "message"),
    [
        ({"wandb": {"projct": "x"}}, "observers.wandb has no 'projct'; did you mean 'project'"),
        ({"wandb": "maybe"}, "observers.wandb.mode is 'maybe': give one of offline"),
        ({"wandb": [1]}, "observers.wandb is .1.: give a mode"),
        ({"tensorboard": "maybe"}, "observers.tensorboard is 'maybe', and it has no settings"),
    ],
)
def test_wrong_settings_are_refused_before_the_run(observers, message, make_recipe, plugins):
    with pytest.raises(ValueError, match=message):
        Trainer(make_recipe("alignment", observers=observers), plugins, Runtime())


@pytest.mark.parametrize("option", ["--dry-run", "--print-config", "--local"])
def test_wrong_settings_of_a_late_stage_are_refused_before_the_first(make_recipe, tmp_path, capsys, option):
    first = make_recipe("distillation").model_dump(mode="json", exclude_unset=True)
    common = {name: first.pop(name) for name in ("optim", "train")}
    first = {name: first[name] for name in ("model", "data")} | {
        "stage": {"options": first["stage"]["options"]}
    }
    last = {"data": {"sources": [{"path": "anywhere"}]}, "observers": {"wandb": {"projct": "x"}}}
    pipeline = {"run_dir": str(tmp_path / "runs"), "common": common,
                "stages": {"distillation": first, "alignment": last}}  # fmt: skip
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline))
    assert main(["train", str(path), option]) == 2
    assert "observers.wandb has no 'projct'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_settings_of_a_plugin_that_observes_nothing_are_refused(make_recipe, plugins):
    recipe = make_recipe("alignment", observers={"wandbb": {}})
    with pytest.raises(ValueError, match="observers.wandbb: no installed plugin .*did you mean 'wandb'"):
        Trainer(recipe, plugins, Runtime())
