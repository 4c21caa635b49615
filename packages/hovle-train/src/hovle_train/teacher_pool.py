"""Teachers on nodes of their own: Ray actors that compute features for training workers, ahead of their steps.

A worker's data threads ask for the features of samples as they read them, and the step takes them. What is asked and
not yet taken is what the loader holds prepared, which is bounded: teachers never run ahead further than that, and a
step waits only where they are too slow.

A worker's samples of one step travel together, `TILES_A_CALL` tiles at a time, in the order of their positions: a
teacher computes few large batches, and the same ones after a restart.

Shapes: N tiles, n tiles of one sample, S tile side in pixels, h x w the teacher's grid, C its channels.
"""

import hashlib
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from torch import Tensor

from hovle_core.plugins import load_plugins
from hovle_core.processor import Encoded
from hovle_core.roles import TeacherEncoder
from hovle_data.streams import UnpairedStream
from hovle_train.config import Recipe

Ask = Callable[[int, np.ndarray], None]
Batch = TypeVar("Batch", bound=tuple[Any, ...])
TILES_A_CALL = 16
CALLS_AHEAD = 2  # of each teacher: one that it computes, and one that is on its way


class Teacher:
    """One teacher, as an actor; on a GPU where its pool has some."""

    def __init__(self, name: str, options: dict[str, Any], threads: int, on_gpu: bool):
        torch.set_num_threads(threads)
        self.teacher: TeacherEncoder = load_plugins().registry.build("teacher", name, **options)
        self.teacher.eval()
        self.device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
        self.teacher.to(self.device)

    def layer_sizes(self) -> list[int]:
        return list(self.teacher.layer_sizes)

    def features(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 `[n, 3, S, S]` -> float32 `[n, h, w, C]`."""
        batch = torch.from_numpy(tiles.copy()).to(self.device)  # arrays of the object store cannot be written
        features: np.ndarray = self.teacher.features(batch).float().cpu().numpy()
        return features


def pool_names(recipe: Recipe) -> list[str]:
    """Names of the actors of a run, which its workers find them by."""
    pool = recipe.resources.teacher_pool
    run = hashlib.sha256(str(recipe.path.resolve()).encode()).hexdigest()[:16]
    return [f"hovle-teacher-{run}-{i}" for i in range(pool.actors)] if pool is not None else []


def start_pool(recipe: Recipe) -> list[Any]:
    """The pool of a recipe on its nodes; it lives as long as the handles. Teachers that die are started again."""
    pool = recipe.resources.teacher_pool
    if pool is None:
        return []
    teacher, threads = recipe.stage.options["teacher"], max(1, int(pool.cpus))
    options: dict[str, Any] = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "resources": pool.custom,
        "max_restarts": -1,
        "max_task_retries": -1,
        **({"label_selector": pool.labels} if pool.labels else {}),
    }
    actor = ray.remote(Teacher)
    return [
        actor.options(name=name, **options).remote(
            teacher["name"], teacher.get("options", {}), threads, on_gpu=pool.gpus > 0
        )
        for name in pool_names(recipe)
    ]


class PooledTeacher(TeacherEncoder):
    """A teacher that others run. `ask` starts on the tiles of samples and `features` waits for what was asked.

    samples_per_step: so many positions are a step. They are sent together, when the next step is asked for or one of
        them is wanted.
    """

    def __init__(self, names: Sequence[str], samples_per_step: int = 1):
        super().__init__()
        self.samples_per_step = samples_per_step
        self._actors: list[Any] = [ray.get_actor(name) for name in names]
        self._turn = itertools.cycle(self._actors)
        self._layer_sizes: list[int] = ray.get(self._actors[0].layer_sizes.remote())
        self.feature_size = sum(self._layer_sizes)
        # Tile -> its call's answer and its row there, for each time it was asked for and not yet taken. In their order:
        # a teacher's last bits depend on what else is in a call, and must not on how far ahead was read.
        self._asked: defaultdict[bytes, deque[tuple[Any, int]]] = defaultdict(deque)
        self._waiting: dict[
            int, np.ndarray
        ] = {}  # position -> tiles [n, 3, S, S] of a step that is being read
        self._lock: threading.Lock = threading.Lock()  # data threads ask, the step takes

    @property
    def layer_sizes(self) -> Sequence[int]:
        return self._layer_sizes

    def ask(self, k: int, tiles: np.ndarray) -> None:
        """Start on the tiles of the sample at position k, uint8 `[n, S, S, 3]`."""
        step = k // self.samples_per_step
        with self._lock:
            if any(other // self.samples_per_step != step for other in self._waiting):
                self._send()
            self._waiting[k] = np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))

    def _send(self) -> None:
        """Ask for all that waits; the lock is held."""
        if not self._waiting:
            return
        # Data threads come in any order.
        tiles = np.concatenate([self._waiting[k] for k in sorted(self._waiting)])
        self._waiting = {}
        self._begin(tiles)

    def _begin(self, tiles: np.ndarray) -> None:
        """Have teachers start on tiles `[N, 3, S, S]`, in turn; the lock is held."""
        for start in range(0, len(tiles), TILES_A_CALL):
            sent = tiles[start : start + TILES_A_CALL]
            answer = next(self._turn).features.remote(sent)
            for row, tile in enumerate(sent):
                self._asked[_name(tile)].append((answer, row))

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they are, their last part tiles `[N, 3, S, S]`, while all teachers are at work on the next.

        Whoever takes one asks for the features of all its tiles before the next one.
        """
        begun: deque[Batch] = deque()
        try:
            for batch in batches:
                with self._lock:
                    self._begin(np.ascontiguousarray(batch[-1].numpy()))
                begun.append(batch)
                if sum(len(each[-1]) for each in begun) > CALLS_AHEAD * TILES_A_CALL * len(self._actors):
                    yield begun.popleft()
            while begun:
                yield begun.popleft()
        finally:  # nobody will ask for what is left
            for batch in begun:
                for tile in batch[-1].numpy():
                    self._take(_name(tile))

    def grid_features(self, tiles: Tensor) -> Tensor:
        """Features of tiles `[N, 3, S, S]`, `[N, h, w, C]`; those that nobody asked for are computed now."""
        arrays = tiles.cpu().numpy()
        found = [self._take(_name(tile)) for tile in arrays]
        missing = [i for i, answer in enumerate(found) if answer is None]
        if missing:
            now = next(self._turn).features.remote(arrays[missing])
            for row, i in enumerate(missing):
                found[i] = (now, row)
        wanted: list[tuple[Any, int]] = [answer for answer in found if answer is not None]
        answers: list[Any] = list(dict.fromkeys(answer for answer, _ in wanted))
        features = dict(zip(answers, ray.get(answers), strict=True))
        return torch.from_numpy(np.stack([features[answer][row] for answer, row in wanted])).to(tiles.device)

    def _take(self, name: bytes) -> tuple[Any, int] | None:
        with self._lock:
            if name not in self._asked:
                self._send()
            if name not in self._asked:
                return None
            taken = self._asked[name].popleft()
            if not self._asked[name]:
                del self._asked[name]
            return taken


def _name(tile: np.ndarray) -> bytes:
    return hashlib.blake2b(tile.tobytes(), digest_size=16).digest()


class AskingStream(UnpairedStream):
    """Asks for the features of each sample that it reads."""

    def __init__(self, ask: Ask, **options: Any):
        super().__init__(**options)
        self.ask = ask

    def get(self, k: int) -> Encoded | None:
        sample = super().get(k)
        if sample is not None and len(sample.tiles):
            self.ask(k, sample.tiles)
        return sample
