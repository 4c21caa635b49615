"""A node that Ray is about to take away; by a real Ray in test_ray_cluster.py."""

from hovle_train import notice
from hovle_train.checkpoint import complete_checkpoints, read_state
from hovle_train.loop import Trainer
from hovle_train.runtime import Runtime


def test_a_notice_makes_one_checkpoint_and_is_not_asked_for_again(
    make_recipe, plugins, monkeypatch, run_killed_after
):
    monkeypatch.setattr(notice, "LOOK_SECONDS", 0)
    answers = iter([False, False, True])  # a fourth question would raise StopIteration
    recipe = make_recipe("alignment", train={"steps": 9, "checkpoint_every": 100})
    run_killed_after(Trainer(recipe, plugins, Runtime(is_losing_node=lambda: next(answers))), 8)
    (saved,) = complete_checkpoints(recipe.path / "checkpoints")
    assert read_state(saved)["step"] == 2


def test_ray_is_asked_only_now_and_then(make_recipe, plugins, monkeypatch):
    monkeypatch.setattr(notice, "LOOK_SECONDS", 3600)
    asked = []
    recipe = make_recipe("alignment", train={"steps": 3})
    Trainer(recipe, plugins, Runtime(is_losing_node=lambda: bool(asked.append(1)))).run()
    assert not asked
