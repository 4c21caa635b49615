"""What `parallel` chooses changes no result: two ranks with FSDP2 are one process, and checkpoints go between them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hovle_train import checkpoint
from hovle_train.failure import EXIT_STOPPED, STOP_FILE
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.recipe_file import parse_recipe
from hovle_train.runs import read_summary
from hovle_train.runtime import Runtime

FSDP2 = {"strategy": "fsdp2"}
# Of 8 samples a rank has 4; at 48 tokens a row they take several rows, and not the same number on both ranks.
UNEVEN = {"steps": 5, "micro_batch_tokens": 48, "min_fill": 0, "checkpoint_every": 1}
RUNS = {
    "instruction_tuning": {"parallel": FSDP2, "train": UNEVEN},
    "alignment": {"parallel": FSDP2, "train": {**UNEVEN, "precision": "bfloat16"}},
    # Muon, recomputed activations, layers gathered once a step, an LLM that is not run, averages in shares.
    "distillation": {
        "parallel": {**FSDP2, "reshard_after_forward": False},
        "optim": {"name": "muon", "ema": {"decay": 0.7, "export": "beside"}},
        "train": UNEVEN,
        "model": {"activation_checkpointing": True},
    },
}
# Muon orthogonalises in bfloat16; alignment trains in it, and soon goes its own way in the last digits.
# Of curves and of weights.
TOLERANCE = {"instruction_tuning": (2e-4, 1e-3), "distillation": (2e-3, 5e-2), "alignment": (1e-2, None)}


def run_ranks(jobs, folder, world=2, code=0):
    """Run jobs one after the other on `world` processes, which all end with `code`."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("rank_process.py")
    ranks = [subprocess.Popen([sys.executable, script, str(r), str(world), path]) for r in range(world)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [code] * world
    finally:
        for rank in ranks:
            rank.kill()


def weights(recipe, folder="final"):
    return load_file(recipe.path / folder / "model.safetensors")


def curve(recipe, name):
    return [line[name] for line in read_metrics(recipe.path / "metrics.jsonl")]


def assert_same_run(a, b, curves, shares, steps=None):
    """Curves of the first `steps` (None: all), and each weight unless `shares` is None, by its share that differs."""
    for name in ("loss", "image_cosine", "text_cosine", "grad_norm"):
        if name in read_metrics(a.path / "metrics.jsonl")[0]:
            assert curve(a, name)[:steps] == pytest.approx(curve(b, name)[:steps], rel=curves), name
    if shares is None:
        return
    for folder in ("final", "final_ema"):
        assert (a.path / folder).exists() == (b.path / folder).exists()
        if not (b.path / folder).exists():
            continue
        first, second = weights(a, folder), weights(b, folder)
        assert first.keys() == second.keys()
        differences = {n: float((first[n] - second[n]).norm() / second[n].norm()) for n in first}
        assert max(differences.values()) < shares, sorted(differences.items(), key=lambda item: -item[1])[:3]


def run_here(recipe, plugins, stop=None):
    """The recipe in this process, broken off at the start of step `stop`."""
    trainer = Trainer(recipe, plugins, Runtime())
    inner = trainer.step
    trainer.step = lambda step, batches: inner(step, batches) if step != stop else 1 / 0
    if stop is None:
        trainer.run()
    else:
        with pytest.raises(ZeroDivisionError):
            trainer.run()


def test_two_ranks_with_fsdp2_are_one_process(make_recipe, plugins, tmp_path):
    """Curves, weights and averages; with other numbers of micro-batches on each rank, and one run that moves from one
    process with all weights to two with shares and back to one.

    Drop path is drawn on each rank for itself: there two ranks with shares are two with all weights.
    """
    runs = {stage: make_recipe(stage, run_dir=str(tmp_path / stage), **RUNS[stage]) for stage in RUNS}
    moved = runs["distillation"]
    run_here(parse_recipe(moved.model_dump() | {"parallel": {}}), plugins, stop=2)
    dropped = [
        make_recipe(
            "alignment",
            run_dir=str(tmp_path / f"dropped-{strategy}"),
            parallel={"strategy": strategy},
            train={**UNEVEN, "steps": 3, "drop_path": {"rate": 0.5, "start_rate": 0.2}},
        )
        for strategy in ("fsdp2", "ddp")
    ]
    stops = {moved.run_dir: 4}
    everything = [*runs.values(), *dropped]
    run_ranks(
        [{"recipe": r.model_dump(mode="json"), "stop": stops.get(r.run_dir)} for r in everything], tmp_path
    )
    assert_same_run(*dropped, 2e-4, 1e-3)
    last = checkpoint.complete_checkpoints(moved.path / "checkpoints")[-1]
    assert checkpoint.read_state(last)["step"] == 3
    run_here(moved, plugins)  # FSDP2 on one process
    for stage, run in runs.items():
        assert read_summary(run.path)["num_workers"] == (1 if run is moved else 2)
        raw = run.model_dump() | {"parallel": {}, "run_dir": str(tmp_path / f"{stage}-alone")}
        alone = parse_recipe(raw)
        run_here(alone, plugins)
        assert read_summary(run.path)["tokens"] == read_summary(alone.path)["tokens"], (
            "of all ranks and starts"
        )
        assert_same_run(run, alone, *TOLERANCE[stage], steps=2 if stage == "alignment" else None)
    assert weights(moved, "final_ema").keys() == weights(moved).keys()


def test_two_ranks_asked_to_stop_while_they_are_prepared_both_do(make_recipe, tmp_path):
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "asked"))
    recipe.path.mkdir()
    (recipe.path / STOP_FILE).touch()
    run_ranks([{"recipe": recipe.model_dump(mode="json")}], tmp_path, code=EXIT_STOPPED)
    assert not read_metrics(recipe.path / "metrics.jsonl")
    assert not (recipe.path / "final").exists()


@pytest.mark.slow
def test_unequal_ranks_share_a_step_by_their_speed_and_compute_the_same(make_recipe, plugins, tmp_path):
    train = {"steps": 24, "micro_batch_tokens": 48, "min_fill": 0}
    alone = make_recipe("instruction_tuning", run_dir=str(tmp_path / "alone"), train=train)
    run_here(alone, plugins)
    resources = {"num_workers": 2, "balance": True}
    shared = make_recipe(
        "instruction_tuning", run_dir=str(tmp_path / "shared"), train=train, resources=resources
    )
    run_ranks([{"recipe": shared.model_dump(mode="json"), "slow": [1, 0.004]}], tmp_path)
    assert_same_run(shared, alone, 1e-2, 1e-2)  # who sums what follows the measured speeds
    shares = curve(shared, "largest_share")
    assert shares[0] == 0.5
    assert shares[-1] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_layers_are_the_layers(make_recipe, plugins, tmp_path, strategy):
    plain = make_recipe("alignment", run_dir=str(tmp_path / "plain"))
    run_here(plain, plugins)
    compiled = make_recipe(
        "alignment", run_dir=str(tmp_path / "compiled"), parallel={"strategy": strategy, "compile": True}
    )
    run_here(compiled, plugins)
    assert_same_run(compiled, plain, 1e-3, 1e-2)


def test_settings_of_fsdp2_are_refused_for_ddp(make_recipe):
    with pytest.raises(ValueError, match="reshard_after_forward False does nothing with strategy 'ddp'"):
        make_recipe("alignment", parallel={"reshard_after_forward": False})
