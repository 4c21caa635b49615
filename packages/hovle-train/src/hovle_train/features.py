"""Teacher features: brought to the student's grid, centred, and computed once for a run where asked.

Shapes: N tiles, P image tokens a tile (a square grid), C teacher channels, S tile side in pixels.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hovle_core.roles import TeacherEncoder
from hovle_train.feature_store import FEATURES, INDEX, GrowingStore

logger = logging.getLogger(__name__)

CENTRE_TILES = 512


def to_student_grid(features: Tensor, num_tokens: int) -> Tensor:
    """`[N, h, w, C]` -> `[N, P, C]`: averaged down or interpolated up to the student's square grid, row by row."""
    side = round(num_tokens**0.5)
    x = features.permute(0, 3, 1, 2).float()
    if x.shape[2] < side or x.shape[3] < side:
        x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    elif x.shape[2:] != (side, side):
        x = F.adaptive_avg_pool2d(x, side)
    return x.flatten(2).transpose(1, 2)


class TeacherFeatures:
    """Features `[N, P, C]` of tiles by key, minus the mean over the data; from a teacher, or from a store on disk.

    `connected`: as the teacher's own connector gives them. Raises ValueError where it has none.
    """

    def __init__(
        self, teacher: TeacherEncoder, num_tokens: int, centre: bool = True, connected: bool = False
    ):
        self.teacher, self.num_tokens, self.centre = teacher, num_tokens, centre
        size = teacher.connector_size if connected else teacher.feature_size
        if size is None:
            raise ValueError(f"{type(teacher).__name__} has no connector to distil from")
        self.size, self.connected = size, connected
        self.mean = torch.zeros(self.size)
        self._store: np.ndarray | None = None
        self._rows: dict[str, int] = {}

    def compute(self, tiles: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]` -> `[N, P, C]` through the teacher, not centred."""
        features = self.teacher.connected_features if self.connected else self.teacher.features
        return to_student_grid(features(tiles), self.num_tokens)

    def set_mean(self, samples: Iterable[Tensor]) -> None:
        """Centre by the mean feature of the first tiles of `samples` (uint8 `[N, 3, S, S]` each)."""
        if not self.centre:
            return
        total, count = torch.zeros(self.size, dtype=torch.float64), 0
        for tiles in samples:
            features = self.compute(tiles)
            total += features.double().sum((0, 1)).cpu()
            count += features.shape[0] * features.shape[1]
            if count >= CENTRE_TILES * self.num_tokens:
                break
        self.mean = (total / max(1, count)).float()

    def get(self, keys: Sequence[str], tiles: Tensor) -> Tensor:
        """Centred features of tiles `[N, 3, S, S]` with these keys, on the tiles' device."""
        if self._store is None:
            raw = self.compute(tiles)
        else:
            if missing := [key for key in keys if key not in self._rows]:
                raise ValueError(
                    f"no teacher features for {missing[:3]}: delete the run's teacher_features folder"
                )
            rows = [self._rows[key] for key in keys]
            raw = torch.from_numpy(self._store[rows]).to(tiles.device, torch.float32)
        return raw - self.mean.to(raw.device)

    def open_store(self, folder: Path, made_by: Any = None) -> bool:
        """Use features computed before, if `folder` holds a whole store of this teacher and data (`made_by`, any
        JSON; None: whatever it is of); returns whether it does."""
        index = folder / INDEX
        if not index.is_file():
            return False
        try:
            content = json.loads(index.read_text())
            if made_by is not None and content["made_by"] != json.loads(json.dumps(made_by)):
                return False
            shape = tuple(content["shape"])
            self._store = np.memmap(folder / FEATURES, dtype=np.float16, mode="r", shape=shape)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            logger.warning("teacher features in %s are damaged (%s): they are computed again", folder, error)
            return False
        self._rows = {key: row for row, key in enumerate(content["keys"])}
        self.mean = torch.tensor(content["mean"])
        return True

    def build_store(
        self,
        folder: Path,
        batches: Callable[[int], Iterable[tuple[int, list[str], Tensor]]],
        progress: Callable[[int], None] | None = None,
        made_by: Any = None,
    ) -> None:
        """Run the teacher once over all batches, into `folder` (float16), then use it.

        batches: those from a position on (0: all), as (position behind it, keys, tiles); an earlier start that ended
        in the middle is gone on behind. The mean is that of the whole store. The index is written last, so that half
        a store is never opened.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with GrowingStore(folder, (self.num_tokens, self.size), made_by) as store:
            for position, keys, tiles in batches(store.position):
                store.add(position, keys, self.compute(tiles).cpu())
                if progress is not None:
                    progress(len(store.keys))
        count = max(1, len(store.keys) * self.num_tokens)
        mean = (store.total / count).tolist() if self.centre else [0.0] * self.size
        index = folder / "index.tmp"
        shape = [len(store.keys), self.num_tokens, self.size]
        content = {"keys": store.keys, "mean": mean, "shape": shape, "made_by": made_by}
        with index.open("w") as file:
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        (folder / INDEX).unlink(missing_ok=True)  # of another store
        os.replace(store.features, folder / FEATURES)
        os.replace(index, folder / INDEX)
        store.remove_lines()
        self.open_store(folder, made_by)
