"""Each stage: what trains, what does not, that it learns, and that a stop does not show."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hovle_core import HovleForConditionalGeneration, HovleProcessor
from hovle_data.quarantine import Ledger
from hovle_train import checkpoint
from hovle_train.commands import train
from hovle_train.freeze import freeze_except
from hovle_train.lineage import absolute, check_run
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runs import METRICS_FILE, is_finished, read_summary
from hovle_train.runtime import Runtime
from hovle_train.stages.base import LOOP_METRICS, make_stage

STAGES = ("language_modeling", "distillation", "alignment", "instruction_tuning")
LLM = "language_model."


def prepared(recipe, plugins):
    trainer = Trainer(recipe, plugins, Runtime())
    trainer.prepare()
    return trainer


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_stays_and_trainable_learns(stage, make_recipe, plugins):
    trainer = prepared(make_recipe(stage), plugins)
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    gradients = {}
    for name, p in trainer.module.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, n=name: gradients.__setitem__(n, p.grad.clone()))
    batches = trainer.loader(Ledger()).batches(0)
    trainer.step(0, batches)
    # Behind projections that start at zero gradients are zero in the first step, and only there.
    trainer.step(1, batches)
    for name, p in trainer.module.named_parameters():
        if p.requires_grad:
            assert gradients[name].abs().max() > 0, f"{name} has no gradient"
            assert not torch.equal(p, before[name]), f"{name} did not move"
        else:
            assert torch.equal(p, before[name]), f"{name} is frozen and moved"
            assert p.grad is None


@pytest.mark.parametrize("stage", ["distillation", "alignment"])
def test_what_is_frozen_leaves_bfloat16_training_bit_for_bit(stage, make_recipe, plugins):
    recipe = make_recipe(stage, train={"precision": "bfloat16", "steps": 2})
    before = {
        name.removeprefix("model."): p.detach().clone()
        for name, p in prepared(make_recipe(stage), plugins).module.named_parameters()
        if not p.requires_grad
    }
    assert any(not torch.equal(p.bfloat16().float(), p) for p in before.values())
    Trainer(recipe, plugins, Runtime()).run()
    after = load_file(recipe.path / "final" / "model.safetensors")
    kept = [name for name in before if name in after]  # of tied weights one name is stored
    assert kept
    for name in kept:
        assert torch.equal(after[name], before[name]), name


def test_what_each_stage_trains(make_recipe, plugins):
    expected = {
        "distillation": lambda name: name.startswith(("model.embedding.", "head.")),
        "alignment": lambda name: name.startswith("embedding."),
        "instruction_tuning": lambda name: True,
    }
    for stage, trains in expected.items():
        trainer = prepared(make_recipe(stage), plugins)
        for name, p in trainer.module.named_parameters():
            assert p.requires_grad == trains(name), (stage, name)
    frozen = prepared(make_recipe("alignment"), plugins).module
    frozen.train()
    freeze_except(frozen, ["embedding."])
    assert not frozen.language_model.training
    assert frozen.embedding.layers[0].training


@pytest.mark.parametrize("stage", STAGES)
def test_overfits_one_batch(stage, make_recipe, plugins):
    recipe = make_recipe(stage, optim={"lr": 1e-2, "warmup_steps": 1, "schedule": "constant"})
    trainer = prepared(recipe, plugins)
    batches = trainer.loader(Ledger()).batches(0)
    logged = [trainer.step(step, batches) for step in range(60)]
    if stage == "distillation":
        assert logged[-1]["image_cosine"] > 0.9 > logged[0]["image_cosine"] + 0.2
        assert logged[-1]["text_cosine"] > 0.99
    else:
        assert logged[-1]["loss"] < 0.25 * logged[0]["loss"]


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [*((stage, "float32", "adamw") for stage in STAGES), ("instruction_tuning", "bfloat16", "muon")],
)
def test_resumed_equals_uninterrupted(
    stage, precision, optimizer, make_recipe, plugins, tmp_path, run_killed_after
):
    """Bit for bit; killed twice, once off a checkpoint."""
    sections = {"train": {"precision": precision}, "optim": {"name": optimizer}}
    whole = make_recipe(stage, run_dir=str(tmp_path / "whole"), **sections)
    Trainer(whole, plugins, Runtime()).run()
    broken = make_recipe(stage, run_dir=str(tmp_path / "broken"), **sections)
    for steps in (3, 1):
        trainer = Trainer(broken, plugins, Runtime())
        run_killed_after(trainer, steps)
        assert not is_finished(broken.path)
    Trainer(broken, plugins, Runtime()).run()
    a, b = (load_file(recipe.path / "final" / "model.safetensors") for recipe in (whole, broken))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    deterministic = ("step", "lr", "grad_norm", "loss", "image_cosine", "text_cosine")
    curves = [
        [
            {k: v for k, v in line.items() if k in deterministic}
            for line in read_metrics(r.path / "metrics.jsonl")
        ]
        for r in (whole, broken)
    ]
    assert curves[0] == curves[1]
    assert [line["step"] for line in curves[0]] == list(range(6))


def test_what_was_deleted_to_save_space_may_have_had_a_relative_path(
    make_recipe, world, plugins, tmp_path, monkeypatch
):
    """Workers on Ray know it as an absolute one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "pairs", "pairs")
    recipe = make_recipe("alignment", data={"sources": [{"path": "pairs"}]}, train={"steps": 1})
    Trainer(absolute(recipe), plugins, Runtime()).run()
    shutil.rmtree("pairs")
    check_run(recipe, plugins.registry)
    recipe.data.sources[0].path = "others"
    with pytest.raises(ValueError, match="data.sources.0.path: .*pairs', now 'others'"):
        check_run(recipe, plugins.registry)


def test_what_memory_asks_for_may_change_in_the_middle(make_recipe, plugins, run_killed_after):
    """A run that found no room goes on in smaller pieces; not so where these are the rows of a step."""
    recipe = make_recipe("alignment")
    run_killed_after(Trainer(recipe, plugins, Runtime()), 3)
    recipe.model.activation_checkpointing = True
    recipe.train.micro_batch_tokens = 64
    Trainer(recipe, plugins, Runtime()).run()
    rows = {"global_batch_size": None, "global_batch_rows": 4}
    cut = make_recipe("alignment", run_dir=f"{recipe.run_dir}2", train=rows)
    run_killed_after(Trainer(cut, plugins, Runtime()), 3)
    cut.train.micro_batch_tokens = 64
    with pytest.raises(ValueError, match="micro_batch_tokens: 96, now 64"):
        Trainer(cut, plugins, Runtime()).run()


def test_a_torn_checkpoint_is_passed_over(make_recipe, plugins, tmp_path, run_killed_after):
    recipe = make_recipe("alignment", train={"keep_checkpoints": 5})
    trainer = Trainer(recipe, plugins, Runtime())
    run_killed_after(trainer, 5)
    newest = checkpoint.complete_checkpoints(trainer.checkpoints)[-1]
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[: len(content) // 2])
    again = Trainer(recipe, plugins, Runtime())
    again.prepare()
    assert again.resume() == 2


def test_another_recipe_does_not_resume_and_is_not_called_finished(make_recipe, plugins, run_killed_after):
    recipe = make_recipe("alignment")
    trainer = Trainer(recipe, plugins, Runtime())
    run_killed_after(trainer, 3)
    for change, message in (
        ({"seed": 5}, "seed: 0, now 5"),
        ({"model": {"embedding": {"num_hidden_layers": 3, "image_size": 56}}}, "num_hidden_layers: 2, now 3"),
        ({"train": {"steps": 9}}, "train.steps: 6, now 9"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(make_recipe("alignment", **change), plugins, Runtime()).run()
    Trainer(make_recipe("alignment", train={"log_every": 3}), plugins, Runtime()).run()
    assert is_finished(recipe.path)
    with pytest.raises(ValueError, match="finished run .* was made by another recipe .*optim.lr"):
        Trainer(make_recipe("alignment", optim={"lr": 1e-5}), plugins, Runtime()).run()


def test_a_parent_that_was_retrained_is_noticed(make_recipe, plugins, tmp_path, run_killed_after):
    def parent(lr):
        shutil.rmtree(tmp_path / "parent", ignore_errors=True)
        recipe = make_recipe(
            "alignment", run_dir=str(tmp_path / "parent"), train={"steps": 2}, optim={"lr": lr}
        )
        Trainer(recipe, plugins, Runtime()).run()

    parent(1e-3)
    model = {"init_from": str(tmp_path / "parent"), "backbone": None, "embedding": {}, "image": {}}
    recipe = make_recipe("instruction_tuning", run_dir=str(tmp_path / "child"), model=model)
    trainer = Trainer(recipe, plugins, Runtime())
    run_killed_after(trainer, 3)
    parent(2e-3)
    message = "checkpoint .* started from .*parent, whose weights have changed since: delete .*child to train it again"
    with pytest.raises(ValueError, match=message):
        Trainer(recipe, plugins, Runtime()).run()

    parent(1e-3)  # the same recipe gives the same weights: nothing has changed
    Trainer(recipe, plugins, Runtime()).run()
    Trainer(recipe, plugins, Runtime()).run()
    parent(2e-3)
    for call in (Trainer(recipe, plugins, Runtime()).run, lambda: train(recipe, local=True)):
        with pytest.raises(ValueError, match="finished run .* whose weights have changed since"):
            call()
    shutil.rmtree(tmp_path / "parent")  # to save space: what is finished stays finished
    Trainer(recipe, plugins, Runtime()).run()


def test_stages_start_from_each_other_and_what_is_finished_stays(make_recipe, plugins, tmp_path):
    parent = None
    for stage in STAGES[1:]:
        model = {"init_from": parent, "backbone": None, "embedding": {}, "image": {}} if parent else {}
        recipe = make_recipe(stage, run_dir=str(tmp_path / stage), model=model)
        Trainer(recipe, plugins, Runtime()).run()
        llm = None if recipe.model.backbone is None else recipe.model.backbone.options["path"]
        assert read_summary(recipe.path)["parent"] == (parent or llm)
        parent = str(recipe.path)
    final = tmp_path / "instruction_tuning" / "final"
    HovleForConditionalGeneration.from_pretrained(final)
    assert HovleProcessor.from_pretrained(final).tokens_per_tile == 4
    stamp = (final / "model.safetensors").stat().st_mtime_ns
    Trainer(recipe, plugins, Runtime()).run()
    assert (final / "model.safetensors").stat().st_mtime_ns == stamp
    card = json.loads((final / "hovle_run.json").read_text())
    assert card["plugins"]["core"].startswith("hovle-core ")
    assert card["recipe"]["stage"]["name"] == "instruction_tuning"


def test_cached_teacher_features_equal_those_of_the_teacher(make_recipe, plugins, tmp_path):
    online = prepared(make_recipe("distillation"), plugins)
    recipe = make_recipe(
        "distillation",
        run_dir=str(tmp_path / "cached"),
        options={"teacher": {"name": "grid"}, "cache_features": True},
    )
    cached = prepared(recipe, plugins)
    batch = online.loader(Ledger()).batches(0)[0]
    a = online.stage.features.get(batch.tile_keys, batch.pixel_values)
    b = cached.stage.features.get(batch.tile_keys, batch.pixel_values)
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # the store is float16
    assert a.abs().max() > 0.1


def test_not_finite_stops_before_the_update_and_names_samples(make_recipe, plugins):
    trainer = prepared(make_recipe("alignment"), plugins)
    batches = trainer.loader(Ledger()).batches(0)
    with torch.no_grad():
        trainer.module.embedding.patch_embed.patch_embedding.bias.fill_(float("inf"))
    before = trainer.module.embedding.embed_tokens.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="pairs/p"):
        trainer.step(0, batches)
    assert torch.equal(before, trainer.module.embedding.embed_tokens.weight)


def test_gradients_are_clipped_by_their_common_norm(make_recipe, plugins, tmp_path):
    """What the optimizer is given has the length of the limit, and the direction that it had."""
    given = {}
    for limit in (None, 0.01):
        recipe = make_recipe("alignment", run_dir=str(tmp_path / str(limit)), optim={"grad_clip": limit})
        trainer = prepared(recipe, plugins)

        def keep(optimizer, *_, limit=limit):
            groups = optimizer.param_groups
            given[limit] = torch.cat([p.grad.flatten() for g in groups for p in g["params"]]).clone()

        trainer.optimizers[0].register_step_pre_hook(keep)
        logged = trainer.step(0, trainer.loader(Ledger()).batches(0))
        assert logged["grad_norm"] == pytest.approx(float(given[None].norm()), rel=1e-5)  # before the clip
    assert float(given[0.01].norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(given[0.01] / given[0.01].norm(), given[None] / given[None].norm())


def test_micro_batches_do_not_change_the_step(make_recipe, plugins, tmp_path):
    """One long packed row, or many short ones: the same gradient, since targets are counted over the step."""
    results = []
    for tokens in (64, 4096):
        recipe = make_recipe("alignment", train={"micro_batch_tokens": tokens})
        trainer = prepared(recipe, plugins)
        batches = trainer.loader(Ledger()).batches(0)
        results.append((len(batches), trainer.step(0, batches)))
    assert results[0][0] > results[1][0] == 1
    for name in ("loss", "grad_norm"):
        assert results[0][1][name] == pytest.approx(results[1][1][name], rel=1e-5)


@pytest.mark.parametrize("stage", ["distillation", "alignment", "instruction_tuning"])
def test_padding_a_row_does_not_change_the_step(stage, make_recipe, plugins):
    """`pad_to_multiple_of` adds tokens that nothing sees and nobody counts."""
    results = []
    for multiple in (1, 1000):
        trainer = prepared(make_recipe(stage, train={"pad_to_multiple_of": multiple}), plugins)
        batches = [trainer.place(batch) for batch in trainer.loader(Ledger()).batches(0)]
        results.append((batches[0].input_ids.shape[1], trainer.step(0, batches)))
    (short, plain), (long, padded) = results
    assert short < long == 1000
    assert padded == pytest.approx(plain, rel=1e-5)


def test_distilled_text_is_as_long_as_the_llms_own(make_recipe, plugins, tmp_path):
    """Cosines leave lengths free; the export brings them to the LLM's, and the head still says the same."""
    from hovle_train.evaluate import load_head

    heads = []
    for match, ratio in ((False, 30.0), (True, 1.0)):
        recipe = make_recipe("distillation", options={"teacher": {"name": "grid"}, "match_norms": match})
        trainer = prepared(recipe, plugins)
        trainer.module.model.embedding.rescale_(30.0)  # where training may end
        folder = tmp_path / str(match)
        trainer.stage.export(trainer.module, trainer.processor, folder)
        model = HovleForConditionalGeneration.from_pretrained(folder).eval()
        encoded = trainer.processor.encode_pair(Image.new("RGB", (56, 56), "red"), "a red thing")
        inputs = trainer.processor.batch([encoded])
        ids = inputs["input_ids"][0]
        is_image = ids == trainer.processor.image_token_id
        with torch.no_grad():
            embedded = model.embed(inputs["input_ids"], inputs["pixel_values"])[0]
            wanted = model.language_model.get_input_embeddings()(ids)
            heads.append(load_head(folder)[0](embedded[is_image]))
        lengths = embedded[~is_image].norm(dim=-1) / wanted[~is_image].norm(dim=-1)
        assert float(lengths.mean()) == pytest.approx(ratio, rel=0.01)
    torch.testing.assert_close(heads[0], heads[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("data", "prefetch"), [({}, 2), ({"prefetch_steps": 0}, 0)])
def test_what_is_read_ahead_and_kept_is_what_the_recipe_says(make_recipe, plugins, data, prefetch):
    recipe = make_recipe("distillation", data={**data, "tile_cache_gib": 0.25})
    trainer = Trainer(recipe, plugins, Runtime())
    trainer.prepare()
    loader = trainer.loader(Ledger())
    assert loader.prefetch == prefetch
    assert loader.stream.cut_tiles.max_bytes == 2**28


def test_losses_are_not_called_as_what_the_loop_logs(make_recipe, plugins, monkeypatch):
    """Added to the loop's own sum, "stop" would end the run behind its first step."""
    recipe = make_recipe("alignment")
    monkeypatch.setattr(type(make_stage(recipe, plugins.registry)), "target_kinds", ("stop", "loss"))
    with pytest.raises(ValueError, match=r"stage 'alignment' has target_kinds \['stop'\].*other names"):
        Trainer(recipe, plugins, Runtime())
    with pytest.raises(ValueError, match="other names"):
        make_stage(recipe, plugins.registry)


def test_what_the_loop_logs_is_known(make_recipe, plugins):
    recipe = make_recipe("alignment")
    Trainer(recipe, plugins, Runtime()).run()
    logged = set().union(*read_metrics(recipe.path / METRICS_FILE))
    assert logged - {"loss"} <= LOOP_METRICS, "a loss could be called so, and nobody would notice"
