"""Where a loop runs: which rank it is, on which device, and how ranks agree. Ray or a plain process, one interface."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _no_report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
    """Nobody is listening: a plain process has no Ray to tell."""


def _no_give_up(message: str) -> None:
    """Nobody would start this process again."""


@dataclass
class Runtime:
    """One worker of a run. `report` tells Ray Train of metrics and checkpoints; every rank must call it alike.
    `give_up` says, before this process ends, why the run should not be tried again. `is_losing_node`, of a cluster that
    can tell, is whether it is about to take a node of the run away; every rank must call it alike, too."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[dict[str, Any], Path | None], None] = _no_report
    give_up: Callable[[str], None] = _no_give_up
    is_losing_node: Callable[[], bool] | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over ranks; all ranks must pass the same keys."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(
            [values[key] for key in sorted(values)], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(tensor)
        return dict(zip(sorted(values), tensor.tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        data = json.dumps(value).encode()
        longest = max(
            self.sum({str(r): len(data) * (r == self.rank) for r in range(self.world_size)}).values()
        )
        padded = torch.tensor(list(data.ljust(int(longest))), dtype=torch.uint8, device=self.device)
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return [json.loads(bytes(tensor.tolist())) for tensor in gathered]

    @property
    def is_torn_down(self) -> bool:
        """Whether the group of ranks was ended under this one, as Ray does when another one dies."""
        return self.world_size > 1 and not dist.is_initialized()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
