"""How full packed rows are and how even the ranks' work is: metrics of every run, and the end of a wasteful one."""

from collections.abc import Sequence

from hovle_data.packing import PackedBatch
from hovle_train.recipe_sections import TrainConfig
from hovle_train.runtime import Runtime

MIN_ROWS = 20  # a share of fewer rows says little


class PoorFill(ValueError):
    """Rows stay emptier than `train.min_fill`."""


class Fill:
    """Counts this rank's rows and, over all ranks, says

    fill, tile_fill: tokens and tiles in rows, as shares of `micro_batch_tokens` and `micro_batch_tiles`.
    imbalance: tokens of the fullest rank over those of the mean one, averaged over steps; 1 is even.

    Of `global_batch_size` samples a step, only ranks that need several rows for their share are judged: a row that
    holds all of it is as full as it can be, and rows are not padded.
    """

    def __init__(self, train: TrainConfig, runtime: Runtime):
        self.train, self.runtime = train, runtime
        self._steps: list[
            tuple[int, int, int]
        ] = []  # tokens, tiles, rows of this rank since the last `measure`
        self._judged = {"tokens": 0.0, "tiles": 0.0, "rows": 0.0}  # of all ranks, since the start

    def add(self, rows: Sequence[PackedBatch]) -> None:
        """Count one step."""
        self._steps.append(
            (sum(row.num_tokens for row in rows), sum(row.num_tiles for row in rows), len(rows))
        )

    def measure(self) -> dict[str, float]:
        """The metrics of the steps since the last call, which all ranks make together.

        Raises PoorFill on all of them once rows have been less full than `train.min_fill`, naming what fills them.
        """
        steps, self._steps = self._steps, []
        judged = [s for s in steps if self.train.global_batch_rows is not None or s[2] > 1]
        local = {f"{name} of all": float(sum(s[i] for s in steps)) for i, name in enumerate(self._judged)}
        local |= {f"judged {name}": float(sum(s[i] for s in judged)) for i, name in enumerate(self._judged)}
        ranks = range(self.runtime.world_size)
        for number, (tokens, _, _) in enumerate(steps):
            local |= {f"{number}/{rank}": float(tokens) * (rank == self.runtime.rank) for rank in ranks}
        counted = self.runtime.sum(local)
        for name in self._judged:
            self._judged[name] += counted[f"judged {name}"]
        self._judge()
        rows = counted["rows of all"] or 1.0
        by_step = [[counted[f"{number}/{rank}"] for rank in ranks] for number in range(len(steps))]
        return {
            "fill": counted["tokens of all"] / rows / self.train.micro_batch_tokens,
            "tile_fill": counted["tiles of all"] / rows / self.train.micro_batch_tiles,
            "imbalance": sum(max(t) * len(t) / (sum(t) or 1) if any(t) else 1 for t in by_step)
            / (len(steps) or 1),
        }

    def _judge(self) -> None:
        tokens, tiles, rows = self._judged.values()
        if rows < MIN_ROWS:
            return
        fill = tokens / rows / self.train.micro_batch_tokens
        tile_fill = tiles / rows / self.train.micro_batch_tiles
        if fill >= self.train.min_fill:
            return
        if tile_fill > fill:
            reason = (
                f"tiles fill them first ({tile_fill:.0%} of micro_batch_tiles={self.train.micro_batch_tiles}): raise "
                f"micro_batch_tiles, or lower micro_batch_tokens to about {int(tokens / rows * 1.1)}"
            )
        else:
            reason = "few samples fit side by side: raise micro_batch_tokens, or look for overlong samples"
        raise PoorFill(
            f"packed rows are {fill:.0%} full of micro_batch_tokens={self.train.micro_batch_tokens}, below "
            f"train.min_fill={self.train.min_fill}: {reason}. min_fill=0 goes on regardless"
        )
