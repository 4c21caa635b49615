"""Of checkpoints the one just written always stays, and what says that it is newer goes: it was not good enough."""

import pytest
import torch

from hovle_train import checkpoint
from hovle_train.storage import RemoteRun

TENSORS = {name: {"w": torch.ones(2)} for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)}


def save(folder, step, keep, state=None):
    return checkpoint.save(folder, step, TENSORS, state or {}, keep)


def names(folder):
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def damage(path, whole_size):
    content = bytearray((path / checkpoint.MODEL).read_bytes())
    content[-1] ^= 1
    (path / checkpoint.MODEL).write_bytes(content if whole_size else content[:-1])


@pytest.mark.parametrize("whole_size", [True, False])
@pytest.mark.parametrize(("keep", "left"), [(1, [2]), (2, [1, 2]), (3, [1, 2])])
def test_a_run_that_had_to_step_back_keeps_what_it_writes(tmp_path, keep, left, whole_size):
    for step in (8, 10):
        damage(save(tmp_path, step, 5), whole_size)
    save(tmp_path, 1, 5)
    for step in (8, 10):
        damage(save(tmp_path, step, 5), whole_size)
    path = save(tmp_path, 2, keep)
    assert names(tmp_path) == left
    assert checkpoint.newest(tmp_path) == path


def test_a_torn_one_is_not_counted(tmp_path):
    save(tmp_path, 1, 2)
    damage(save(tmp_path, 2, 2), whole_size=False)
    save(tmp_path, 3, 2)
    assert names(tmp_path) == [1, 3]


def test_a_store_keeps_what_was_copied_last(make_recipe, tmp_path):
    """One machine died while it copied step 10, and the next one goes on behind 8."""
    store, here = RemoteRun(str(tmp_path / "store")), tmp_path / "run" / "checkpoints"
    (here.parent / "metrics.jsonl").parent.mkdir()
    (here.parent / "metrics.jsonl").write_text("")
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "other"))
    state = {"recipe": recipe.model_dump(mode="json")}
    for step in (8, 10):
        store.push(save(here, step, 1, state), here.parent, keep=1 if step == 8 else 2)
    copies = tmp_path / "store" / "checkpoints"
    (copies / "step-00000010" / checkpoint.STATE).unlink()
    store.push(save(here, 9, 1, state), here.parent, keep=1)
    assert names(copies) == [9]
    store.pull(recipe)
    assert names(tmp_path / "other" / "checkpoints") == [9]
