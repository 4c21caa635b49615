"""Recipes: what is misspelt is named with a suggestion, what is overridden takes effect."""

import json
import re

import pytest
import yaml

from hovle_core.cli import main
from hovle_data.sections import read_yaml
from hovle_train.loop import Trainer
from hovle_train.recipe_file import apply_overrides, load_recipe, parse_recipe
from hovle_train.runtime import Runtime

MINIMAL = {
    "stage": {"name": "alignment"},
    "run_dir": "runs/x",
    "optim": {"lr": 1e-3},
    "train": {"steps": 1, "global_batch_size": 1},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"lr": 1e-3, "warmup": 5}}, "optim.warmup: unknown key, did you mean 'warmup_steps'"),
        ({"optimizer": {}}, "optimizer: unknown key, did you mean 'optim'"),
        ({"optim": {}}, "optim.lr: Field required"),
        ({"optim": {"lr": -1}}, "optim.lr: .*greater than 0, got -1"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: .*finite number, got inf"),
        (
            {"data": {"sources": [{"path": "a", "weight": float("nan")}]}},
            "weight.*: .*finite number, got nan",
        ),
        (
            {"data": {"sources": [{"path": "a", "wieght": 2}]}},
            "data.sources.0.wieght: .*did you mean 'weight'",
        ),
        ({"model": {"image": {"tiles": 3}}}, "model.image.tiles: unknown key"),
        (
            {"model": {"init_from": "x", "embedding": {"num_hidden_layers": 2}}},
            "model: .*init_from brings its own \\['embedding'\\]",
        ),
        ({"train": {"steps": "many", "global_batch_size": 1}}, "train.steps: .*got 'many'"),
        ({"data": {"sources": [{"path": "a", "weight": 0}]}}, "data.sources.0.weight: .*weight is 0"),
        (
            {"data": {"sources": [{"path": "a", "weight": {0: 1, 7: 2}}]}},
            "data.sources.0.weight: .*shares of the steps, from 0 to below 1",
        ),
        (
            {"model": {"embedding": {"num_hiden_layers": 2}}},
            "model.embedding: unknown field 'num_hiden_layers'; did you mean 'num_hidden_layers'",
        ),
        (
            {"model": {"embedding": {"dtype": "x"}}},
            "model.embedding: unknown field 'dtype' .known: attention_bias",
        ),
        (
            {"optim": {"lr": 1, "schedule": "constant", "min_lr_share": 0.1}},
            "optim: min_lr_share 0.1 does nothing with schedule 'constant'.* set schedule: cosine",
        ),
        (
            {"optim": {"lr": 1, "schedule": "wsd", "min_lr_share": 0.1}},
            "optim: min_lr_share 0.1 does nothing with schedule 'wsd'",
        ),
        (
            {"optim": {"lr": 1, "decay_share": 0.5}},
            "optim: decay_share 0.5 does nothing with schedule 'cosine'.* set schedule: wsd",
        ),
        (
            {"optim": {"lr": 1, "schedule": "wsd", "restarts": [0.5]}},
            "restarts \\[0.5\\] does nothing with schedule 'wsd'",
        ),
        ({"optim": {"lr": 1, "restarts": [0.5, 0.3]}}, "restarts \\[0.5, 0.3\\] must ascend"),
        (
            {
                "data": {"sources": [{"path": "a", "weight": {0: 1, 0.5: 2}}]},
                "train": {"steps": 4, "global_batch_rows": 2},
            },
            "weight of a is .*set train.global_batch_size in place of global_batch_rows",
        ),
        ({"optim": {"lr": 1, "restarts": [3]}}, "optim.restarts.0: .*less than 1, got 3"),
        (
            {"optim": {"lr": 1, "warmup_steps": 4}, "train": {"steps": 4, "global_batch_size": 1}},
            "optim.warmup_steps 4 must be fewer than train.steps 4",
        ),
        (
            {
                "optim": {"lr": 1, "warmup_steps": 4, "schedule": "wsd", "decay_share": 0.5},
                "train": {"steps": 6, "global_batch_size": 1},
            },
            "optim.decay_share 0.5 of 6 steps begins before warmup_steps 4 are over",
        ),
        (
            {
                "optim": {"lr": 1, "warmup_steps": 4, "restarts": [0.1]},
                "train": {"steps": 20, "global_batch_size": 1},
            },
            "optim.restarts 0.1 is step 2 of 20, .*warmup_steps is 4",
        ),
        (
            {"optim": {"lr": 1, "restarts": [0.5, 0.51]}, "train": {"steps": 20, "global_batch_size": 1}},
            "optim.restarts 0.5 is step 10 of 20",
        ),
        (
            {
                "data": {"sources": [{"path": "a", "weight": {0: 1, 0.5: 2, 0.51: 3}}]},
                "train": {"steps": 4, "global_batch_size": 2},
            },
            "weight of a is .*two of these shares are the same one of 4 steps",
        ),
        (
            {"data": {"text_tokens": [9, 3]}},
            "data.text_tokens: text_tokens is .9, 3.: it reads .fewest, most.",
        ),
        ({"optim": {"lr": 1, "betas": [0.9, 1.5]}}, "optim.betas.1: .*less than 1"),
        ({"optim": {"lr": 1, "lr_factors": {"embedding.*": 0}}}, "lr_factors.embedding.*greater than 0"),
        # What YAML or JSON says is what is meant: no word becomes a switch, no string a number.
        ({"resources": {"use_gpu": "yes"}}, "resources.use_gpu: .*valid boolean, got 'yes'"),
        ({"resources": {"use_gpu": 1}}, "resources.use_gpu: .*valid boolean, got 1"),
        ({"seed": "3"}, "seed: .*valid integer, got '3'"),
        ({"seed": True}, "seed: .*valid integer, got True"),
        ({"optim": {"lr": "0.1"}}, "optim.lr: .*valid number, got '0.1'"),
        ({"data": {"text_tokens": ["4", 8]}}, "data.text_tokens.0: .*valid integer, got '4'"),
        (
            {"resources": {"accelerator_type": "A100"}},
            "resources: accelerator_type 'A100' does nothing with use_gpu: false.* set use_gpu: true",
        ),
    ],
)
def test_problems_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe({**MINIMAL, **change})


def test_settings_that_are_read_are_taken_and_survive_printing():
    for change in (
        {"optim": {"lr": 1, "schedule": "wsd", "decay_share": 0.5}},
        {"optim": {"lr": 1, "min_lr_share": 0.1}},
        {"resources": {"accelerator_type": "A100", "use_gpu": True}},
        {"model": {"embedding": {"num_hidden_layers": 2}}},
    ):
        recipe = parse_recipe({**MINIMAL, **change})
        assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (
            "alignment",
            {"data": {"sources": [{"path": "a"}], "images": [{"path": "a"}]}},
            "data.images does nothing in stage 'alignment': leave it out .*reads data.sources, data.long_samples",
        ),
        ("instruction_tuning", {"data": {"texts": [{"path": "a"}]}}, "data.texts does nothing in stage"),
        ("alignment", {"data": {"text_tokens": [4, 8]}}, "data.text_tokens does nothing in stage"),
        (
            "distillation",
            {"data": {"sources": [{"path": "a"}]}},
            "data.sources does nothing in stage 'distillation': .*reads data.images, data.texts",
        ),
        ("distillation", {"data": {"long_samples": "truncate"}}, "data.long_samples does nothing"),
        ("language_modeling", {"model": {"image": {"max_tiles": 3}}}, "model.image does nothing"),
        ("language_modeling", {"model": {"init_from": "a"}}, "model.init_from does nothing"),
        ("language_modeling", {"model": {"embedding": {"num_hidden_layers": 2}}}, "model.embedding does"),
        ("alingment", {}, "there is no stage 'alingment'; did you mean 'alignment'"),
        (
            "alignment",
            {"stage": {"name": "alignment", "options": {"haed": 1}}},
            "stage.options of 'alignment' are not valid",
        ),
    ],
)
def test_print_config_refuses_what_its_stage_does_not_know(stage, change, message, tmp_path, capsys):
    options = {"teacher": {"name": "efficientnet-lite0"}} if stage == "distillation" else {}
    raw = {**MINIMAL, "stage": {"name": stage, "options": options}, **change}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--print-config"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_defaults_written_out_are_no_mistake(plugins):
    raw = {**MINIMAL, "data": {"images": [], "text_tokens": [16, 64]}, "model": {"image": {"max_tiles": 12}}}
    recipe = parse_recipe(raw)
    plugins.registry.build("stage", "alignment", recipe=recipe, registry=plugins.registry)


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stage: {name: alignment}\nrun_dir: '1e-3'\noptim: {lr: 1e-3, weight_decay: 5E-2, min_lr_share: 0}\n"
        "train: {steps: 1, global_batch_size: 1}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.min_lr_share) == (1e-3, 0.05, 0.0)
    assert recipe.run_dir == "1e-3"


def test_a_date_is_text(tmp_path):
    assert apply_overrides(read_yaml("run_dir: 2026-01-01"), []) == {"run_dir": "2026-01-01"}


def test_overrides():
    raw = apply_overrides(MINIMAL, ["optim.lr=3e-4", "data.sources=[{path: a}]", "data.sources.0.weight=2"])
    recipe = parse_recipe(raw)
    assert recipe.optim.lr == 3e-4
    assert recipe.data.sources[0].weight == 2
    assert MINIMAL["optim"]["lr"] == 1e-3
    with pytest.raises(ValueError, match="key.sub_key=value"):
        apply_overrides(MINIMAL, ["optim.lr"])
    with pytest.raises(ValueError, match="is a value, not a section"):
        apply_overrides(MINIMAL, ["run_dir.x.y=1"])


def test_a_curriculum_counts_in_steps_and_survives_the_run_card(make_recipe, plugins):
    from hovle_train.loop import Trainer
    from hovle_train.runtime import Runtime

    recipe = make_recipe("instruction_tuning")
    source = recipe.data.sources[0]
    raw = recipe.model_dump(mode="json")
    raw["train"] |= {"steps": 6, "global_batch_size": 4}
    raw["data"]["sources"] = [{"path": source.path, "weight": {0: 3, 0.8: 1}}]
    again = parse_recipe(yaml.safe_load(parse_recipe(json.loads(json.dumps(raw))).to_yaml()))
    assert again.data.sources[0].weight == {0: 3, 0.8: 1}
    mixture = Trainer(again, plugins, Runtime()).stage.mixture(again.data.sources, "sources")
    assert [phase.start for phase in mixture.phases] == [0, 20]


def test_stage_options_are_checked(plugins, make_recipe):
    from hovle_train.loop import Trainer
    from hovle_train.runtime import Runtime

    recipe = make_recipe("distillation", options={"teacher": {"name": "grid"}, "haed": "mlp"})
    with pytest.raises(ValueError, match="haed: unknown key, did you mean 'head'"):
        Trainer(recipe, plugins, Runtime())
    recipe = make_recipe("alignment", options={"head": "mlp"})
    with pytest.raises(ValueError, match="head: unknown key"):
        Trainer(recipe, plugins, Runtime())


def test_empty_sources_name_the_field(plugins, make_recipe):
    from hovle_train.loop import Trainer
    from hovle_train.runtime import Runtime

    trainer = Trainer(make_recipe("alignment", data={"sources": []}), plugins, Runtime())
    with pytest.raises(ValueError, match="data.sources is empty"):
        trainer.run()


def test_recipe_by_name_and_unknown(plugins):
    assert load_recipe("demo/alignment", registry=plugins.registry).stage.name == "alignment"
    with pytest.raises(FileNotFoundError, match="no recipe file 'demo/alignmnet'"):
        load_recipe("demo/alignmnet", registry=plugins.registry)


def test_print_config_resolves_and_round_trips(capsys, tmp_path):
    assert main(["train", "demo/distillation", "--set", "optim.lr=1e-2", "--print-config"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "recipe.yaml"
    path.write_text(printed)
    recipe = load_recipe(path)
    assert recipe.optim.lr == 0.01
    assert recipe.to_yaml() == printed


def test_bad_recipe_is_one_line_and_exit_code_2(capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stage: {name: alignment}\nrun_dir: x\noptim: {lrr: 1}\ntrain: {steps: 1, global_batch_size: 1}\n"
    )
    assert main(["train", str(path)]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err


def test_dry_run_shows_the_plan_and_writes_nothing(make_recipe, tmp_path, capsys, plugins):
    from hovle_train.commands import dry_run

    recipe = make_recipe("alignment")
    dry_run(recipe, plugins)
    out = capsys.readouterr().out
    assert "of which" in out
    assert "6 of 8 samples" in out
    assert not recipe.path.exists()
    with pytest.raises(ValueError, match="lr_factors: no trainable parameter matches 'nothing"):
        dry_run(make_recipe("alignment", optim={"lr_factors": {"nothing.*": 2.0}}), plugins)
    recipe.path.write_text("mine")
    with pytest.raises(ValueError, match="run_dir .* is a file"):
        dry_run(recipe, plugins)


@pytest.mark.parametrize("storage", ["runs/x", "runs/x/", "runs/y/../x/copies", "file://{here}/runs/x"])
def test_copies_in_the_run_itself_are_refused(storage, tmp_path, monkeypatch):
    """They would be deleted to make room for themselves."""
    monkeypatch.chdir(tmp_path)
    train = MINIMAL["train"] | {"storage_path": storage.format(here=tmp_path)}
    with pytest.raises(
        ValueError, match=r"train.storage_path .* is in run_dir runs/x: .* name a place outside"
    ):
        parse_recipe(MINIMAL | {"train": train})
    for fine in ("runs/x2", "s3://bucket/runs/x", "runs"):
        parse_recipe(MINIMAL | {"train": train | {"storage_path": fine}})


def test_an_attention_that_is_not_here_is_named(make_recipe, plugins):
    recipe = make_recipe("alignment")
    recipe.model.attention = "flash_attention_9"
    with pytest.raises(ValueError, match="model.attention 'flash_attention_9': "):
        Trainer(recipe, plugins, Runtime()).prepare()


@pytest.mark.parametrize("dry", [True, False])
def test_a_gpu_that_is_not_here(dry, make_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe("alignment", resources={"use_gpu": True}).to_yaml())
    assert main(["train", str(path), "--local", *(["--dry-run"] if dry else [])]) == 2
    assert "resources.use_gpu is true, and torch finds no GPU" in capsys.readouterr().err
