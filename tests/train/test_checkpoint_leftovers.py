"""What a killed process was about to write is as large as the weights: the next start drops it, and nothing else."""

import pytest

from hovle_train.loop import Trainer
from hovle_train.runs import is_finished
from hovle_train.runtime import Runtime

LEFT = (
    ".final-1/final",
    ".fetching-1/final",
    "checkpoints/.writing-00000003-1",
    "checkpoints/.fetching-1/step-00000003",
)


def leave(run_dir):
    for name in LEFT:
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "model.safetensors").write_bytes(b"half of it")


def left(run_dir):
    return [path for path in run_dir.rglob(".*") if path.is_dir()]


def test_leftovers_go_where_a_run_is_resumed_and_where_it_is_finished(make_recipe, plugins, run_killed_after):
    recipe = make_recipe("alignment")
    run_killed_after(Trainer(recipe, plugins, Runtime()), 4)
    leave(recipe.path)
    trainer = Trainer(recipe, plugins, Runtime())
    resumed = []
    inner = trainer.resume
    trainer.resume = lambda: resumed.append((inner(), left(recipe.path))) or resumed[-1][0]
    trainer.run()
    assert resumed == [(4, [])], "from its newest checkpoint, which is no leftover"
    leave(recipe.path)
    before = sorted((recipe.path / "final").iterdir())
    Trainer(recipe, plugins, Runtime()).run()
    assert left(recipe.path) == []
    assert sorted((recipe.path / "final").iterdir()) == before


def test_an_export_that_fails_leaves_nothing(make_recipe, plugins):
    """Of the average either, which is written first."""
    recipe = make_recipe("alignment", train={"steps": 2}, optim={"ema": {"decay": 0.9, "export": "beside"}})
    trainer = Trainer(recipe, plugins, Runtime())
    written = []

    def export(module, processor, folder):
        written.append(folder.name)
        if folder.name == "final":
            raise MemoryError
        (folder / "model.safetensors").write_bytes(b"whole")

    trainer.stage.export = export
    with pytest.raises(MemoryError):
        trainer.run()
    assert written == ["final_ema", "final"]
    assert left(recipe.path) == []
    assert not (recipe.path / "final_ema").exists()
    assert not is_finished(recipe.path)
