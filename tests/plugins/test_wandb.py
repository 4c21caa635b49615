"""hovle-wandb, offline: a run leaves its files in its own folder, and a later one does not add to them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import wandb

from hovle_core.plugins import load_plugins
from hovle_wandb import plugin, tracker


@dataclass(frozen=True)
class Run:
    dir: Path
    recipe: dict = field(default_factory=dict)

    @property
    def final(self) -> Path:
        return self.dir / "final"


@pytest.fixture
def hook(monkeypatch):
    monkeypatch.setenv("HOVLE_PLUGINS", "")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    manager = load_plugins().manager
    manager.register(plugin)
    yield manager.hook
    wandb.finish()


def test_a_run_leaves_an_offline_wandb_run(hook, tmp_path):
    run = Run(tmp_path, {"seed": 3})
    hook.hovle_on_log(run=run, step=9, metrics={"loss": 2.0})
    assert wandb.run.id == tracker._id(run)
    assert dict(wandb.run.config) == {"seed": 3}
    hook.hovle_on_checkpoint(run=run, step=9, path=tmp_path / "checkpoints" / "step-9")
    assert wandb.run is not None
    hook.hovle_on_checkpoint(run=run, step=19, path=run.final)
    assert wandb.run is None, "finished with the run"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(name.endswith(".wandb") for name in os.listdir(folder))


def test_disabled_it_writes_nothing(hook, tmp_path):
    run = Run(tmp_path, {"observers": {"wandb": "disabled"}})
    hook.hovle_on_log(run=run, step=9, metrics={"loss": 2.0})
    hook.hovle_on_checkpoint(run=run, step=9, path=run.final)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked_and_the_recipe_goes_before_the_environment(tmp_path, monkeypatch):
    def of(wandb, **recipe):
        return tracker.settings(Run(tmp_path, {"observers": {"wandb": wandb}, **recipe}))

    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert of({}) == tracker.settings(Run(tmp_path)) == {"mode": "disabled", "project": "hovle"}
    assert of({"mode": "online", "project": "x"}) == {"mode": "online", "project": "x"}
    with pytest.raises(ValueError, match="has no 'projekt'; did you mean 'project'"):
        of({"projekt": "x"})
    with pytest.raises(ValueError, match="mode is 'of': give one of offline, online, disabled"):
        of("of")
