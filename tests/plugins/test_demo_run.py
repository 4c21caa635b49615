"""The demo's own parts: recipes with its folders, the clock, the controls of its evaluation, and one tiny whole run."""

import json
import os
import time
from pathlib import Path

import pytest

from hovle_core.cli import main
from hovle_core.plugins import load_plugins
from hovle_data.schema import Sample
from hovle_demo import meters, run
from hovle_demo.evaluate import _shuffled, accuracy
from hovle_demo.meters import Clock, Memory


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


def test_recipes_get_the_demos_folders_and_overrides(plugins):
    def distillation(llm, overrides):
        return run.demo_pipeline(llm, Path("/x/out"), overrides, plugins.registry).recipes["distillation"]

    recipe = distillation("smollm2", ["distillation.train.steps=70"])
    assert recipe.run_dir == "/x/out/distillation"
    assert recipe.train.steps == 70
    assert recipe.model.backbone.options["path"] == "/x/out/prepared/smollm2"
    assert recipe.data.images[0].path == "/x/out/prepared/shards/images"
    small = distillation("small", ["alignment.train.steps=70"])
    assert small.model.backbone.options["path"] == "/x/out/language_modeling"
    assert small.train.steps != 70
    with pytest.raises(ValueError, match="must start with one of"):
        distillation("small", ["train.steps=7"])


@pytest.mark.parametrize("llm", run.PIPELINES)
@pytest.mark.parametrize("out", ["/x/a #b", "/x/a: b", "/x/'quoted", "runs/demo/runs/demo"])
def test_any_folder_name_is_kept(out, llm, plugins):
    recipes = run.demo_pipeline(llm, Path(out), [], plugins.registry).recipes
    assert recipes["alignment"].run_dir == f"{out}/alignment"
    assert recipes["alignment"].model.init_from == f"{out}/distillation"
    for recipe in recipes.values():
        data = recipe.data
        paths = [source.path for source in (*data.sources, *data.images, *data.texts)]
        assert all(path.startswith(f"{out}/prepared/shards/") for path in paths)


def test_a_mistake_in_an_override_is_found_before_any_work(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--set", "instruction_tuning.optim.lrr=1"]) == 2
    assert "lr" in capsys.readouterr().err
    assert not (out / "prepared").exists()


def test_what_fails_while_ray_starts_fails_the_demo():
    def fail():
        raise ValueError("package emoji is missing")

    with pytest.raises(ValueError, match="package emoji is missing"):
        run._in_a_thread(fail).result()
    assert run._in_a_thread(lambda: "manifest").result() == "manifest"


def test_the_clock_counts_interrupted_work_and_not_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(Clock, "IDLE_S", 0.03)
    clock = Clock(tmp_path / "phases.json")

    def interrupted() -> None:
        with clock.phase("a"):
            time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    again = Clock(tmp_path / "phases.json")
    with again.phase("a"):
        time.sleep(0.05)
    assert again.seconds["a"] >= 0.1
    before = again.seconds["a"]
    monkeypatch.setattr(Clock, "IDLE_S", 60)
    with Clock(tmp_path / "phases.json").phase("a"):
        pass  # found done
    assert Clock(tmp_path / "phases.json").seconds["a"] == before
    assert again.peak(2.0) == 2.0
    assert Clock(tmp_path / "phases.json").peak(1.0) == 2.0


def test_the_clock_knows_what_the_host_took(tmp_path, monkeypatch):
    taken = iter([10.0, 10.0 + 0.05 * os.cpu_count(), 20.0, 20.0])
    monkeypatch.setattr(meters, "_stolen_s", lambda: next(taken))
    clock = Clock(tmp_path / "phases.json")
    for name in "ab":
        with clock.phase(name):
            time.sleep(0.1)
    assert Clock(tmp_path / "phases.json").steal_share == pytest.approx(
        0.05 / sum(clock.seconds.values()), rel=0.01
    )
    assert run._taken({"steal_share": 0.25}) == "; the host took 25% of the cores' time"
    assert run._taken({"steal_share": 0.01}) == run._taken({}) == ""


def test_memory_sees_this_process(monkeypatch):
    monkeypatch.setattr(Memory, "INTERVAL_S", 0.05)
    with Memory() as memory:
        deadline = time.monotonic() + 60
        while not memory.peak_gib and time.monotonic() < deadline:
            time.sleep(0.05)
    assert 0.01 < memory.peak_gib < 24


def test_shuffling_gives_every_question_another_picture():
    samples = [
        Sample(
            f"k{i}", (bytes([i // 2]),), messages=({"role": "user", "content": "?"},), meta={"answer": str(i)}
        )
        for i in range(10)
    ]
    moved = _shuffled(samples, seed=0)
    assert all(a.images != b.images for a, b in zip(samples, moved, strict=True))
    assert [s.key for s in moved] == [s.key for s in samples]
    assert moved[0].images == moved[1].images, "questions of one picture move together"
    assert {s.images for s in moved} == {s.images for s in samples}
    assert _shuffled(samples, seed=0) == moved


def test_accuracy_takes_whole_answers():
    samples = [Sample("a", text="x", meta={"answer": "Red"}), Sample("b", text="x", meta={"answer": "no"})]
    assert accuracy(["red", "not"], samples) == 0.5


def test_the_whole_demo_runs_small_and_again_at_once(tmp_path, capsys, monkeypatch):
    """Real data and teacher, every stage for a few steps in this process; the second start only prints."""
    from hovle_demo import evaluate, prepare

    original = prepare.prepare
    monkeypatch.setattr(run, "prepare", lambda *a, **k: original(*a, limit=120, **k))
    monkeypatch.setattr(evaluate, "NUM_YES_NO", 20)
    monkeypatch.setattr(evaluate, "NUM_SHUFFLED", 20)
    out = tmp_path / "demo"
    short = {"train.steps": 3, "optim.warmup_steps": 0}
    steps = [f"{stage}.{key}={value}" for stage in run.STAGES for key, value in short.items()]
    small = [f"{stage}.observers.wandb=disabled" for stage in run.STAGES]
    arguments = ["demo", "--local", "--out", str(out), *(x for o in [*steps, *small] for x in ("--set", o))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "hovle chat" in printed
    results = json.loads((out / "results.json").read_text())
    wanted = {"easy_vqa_open", "easy_vqa_open_shuffled", "easy_vqa_yes_no", "wall_s", "peak_rss_gib"}
    assert wanted <= results.keys()
    assert 0 < results["peak_rss_gib"] < 8
    assert 0 <= results["steal_share"] < 1
    assert set(results["stages"]) == set(run.STAGES)
    report = (out / "report.html").read_text()
    assert "easy-VQA" in report
    assert "OpenMoji" in report
    stamp = (out / "results.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (out / "results.json").stat().st_mtime_ns == stamp
    assert "open questions" in capsys.readouterr().out
    assert main(["chat", str(out), "--image", str(out / "example.png"), "what is this?"]) == 0


def test_help_names_the_llms(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "smollm2" in capsys.readouterr().out
