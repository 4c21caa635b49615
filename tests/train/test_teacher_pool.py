"""What a worker sends to its pool of teachers, and what it gets back; the pool is this process here, and actors on a
node of their own in test_ray_cluster.py."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hovle_core.roles import TeacherEncoder
from hovle_train import teacher_pool
from hovle_train.teacher_pool import TILES_A_CALL, PooledTeacher, Teacher, _name


class Colours(TeacherEncoder):
    """Mean colours of a grid: no sum goes over several tiles, so a batch changes no bit."""

    feature_size = 3

    def grid_features(self, tiles):
        return F.adaptive_avg_pool2d(tiles.float(), 2).permute(0, 2, 3, 1)


class Method:
    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def remote(self, *args):
        self.calls.append(args)
        return Answer(self.function(*args))


class Answer:
    def __init__(self, value):
        self.value = value


class Actor:
    """A teacher called as Ray's actors are."""

    def __init__(self):
        teacher = Teacher.__new__(Teacher)
        teacher.teacher, teacher.device = Colours(), torch.device("cpu")
        self.calls: list = []
        self.features = Method(teacher.features, self.calls)
        self.layer_sizes = Method(teacher.layer_sizes, [])


@pytest.fixture
def actors(monkeypatch):
    made = {name: Actor() for name in ("a", "b")}
    monkeypatch.setattr(teacher_pool.ray, "get_actor", made.get)
    monkeypatch.setattr(
        teacher_pool.ray, "get", lambda x: [y.value for y in x] if isinstance(x, list) else x.value
    )
    return list(made.values())


def samples(count, tiles=(1, 3, 2)):
    draw = np.random.default_rng(0)
    sizes = itertools.islice(itertools.cycle(tiles), count)
    return [draw.integers(0, 256, (n, 56, 56, 3), dtype=np.uint8) for n in sizes]


def as_tiles(arrays):
    return torch.from_numpy(np.concatenate(arrays)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("order", [list(range(24)), [1, 0, *range(11, 1, -1), *range(12, 24)]])
def test_a_step_is_few_calls_and_the_features_are_a_samples_own(actors, order):
    """Two steps of 12 samples, which data threads may read in any order within a step."""
    pool, given = PooledTeacher(["a", "b"], samples_per_step=12), samples(24)
    for k in order:
        pool.ask(k, given[k])
    sent = [args[0] for actor in actors for args in actor.calls]
    assert sum(len(tiles) for tiles in sent) == 24, "the first step's, when the second one was begun"
    assert max(len(tiles) for tiles in sent) == TILES_A_CALL
    assert np.array_equal(sent[0], as_tiles(given[:12])[:TILES_A_CALL].numpy()), "in order of their positions"
    for k in (23, *range(23)):
        alone = Colours().features(as_tiles([given[k]]))
        assert torch.equal(pool.features(as_tiles([given[k]])), alone)
    assert not pool._asked
    assert not pool._waiting
    assert sum(len(actor.calls) for actor in actors) == 4


def test_a_tile_of_two_steps_comes_from_its_own_step_s_call_each_time(actors):
    """However far ahead was read: a teacher's last bits depend on what else is in a call."""
    pool, (one, *others) = PooledTeacher(["a", "b"], samples_per_step=2), samples(4)
    asked = [one, others[0], one, others[1]]
    for k, sample in enumerate([*asked, others[2]]):
        pool.ask(k, sample)  # both steps are sent before the first is taken
    sent = [answer for answer, _ in pool._asked[_name(as_tiles([one])[0].numpy())]]
    assert len(set(sent)) == 2
    for step in range(2):
        assert pool._take(_name(as_tiles([one])[0].numpy()))[0] is sent[step]


def test_tiles_asked_for_twice_and_never(actors):
    pool, (one, two, three) = PooledTeacher(["a", "b"], samples_per_step=2), samples(3)
    pool.ask(0, one)
    pool.ask(1, one)
    expected = Colours().features(as_tiles([one, two, three]))
    assert torch.equal(pool.features(as_tiles([one, two, three])), expected)
    assert torch.equal(pool.features(as_tiles([one])), expected[:1])
    assert not pool._asked
    assert [len(args[0]) for actor in actors for args in actor.calls] == [2, 5]


def test_all_teachers_look_at_batches_ahead_and_what_nobody_took_is_forgotten(actors):
    pool = PooledTeacher(["a", "b"])
    batches = [(n, as_tiles(samples(9))) for n in range(6)]  # 18 tiles each, the same ones
    expected = Colours().features(batches[0][1])
    for n, (number, tiles) in enumerate(pool.ahead(batches)):
        assert n == number
        assert torch.equal(pool.features(tiles), expected)
    assert [len(actor.calls) for actor in actors] == [6, 6], "16 and 2 tiles of each batch"
    assert not pool._asked
    read = []
    taken = pool.ahead(read.append(batch) or batch for batch in batches)
    next(taken)
    assert len(read) == 4, "as many as keep two teachers at work on two calls each"
    pool.features(batches[0][1])
    taken.close()
    assert not pool._asked


def test_a_pool_without_gpus_leaves_those_of_its_node_alone(plugins, monkeypatch):
    monkeypatch.setattr(teacher_pool, "load_plugins", lambda: plugins)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(TeacherEncoder, "to", lambda teacher, device: teacher)
    assert Teacher("grid", {}, 1, on_gpu=False).device.type == "cpu"
    assert Teacher("grid", {}, 1, on_gpu=True).device.type == "cuda"
