"""`hovle runs`: the table, the lineage of a run, and curves as PNG and HTML."""

import io
import json
import re
import shutil

import pytest
from PIL import Image

from hovle_core.cli import main
from hovle_train.failure import noting_failure
from hovle_train.lock import LOCK_FILE, alone_in
from hovle_train.loop import Trainer
from hovle_train.run_table import RunInfo, find_runs
from hovle_train.runs import FAILED_FILE, read_summary
from hovle_train.runtime import Runtime


@pytest.fixture
def two_runs(make_recipe, plugins, tmp_path):
    """A finished alignment, and an instruction tuning from it that stopped behind its checkpoint of step 1."""
    parent = make_recipe("alignment", run_dir=str(tmp_path / "runs" / "first"), train={"steps": 3})
    Trainer(parent, plugins, Runtime(), commit="abc123").run()
    model = {"init_from": str(parent.path), "backbone": None, "embedding": {}, "image": {}}
    child = make_recipe("instruction_tuning", run_dir=str(tmp_path / "runs" / "more" / "second"), model=model)
    trainer = Trainer(child, plugins, Runtime())
    inner = trainer.step
    trainer.step = lambda step, batches: inner(step, batches) if step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    return parent, child


def test_runs_tell_of_themselves(two_runs, tmp_path, capsys):
    parent, child = two_runs
    assert main(["runs", "list", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if "/first" in line]
    (second,) = [line for line in lines if "/second" in line]
    assert "finished" in first
    assert f"{read_summary(parent.path)['tokens']:,}" in first
    assert "stopped at step 3 of 6" in second

    assert main(["runs", "show", str(child.path)]) == 0
    shown = capsys.readouterr().out
    weights = read_summary(parent.path)
    assert re.search(r"lineage +│ second \(\w{12}\) <- first \(\w{12}\)", shown)
    assert re.search(r"data.sources.0 +│ \S+/chats: 24 samples, sha256 \w{12}", shown)
    assert "train = hovle-train" in shown
    assert weights["commit"] == "abc123"
    assert main(["runs", "show", str(parent.path)]) == 0
    assert "abc123" in capsys.readouterr().out


def test_running_stopped_and_failed_runs_are_told_apart(two_runs, make_recipe, tmp_path, capsys):
    _, child = two_runs

    def shown(command: str, run_dir: str) -> str:
        capsys.readouterr()
        assert main(["runs", command, run_dir]) == 0
        return capsys.readouterr().out

    with alone_in(child.path):
        assert "running, step 3 of 6" in shown("list", child.run_dir)
    (child.path / LOCK_FILE).touch()  # as a killed process leaves it
    assert "stopped at step 3 of 6" in shown("list", child.run_dir)

    wild = make_recipe("alignment", run_dir=str(tmp_path / "wild"), optim={"lr": 1e30, "grad_clip": None})
    path = tmp_path / "wild.yaml"
    path.write_text(wild.to_yaml())
    assert main(["train", str(path), "--local"]) == 2
    assert re.search(r"failed at step \d of 6", shown("list", wild.run_dir))
    assert re.search(r"error +│ step \d: loss or gradient is not finite", shown("show", wild.run_dir))
    # Whoever starts it again has another chance.
    shutil.rmtree(wild.path / "checkpoints", ignore_errors=True)
    assert main(["train", str(path), "--local", "--set", "optim.lr=1e-3"]) == 0
    assert "finished" in shown("show", wild.run_dir)
    assert not (wild.path / FAILED_FILE).exists()


def test_who_is_refused_leaves_nothing_in_another_s_run(two_runs, tmp_path, capsys, monkeypatch):
    _, child = two_runs
    monkeypatch.setattr("hovle_train.lock.LOCK_SECONDS", 0.2)
    path = tmp_path / "again.yaml"
    path.write_text(child.to_yaml())
    with alone_in(child.path):
        assert main(["train", str(path), "--local"]) == 2
    assert "another process trains in" in capsys.readouterr().err
    assert main(["runs", "list", child.run_dir]) == 0
    assert "stopped at step 3 of 6" in capsys.readouterr().out


def test_a_failure_is_noted_whatever_it_says(tmp_path):
    for error, noted in (
        (ValueError("no such file: '\udcff'"), "no such file: '\\udcff'"),
        (AssertionError(), "AssertionError: "),
    ):
        with pytest.raises(type(error)), noting_failure(tmp_path):
            raise error
        assert RunInfo(tmp_path).error == noted
        assert [p.name for p in tmp_path.iterdir()] == [FAILED_FILE]
    with pytest.raises(ValueError, match="gone"), noting_failure(tmp_path / "none"):
        raise ValueError("the folder is gone")


def test_curves_are_a_picture_and_a_page_that_loads_nothing(two_runs, tmp_path, capsys):
    out = tmp_path / "curves"
    assert main(["runs", "plot", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "curves.png"), str(out / "curves.html")]
    with Image.open(io.BytesIO((out / "curves.png").read_bytes())) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
        assert picture.width > picture.height > 300
    assert (31, 119, 180) in colours, "a line is drawn"
    page = (out / "curves.html").read_text()
    assert "abc123" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    sources = page.count("data:image/svg+xml;base64,")
    assert sources == 1


def test_what_is_no_run_is_said(tmp_path, capsys):
    for command, message in (
        (["list", str(tmp_path / "none")], "no such folder"),
        (["list", str(tmp_path)], "holds no run"),
        (["show", str(tmp_path)], "is no run"),
    ):
        assert main(["runs", *command]) == 2
        assert message in capsys.readouterr().err


def test_one_damaged_run_hides_no_other(two_runs, tmp_path, capsys):
    for name, content in (("empty", ""), ("torn", "stage: {name: al"), ("other", "[1, 2]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(content)
    assert main(["runs", "list", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("is damaged") == 3
    assert shown.count("finished") == 1
    assert "step 3 of" in shown
    assert len(find_runs(tmp_path)) == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("recipe.yaml", b"{}"),
        ("recipe.yaml", b"stage: null\ntrain: {}"),
        ("recipe.yaml", b"stage: {name: alignment}\ntrain: {steps: many}"),
        ("final/hovle_run.json", b'{"parent": '),
        ("final/hovle_run.json", b"[]"),
        ("final/hovle_run.json", b'{"tokens": 5, "plugins": null, "data_manifest": []}'),
        ("final/hovle_run.json", b'{"tokens": "many", "seconds": null}'),
        ("metrics.jsonl", b'{"step": 0, "loss": "small"}\n'),
        ("metrics.jsonl", b'\xff\n["no"]\n{"loss": 1}\n{"step": 0, "loss": 1.0}\n'),
    ],
)
def test_a_damaged_file_hides_neither_its_run_nor_others(two_runs, tmp_path, capsys, file, content):
    (tmp_path / "runs" / "first" / file).write_bytes(content)
    (tmp_path / "runs" / "latest").symlink_to(tmp_path / "runs")
    for command in ("list", "show", "plot"):
        assert main(["runs", command, str(tmp_path / "runs")]) == 0
        shown = capsys.readouterr().out
        assert ("curves" if command == "plot" else "stopped at step 3 of") in shown
    for command in ("show", "plot"):
        assert main(["runs", command, str(tmp_path / "runs" / "first")]) == 0
    assert "/first" in capsys.readouterr().out
    assert len(find_runs(tmp_path / "runs")) == 2


@pytest.mark.parametrize("content", ["stages: [", "run_dir: x", "[1]"])
def test_a_damaged_pipeline_is_named(tmp_path, capsys, content):
    (tmp_path / "pipeline.yaml").write_text(content)
    assert main(["runs", "show", str(tmp_path)]) == 2
    assert f"{tmp_path / 'pipeline.yaml'} is damaged" in capsys.readouterr().err


def test_a_run_that_logged_nothing_has_no_curves(make_recipe, tmp_path, capsys):
    recipe = make_recipe("alignment")
    recipe.path.mkdir()
    (recipe.path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["runs", "plot", str(recipe.path)]) == 2
    assert "no metrics yet" in capsys.readouterr().err
    (recipe.path / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": None, "lr": 1e-3}) + "\n")
    assert main(["runs", "plot", str(recipe.path)]) == 0, "a loss that is no number is a gap"
