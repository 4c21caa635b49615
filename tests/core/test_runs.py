"""Who names a run gets its checkpoint, or is told what to do."""

import pytest

from hovle_core.runs import is_finished, latest_checkpoint, resolve_checkpoint


def finish(run):
    (run / "final").mkdir(parents=True)
    (run / "final" / "config.json").write_text("{}")


def start(run):
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text("")


def test_a_checkpoint_a_finished_run_and_a_hub_id(tmp_path):
    finish(tmp_path / "run")
    assert is_finished(tmp_path / "run")
    for resolve in (resolve_checkpoint, latest_checkpoint):
        assert resolve(str(tmp_path / "run")) == str(tmp_path / "run" / "final")
        assert resolve(str(tmp_path / "run" / "final")) == str(tmp_path / "run" / "final")
        assert resolve("OpenGVLab/HoVLE") == "OpenGVLab/HoVLE"
        assert resolve("gpt2") == "gpt2"


def test_a_run_that_has_not_finished_says_how_to_go_on(tmp_path):
    start(tmp_path / "run")
    assert not is_finished(tmp_path / "run")
    for resolve in (resolve_checkpoint, latest_checkpoint):
        with pytest.raises(
            ValueError, match=r"has not finished: resume it with `hovle train .*run/recipe.yaml`"
        ):
            resolve(str(tmp_path / "run"))


def test_the_last_finished_stage_speaks_for_a_folder_of_runs(tmp_path):
    for stage in ("distillation", "alignment", "instruction_tuning"):
        start(tmp_path / stage)
        with pytest.raises(ValueError) if stage == "distillation" else _nothing():
            latest_checkpoint(str(tmp_path))
        finish(tmp_path / stage)
        assert latest_checkpoint(str(tmp_path)) == str(tmp_path / stage / "final")
    assert resolve_checkpoint(str(tmp_path)) == str(tmp_path)  # training never guesses a stage


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_a_folder_whose_stages_have_not_finished(tmp_path):
    start(tmp_path / "distillation")
    start(tmp_path / "alignment")
    with pytest.raises(
        ValueError, match="no stage .* has finished: resume alignment with `hovle train .*alignment/"
    ):
        latest_checkpoint(str(tmp_path))


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (str(tmp_path / "none"), "./none", "runs/none", "../none", "a/b/c", ""):
        with pytest.raises(ValueError, match="no such folder|is neither"):
            latest_checkpoint(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        latest_checkpoint("file")
    with pytest.raises(ValueError, match="neither a checkpoint"):
        latest_checkpoint("runs")
