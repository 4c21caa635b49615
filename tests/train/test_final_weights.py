"""A finished checkpoint is finite, is what its run wrote whenever somebody starts from it, and lies in its folder."""

import json
import os

import pytest
import torch

from hovle_train.commands import dry_run, train
from hovle_train.failure import NonFiniteError
from hovle_train.lineage import check_finished, check_folder, check_run, checked_hash, weights_hash
from hovle_train.loop import Trainer
from hovle_train.runs import RUN_CARD, is_finished, read_summary
from hovle_train.runtime import Runtime

DAMAGED = (
    "weights in .*parent/final are not those that its run wrote.*: restore them, or delete .*parent and train"
)


@pytest.fixture
def parent(make_recipe, plugins, tmp_path):
    ema = {"decay": 0.9, "export": "beside"}
    recipe = make_recipe(
        "alignment", run_dir=str(tmp_path / "parent"), train={"steps": 2}, optim={"ema": ema}
    )
    Trainer(recipe, plugins, Runtime()).run()
    return recipe


@pytest.fixture
def child(make_recipe, parent, tmp_path):
    model = {"init_from": parent.run_dir, "backbone": None, "embedding": {}, "image": {}}
    return make_recipe("instruction_tuning", run_dir=str(tmp_path / "child"), model=model, train={"steps": 2})


def flip(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 0xFF
    (folder / "model.safetensors").write_bytes(content)


def forget(run):
    """What a release without the key left."""
    card = json.loads((run / "final" / RUN_CARD).read_text())
    del card["weights"]
    (run / "final" / RUN_CARD).write_text(json.dumps(card))


def test_damaged_weights_are_neither_trained_from_nor_called_finished(parent, child, plugins):
    assert read_summary(parent.path)["weights"] == checked_hash(parent.run_dir)
    flip(parent.path / "final")
    calls = (
        lambda: check_run(child, plugins.registry),
        lambda: dry_run(child, plugins),
        lambda: train(child, local=True),
        lambda: check_finished(parent),
        lambda: train(parent, local=True),
    )
    for call in calls:
        with pytest.raises(ValueError, match=DAMAGED):
            call()
    assert not (child.path / "final").exists()
    forget(parent.path)
    check_finished(parent)
    train(child, local=True)
    assert is_finished(child.path)


def test_the_average_beside_has_a_hash_of_its_own(parent):
    folder = parent.path / "final_ema"
    card = json.loads((folder / RUN_CARD).read_text())
    assert card["weights"] == checked_hash(str(folder)) != weights_hash(parent.run_dir)
    flip(folder)
    with pytest.raises(ValueError, match="weights in .*final_ema are not those"):
        checked_hash(str(folder))
    check_finished(parent)


def test_truncated_weights_without_a_hash_are_one_line(parent, child, plugins):
    weights = parent.path / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=DAMAGED):
        Trainer(child, plugins, Runtime()).run()
    forget(parent.path)
    with pytest.raises(
        ValueError, match="model.init_from .* is no folder or hub id that can be loaded: "
    ) as raised:
        Trainer(child, plugins, Runtime()).run()
    assert "\n" not in str(raised.value)


def test_weights_that_the_last_update_ruined_are_not_exported(make_recipe, plugins):
    recipe = make_recipe("alignment", optim={"ema": {"decay": 0.9, "export": "beside"}})
    trainer = Trainer(recipe, plugins, Runtime())
    step = trainer.step

    def ruined(number, batches):
        logged = step(number, batches)
        if number == recipe.train.steps - 1:
            with torch.no_grad():
                trainer.module.embedding.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        return logged

    trainer.step = ruined
    with pytest.raises(
        NonFiniteError, match="1 weights are not finite .*embedding.layers.1.mlp.up_proj.weight"
    ):
        trainer.run()
    assert not any((recipe.path / name).exists() for name in ("final", "final_ema", "summary.json"))
    assert list((recipe.path / "checkpoints").glob("step-*"))


def test_a_folder_that_is_no_place_for_a_run_is_refused(make_recipe, plugins, tmp_path, monkeypatch):
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "other"))
    check_folder(recipe)  # nothing is there yet
    (recipe.path / "final").mkdir(parents=True)
    (recipe.path / "final" / "thesis.txt").write_text("precious")
    for call in (lambda: check_run(recipe, plugins.registry), lambda: dry_run(recipe, plugins)):
        with pytest.raises(ValueError, match="other/final is there, and no finished run left it"):
            call()
    (recipe.path / "final" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no finished run left it"):  # without summary.json
        check_run(recipe, plugins.registry)
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(ValueError, match="run_dir .*file is a file; choose another"):
            check_folder(make_recipe("alignment", run_dir=str(tmp_path / path)))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"new: {tmp_path} is not writable"):
        check_folder(make_recipe("alignment", run_dir=str(tmp_path / "new")))
