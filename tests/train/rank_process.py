"""One rank of a run over gloo, without Ray: `rank_process.py RANK WORLD JOBS`, with a JSON list of jobs.

A job is {"recipe": ..., "stop": s, "slow": [rank, seconds]}: the run is broken off at the start of step s, and one rank
takes seconds longer for each token, where given.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hovle_core.plugins import load_plugins
from hovle_core.registry import Provider, Spec
from hovle_train.loop import Trainer
from hovle_train.recipe_file import parse_recipe
from hovle_train.runtime import Runtime


class Stopped(Exception):
    """The run was broken off where a job said so."""


def run(job, plugins, runtime):
    trainer = Trainer(parse_recipe(job["recipe"]), plugins, runtime)
    inner, stop = trainer.step, job.get("stop")
    loss, (slow, seconds) = trainer.stage.loss, job.get("slow", (None, 0))

    def slow_loss(module, batch, totals):
        time.sleep(batch.num_tokens * seconds)
        return loss(module, batch, totals)

    if slow == runtime.rank:
        trainer.stage.loss = slow_loss

    def step(number, batches):
        if number == stop:
            raise Stopped
        return inner(number, batches)

    trainer.step = step
    try:
        trainer.run()
    except Stopped:
        runtime.barrier()


if __name__ == "__main__":
    rank, world, jobs = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{jobs.with_suffix('.store')}", rank=rank, world_size=world
    )
    loaded = load_plugins()
    loaded.registry.add("teacher", Spec("grid", "hovle_core.testing:GridTeacher"), Provider("tests", "0"))
    for each in json.loads(jobs.read_text()):
        run(each, loaded, Runtime(rank, world))
    dist.destroy_process_group()
