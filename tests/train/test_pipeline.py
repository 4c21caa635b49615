"""Pipelines: how stages find their parents, what is checked before anything runs, and a whole one run and run again."""

import json
import os
import re
import shutil
import signal

import pytest
import yaml

from hovle_core.cli import main
from hovle_data.schema import Sample
from hovle_data.shards import write_shards
from hovle_train import loop
from hovle_train.commands import train_pipeline
from hovle_train.failure import Stopped
from hovle_train.lineage import parent_of
from hovle_train.loop import Trainer
from hovle_train.pipeline import load_pipeline
from hovle_train.runs import RUN_CARD, is_finished, read_summary
from hovle_train.runtime import Runtime


@pytest.fixture
def pipeline_file(world, tmp_path):
    """A pipeline of all four stages over the tiny world, two steps each."""
    train = {"steps": 2, "global_batch_size": 4, "micro_batch_tokens": 96, "precision": "float32", "log_every": 1,
             "checkpoint_every": 1}  # fmt: skip
    content = {
        "run_dir": str(tmp_path / "runs"),
        "common": {"optim": {"lr": 3e-3}, "train": train, "observers": {"wandb": "disabled"}},
        "stages": {
            "language_modeling": {
                "model": {"backbone": {"name": "transformers", "options": {"path": str(world / "llm")}}},
                "data": {"sources": [{"path": str(world / "texts")}]},
            },
            "distillation": {
                "stage": {"options": {"teacher": {"name": "grid"}}},
                "model": {"embedding": {"num_hidden_layers": 2, "image_size": 56}, "image": {"max_tiles": 2}},
                "data": {
                    "images": [{"path": str(world / "images")}],
                    "texts": [{"path": str(world / "texts")}],
                    "text_tokens": [4, 8],
                },
            },
            "alignment": {"data": {"sources": [{"path": str(world / "pairs")}]}},
            "instruction_tuning": {"recipe": "tuning.yaml", "train": {"steps": 3}},
        },
    }
    (tmp_path / "tuning.yaml").write_text(
        yaml.safe_dump(
            {
                "stage": {"name": "instruction_tuning"},
                "run_dir": "elsewhere",
                "data": {"sources": [{"path": str(world / "chats")}]},
                "optim": {"lr": 1.0, "weight_decay": 0.0},
                "train": {"steps": 9, "global_batch_size": 8},
            }
        )
    )
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_stages_start_from_the_one_before_and_merge_what_is_said_of_them(pipeline_file, plugins, tmp_path):
    pipeline = load_pipeline(pipeline_file, ["distillation.optim.lr=5e-3", "common.seed=3"], plugins.registry)
    runs = tmp_path / "runs"
    assert list(pipeline.recipes) == ["language_modeling", "distillation", "alignment", "instruction_tuning"]
    lm, distillation, alignment, tuning = pipeline.recipes.values()
    assert [r.run_dir for r in pipeline.recipes.values()] == [str(runs / label) for label in pipeline.recipes]
    assert parent_of(distillation) == lm.run_dir
    assert distillation.model.backbone.name == "transformers", "language modeling leaves an LLM, not a HoVLE"
    assert distillation.model.embedding["num_hidden_layers"] == 2
    assert (alignment.model.init_from, tuning.model.init_from) == (distillation.run_dir, alignment.run_dir)
    assert (distillation.optim.lr, alignment.optim.lr) == (5e-3, 3e-3)
    assert {r.seed for r in pipeline.recipes.values()} == {3}
    # The named recipe, then what is common, then the stage's own.
    assert (tuning.optim.weight_decay, tuning.optim.lr) == (0.0, 3e-3)
    assert (tuning.train.steps, tuning.train.global_batch_size) == (3, 4)


def test_what_goes_by_another_name_takes_over_no_options(pipeline_file, plugins, tmp_path):
    for sections in ({"stage": {"name": "alignment"}}, {"optim": {"name": "muon", "lr": 1.0}}):
        content = yaml.safe_load(pipeline_file.read_text())
        content["common"]["stage"] = {"name": "distillation", "options": {"head": "mlp"}}
        content["stages"] = {"only": sections | {"train": {"steps": 5}}}
        pipeline_file.write_text(yaml.safe_dump(content))
        (recipe,) = load_pipeline(pipeline_file, [], plugins.registry).recipes.values()
        assert bool(recipe.stage.options) == (recipe.stage.name == "distillation")
        assert recipe.train.global_batch_size == 4, "the rest is merged"


def test_what_is_printed_is_the_same_pipeline(pipeline_file, plugins, tmp_path, capsys):
    assert main(["train", str(pipeline_file), "--set", "alignment.optim.lr=7e-4", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = load_pipeline(printed, [], plugins.registry)
    assert again == load_pipeline(pipeline_file, ["alignment.optim.lr=7e-4"], plugins.registry)
    assert again.recipes["alignment"].optim.lr == 7e-4


def test_labels_with_dots_are_overridden_too(pipeline_file, plugins):
    raw = yaml.safe_load(pipeline_file.read_text())
    raw["stages"]["alignment.2"] = raw["stages"]["alignment"] | {"stage": {"name": "alignment"}}
    pipeline_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    overrides = ["alignment.2.optim.lr=7e-4", "alignment.optim.lr=5e-4"]
    recipes = load_pipeline(pipeline_file, overrides, plugins.registry).recipes
    assert recipes["alignment.2"].optim.lr == 7e-4
    assert recipes["alignment"].optim.lr == 5e-4


def test_each_stage_has_copies_of_its_own(pipeline_file, plugins, tmp_path):
    """Under what is common as under run_dir; where a stage says it itself, as it is said."""
    overrides = ["common.train.storage_path=s3://bucket/mine/", "alignment.train.storage_path=s3://elsewhere"]
    pipeline = load_pipeline(pipeline_file, overrides, plugins.registry)
    assert [recipe.train.storage_path for recipe in pipeline.recipes.values()] == [
        "s3://bucket/mine/language_modeling",
        "s3://bucket/mine/distillation",
        "s3://elsewhere",
        "s3://bucket/mine/instruction_tuning",
    ]
    (tmp_path / "printed.yaml").write_text(pipeline.to_yaml())
    assert load_pipeline(tmp_path / "printed.yaml", [], plugins.registry) == pipeline, (
        "no label is added twice"
    )


def test_two_stages_with_one_place_for_copies_are_refused(pipeline_file, plugins, tmp_path):
    for first, second in (("s3://a/b", "s3://a/b/"), (str(tmp_path / "x"), str(tmp_path / "y" / ".." / "x"))):
        overrides = [f"distillation.train.storage_path={first}", f"alignment.train.storage_path={second}"]
        with pytest.raises(ValueError, match="distillation and alignment have one train.storage_path, "):
            load_pipeline(pipeline_file, overrides, plugins.registry)


def test_a_label_stands_for_what_an_earlier_stage_leaves(pipeline_file, plugins, tmp_path):
    overrides = ["instruction_tuning.model.init_from=distillation"]
    tuning = load_pipeline(pipeline_file, overrides, plugins.registry).recipes["instruction_tuning"]
    assert tuning.model.init_from == str(tmp_path / "runs" / "distillation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.steps=3"], "must start with one of language_modeling.*common, run_dir"),
        (["--set", "alignmnt.train.steps=3"], "did you mean 'alignment'"),
        (
            ["--set", "alignment.train.stepz=3"],
            "stage 'alignment' of .*not valid:\n  train.stepz: unknown key",
        ),
        (["--set", "common.run_dir=x"], "common.run_dir is the pipeline's own"),
        (["--from", "alinment"], "--from alinment: no such stage; did you mean 'alignment'"),
        (["--from", "alignment", "--until", "distillation"], "no stage is left"),
        (["--from", "alignment"], "starts from distillation, which has not finished: begin with --from dist"),
        (["--set", "alignment.stage.name=nonsense"], "there is no stage 'nonsense'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message, pipeline_file, tmp_path, capsys):
    assert main(["train", str(pipeline_file), "--local", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_stages_of_a_single_recipe_are_refused(tmp_path, capsys):
    assert main(["train", "demo/alignment", "--from", "alignment"]) == 2
    assert "is one stage's recipe" in capsys.readouterr().err


def test_a_pipeline_runs_in_parts_and_each_stage_once(pipeline_file, plugins, tmp_path, capsys, monkeypatch):
    """Two stages, the rest, and a third start that finds everything done; then what is refused."""
    monkeypatch.setattr("hovle_train.ray_trainer.load_plugins", lambda: plugins)  # with the grid teacher

    def run(overrides=(), first=None, last=None):
        pipeline = load_pipeline(pipeline_file, list(overrides), plugins.registry)
        train_pipeline(pipeline, pipeline.select(first, last), plugins.registry, local=True)
        return pipeline.recipes

    def stamps():
        return {
            r.name: (r / "summary.json").stat().st_mtime_ns
            for r in (tmp_path / "runs").iterdir()
            if r.is_dir()
        }

    run(last="distillation")
    assert stamps().keys() == {"language_modeling", "distillation"}
    before = stamps()
    recipes = run(first="alignment")
    assert all(is_finished(recipe.path) for recipe in recipes.values())
    assert {name: stamps()[name] for name in before} == before
    before = stamps()
    run()
    assert stamps() == before
    assert capsys.readouterr().err.count("finished already") == 4

    card = json.loads((recipes["alignment"].path / "final" / RUN_CARD).read_text())
    assert card["parent"] == recipes["distillation"].run_dir
    assert card["data_manifest"]["data.sources.0"]["samples"] == 24
    assert card["plugins"]["train"].startswith("hovle-train")
    chain = [read_summary(recipe.path) for recipe in recipes.values()]
    assert all(card["parent_weights"] for card in chain)

    with pytest.raises(ValueError, match="made by another recipe .*optim.lr: 0.003, now 0.1"):
        run(["distillation.optim.lr=0.1"])
    # What changes no result may change.
    run(["distillation.train.log_every=5", "common.resources.num_workers=1"])
    shutil.rmtree(recipes["distillation"].path / "final")
    with pytest.raises(ValueError, match="alignment is finished, but distillation, .* --from alignment"):
        run()
    run(first="alignment")
    assert stamps() == before


def test_sigterm_behind_the_last_step_ends_the_pipeline_between_stages(
    pipeline_file, plugins, monkeypatch, capsys
):
    monkeypatch.setattr("hovle_train.ray_trainer.load_plugins", lambda: plugins)
    pipeline = load_pipeline(pipeline_file, [], plugins.registry)
    first, second, *_ = pipeline.recipes.values()
    export = loop.export_final

    def export_and_be_asked(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        export(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "export_final", export_and_be_asked)
        with pytest.raises(Stopped) as stopped:
            train_pipeline(pipeline, pipeline.recipes, plugins.registry, local=True)
    assert stopped.value.code == 75
    assert is_finished(first.path)
    assert not second.path.exists()
    chosen = pipeline.select(None, list(pipeline.recipes)[1])
    train_pipeline(pipeline, chosen, plugins.registry, local=True)  # the same command goes on
    assert is_finished(second.path)


def test_data_that_changed_since_a_stage_finished_are_named(pipeline_file, plugins, tmp_path):
    own = tmp_path / "own"
    write_shards((Sample(f"t{n}", text=f"one two {n}") for n in range(8)), own)
    overrides = [f"language_modeling.data.sources.0.path={own}"]
    pipeline = load_pipeline(pipeline_file, overrides, plugins.registry)
    only = pipeline.select(last="language_modeling")
    train_pipeline(pipeline, only, plugins.registry, local=True)
    shutil.rmtree(own)
    write_shards((Sample(f"t{n}", text=f"one two three {n}") for n in range(9)), own)
    with pytest.raises(ValueError, match="made from other data: data.sources.0 .* had 8 samples, now 9"):
        train_pipeline(pipeline, only, plugins.registry, local=True)
    shutil.rmtree(own)
    train_pipeline(pipeline, only, plugins.registry, local=True)  # deleted to save space: nothing to compare


def test_folders_that_moved_hold_what_they_held(
    pipeline_file, world, plugins, tmp_path, run_killed_after, monkeypatch, capsys
):
    """Finished stages stay finished, and a broken one goes on, where parent and data are the same elsewhere."""
    monkeypatch.setattr("hovle_train.ray_trainer.load_plugins", lambda: plugins)
    own = tmp_path / "own"
    shutil.copytree(world / "pairs", own)
    overrides = [f"alignment.data.sources.0.path={own}"]
    pipeline = load_pipeline(pipeline_file, overrides, plugins.registry)
    train_pipeline(pipeline, pipeline.select("language_modeling", "alignment"), plugins.registry, local=True)
    tuning = pipeline.recipes["instruction_tuning"]
    run_killed_after(Trainer(tuning, plugins, Runtime()), 2)
    assert not is_finished(tuning.path)

    pipeline.run_dir.rename(tmp_path / "moved")
    own.rename(tmp_path / "own2")
    overrides = [f"run_dir={tmp_path}/moved", f"alignment.data.sources.0.path={tmp_path}/own2"]
    again = load_pipeline(pipeline_file, overrides, plugins.registry)
    capsys.readouterr()
    train_pipeline(again, again.recipes, plugins.registry, local=True)
    assert capsys.readouterr().err.count("finished already") == 3
    assert is_finished(again.recipes["instruction_tuning"].path)
    Trainer(again.recipes["alignment"], plugins, Runtime()).run()  # nor does the loop itself object

    others = [overrides[0], f"alignment.data.sources.0.path={world}/chats"]
    other = load_pipeline(pipeline_file, others, plugins.registry)
    with pytest.raises(ValueError, match=r"made by another recipe \(data.sources.0.path: "):
        train_pipeline(other, other.recipes, plugins.registry, local=True)
    with pytest.raises(ValueError, match=r"made by another recipe \(data.sources.0.path: "):
        Trainer(other.recipes["alignment"], plugins, Runtime()).run()


def test_a_dry_run_says_what_waits_for_what(pipeline_file, plugins, world, capsys):
    from hovle_train.commands import dry_run_pipeline

    pipeline = load_pipeline(
        pipeline_file, [f"alignment.data.sources.0.path={world}/nothing"], plugins.registry
    )
    dry_run_pipeline(pipeline, pipeline.recipes, plugins)
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "distillation: 2 steps, once language_modeling has finished; its data are there" in printed
    assert "once distillation has finished; no data yet in data.sources.0" in printed
    assert not pipeline.run_dir.exists()
