"""Plugins that changed since a checkpoint was written are named when it is loaded: on resuming, and as a parent."""

import json
import logging

from hovle_train.checkpoint import STATE, complete_checkpoints
from hovle_train.loop import Trainer
from hovle_train.runs import RUN_CARD
from hovle_train.runtime import Runtime

CHANGED = "plugin 'train' was hovle-train 0.0.1 when the checkpoint was written and is hovle-train "
GONE = "plugin 'gone' was gone 1.0 when the checkpoint was written and is not loaded now"


def age(path) -> None:
    content = json.loads(path.read_text())
    content["plugins"] |= {"train": "hovle-train 0.0.1", "gone": "gone 1.0"}
    content.pop("digest", None)  # as an older release left it
    path.write_text(json.dumps(content))


def warnings(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_a_resumed_run_names_them(make_recipe, plugins, caplog) -> None:
    recipe = make_recipe("alignment", train={"steps": 3, "checkpoint_every": 1})
    first = Trainer(recipe, plugins, Runtime())
    first.prepare()
    first.save(0, {})
    assert "when the checkpoint was written" not in warnings(caplog)
    age(complete_checkpoints(first.checkpoints)[-1] / STATE)
    second = Trainer(recipe, plugins, Runtime())
    second.prepare()
    assert second.resume() == 1
    assert CHANGED in warnings(caplog)
    assert GONE in warnings(caplog)


def test_a_run_names_them_of_its_parent(make_recipe, plugins, caplog, tmp_path) -> None:
    parent = make_recipe("alignment", run_dir=str(tmp_path / "parent"), train={"steps": 1})
    Trainer(parent, plugins, Runtime()).run()
    model = {"init_from": str(parent.path), "backbone": None, "embedding": {}, "image": {}}
    child = make_recipe("instruction_tuning", model=model)
    Trainer(child, plugins, Runtime()).prepare()
    assert "when the checkpoint was written" not in warnings(caplog)
    age(parent.path / "final" / RUN_CARD)
    Trainer(child, plugins, Runtime()).prepare()
    assert f"{parent.path}: {CHANGED}" in warnings(caplog)
    assert GONE in warnings(caplog)
