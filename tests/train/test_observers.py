"""W&B, offline: a run leaves its files in its own folder, and a later one does not add to them."""

import os

from hovle_train.loop import Trainer
from hovle_train.runtime import Runtime


def test_a_run_leaves_an_offline_wandb_run(make_recipe, plugins, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    recipe = make_recipe("alignment", observers={"wandb": "offline"})
    Trainer(recipe, plugins, Runtime()).run()
    (folder,) = (recipe.path / "wandb").glob("offline-run-*")
    assert any(name.endswith(".wandb") for name in os.listdir(folder))
    import wandb

    assert wandb.run is None, "finished with the run"
