"""Full rows: measured over ranks, written to metrics.jsonl, a reason to stop; and steps of rows resume exactly."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hovle_train import checkpoint
from hovle_train.fill import Fill, PoorFill
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.recipe_file import parse_recipe
from hovle_train.recipe_sections import TrainConfig
from hovle_train.runtime import Runtime


def rows(*sizes):
    return [SimpleNamespace(num_tokens=tokens, num_tiles=tiles) for tokens, tiles in sizes]


def config(**kwargs):
    steps = {} if "global_batch_rows" in kwargs else {"global_batch_size": 8}
    return TrainConfig(steps=1, micro_batch_tokens=100, micro_batch_tiles=10, **steps, **kwargs)


class Threads(Runtime):
    """A rank in a thread: `sum` adds over all of them."""

    def sum(self, values):
        self.shared[self.rank] = values
        self.barrier_.wait(10)
        total = {name: sum(of_rank[name] for of_rank in self.shared.values()) for name in values}
        self.barrier_.wait(10)
        return total


def test_fill_and_imbalance_are_those_of_all_ranks():
    shared, barrier, measured = {}, threading.Barrier(2), {}
    of_rank = [
        [rows((90, 5), (50, 5)), rows((60, 0))],  # steps of rank 0: 140 and 60 tokens
        [rows((60, 10)), rows((20, 2))],  # and of rank 1: 60 and 20
    ]

    def work(rank):
        runtime = Threads(rank=rank, world_size=2)
        runtime.shared, runtime.barrier_ = shared, barrier
        fill = Fill(config(), runtime)
        for step in of_rank[rank]:
            fill.add(step)
        measured[rank] = fill.measure()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured[0] == measured[1]
    assert measured[0] == pytest.approx(
        {"fill": 280 / 500, "tile_fill": 22 / 50, "imbalance": (140 / 100 + 60 / 40) / 2}
    )


def test_steps_without_a_sample_are_even_and_empty():
    fill = Fill(config(), Runtime())
    fill.add([])
    assert fill.measure() == {"fill": 0, "tile_fill": 0, "imbalance": 1}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30, 10), "30% full of micro_batch_tokens=100, below .*tiles fill them first .100% of .*micro_batch_tiles, or "
         "lower micro_batch_tokens to about 33"),
        ((45, 2), "45% full .*raise micro_batch_tokens, or look for overlong"),
    ],
)  # fmt: skip
def test_rows_below_half_full_stop_the_run_with_the_reason(size, message):
    fill = Fill(config(global_batch_rows=4), Runtime())
    for _ in range(4):
        fill.add(rows(*[size] * 4))
        fill.measure()  # sixteen rows say too little
    fill.add(rows(*[size] * 4))
    with pytest.raises(PoorFill, match=message):
        fill.measure()
    regardless = Fill(config(global_batch_rows=4, min_fill=0.3), Runtime())
    for _ in range(9):
        regardless.add(rows(*[size] * 4))
    regardless.measure()


def test_one_row_that_holds_a_whole_step_is_not_judged():
    fill = Fill(config(), Runtime())
    for _ in range(100):
        fill.add(rows((10, 1)))
    assert fill.measure()["fill"] == pytest.approx(0.1)
    for _ in range(10):
        fill.add(rows((10, 9), (20, 9)))
    with pytest.raises(PoorFill, match="15% full"):
        fill.measure()


def test_a_run_with_too_few_tiles_a_row_stops(make_recipe, plugins):
    train = {"steps": 20, "micro_batch_tokens": 512, "micro_batch_tiles": 2}
    trainer = Trainer(make_recipe("alignment", train=train), plugins, Runtime())
    with pytest.raises(PoorFill, match="tiles fill them first"):
        trainer.run()


ROWS = {"global_batch_size": None, "global_batch_rows": 4}


def test_steps_of_rows_resume_bit_for_bit(make_recipe, plugins, tmp_path, run_killed_after):
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"), train=ROWS)
    Trainer(whole, plugins, Runtime()).run()
    broken = make_recipe("alignment", run_dir=str(tmp_path / "broken"), train=ROWS, data={"num_threads": 2})
    trainer = Trainer(broken, plugins, Runtime())
    run_killed_after(trainer, 5)
    (_, newest) = checkpoint.complete_checkpoints(trainer.checkpoints)
    lanes = checkpoint.read_state(newest)["data"]
    assert sorted(lanes) == ["0", "1", "2", "3"]
    assert any(len(lane) > 1 for lane in lanes.values())  # samples that wait in windows
    Trainer(broken, plugins, Runtime()).run()
    a, b = (load_file(recipe.path / "final" / "model.safetensors") for recipe in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    names = ("step", "loss", "fill", "tile_fill", "imbalance")
    curves = [
        [[line[name] for name in names] for line in read_metrics(r.path / "metrics.jsonl")]
        for r in (whole, broken)
    ]
    assert curves[0] == curves[1]
    assert all(line[2] > 0.6 and line[4] == 1 for line in curves[0])


GATHER = """
import sys, torch.distributed as dist
from hovle_train.runtime import Runtime
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
value = {str(rank): [rank, *range(30 * rank)], "ü": None}
assert Runtime(rank, 2).gather(value) == [{"0": [0], "ü": None}, {"1": [1, *range(30)], "ü": None}]
dist.barrier()
dist.destroy_process_group()  # else gloo's threads may outlive the interpreter, which aborts
"""


def test_ranks_gather_json(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", GATHER, str(rank), str(tmp_path / "store")])
        for rank in range(2)
    ]
    assert [rank.wait(60) for rank in ranks] == [0, 0]


@pytest.mark.parametrize(
    "train", [{"steps": 1}, {"steps": 1, "global_batch_size": 4, "global_batch_rows": 4}]
)
def test_a_step_is_samples_or_rows(train):
    with pytest.raises(ValueError, match="train: .*either global_batch_size"):
        parse_recipe({"stage": {"name": "x"}, "run_dir": "r", "optim": {"lr": 1}, "train": train})
