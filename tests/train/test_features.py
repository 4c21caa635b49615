"""Teacher features on the student's grid."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from hovle_core.patch_embed import pixel_shuffle
from hovle_core.testing import GridTeacher
from hovle_train import feature_store
from hovle_train.features import TeacherFeatures, to_student_grid


def test_grids_are_averaged_down_or_interpolated_up():
    grid = torch.arange(16.0).view(1, 4, 4, 1)
    assert torch.equal(to_student_grid(grid, 16), grid.view(1, 16, 1))
    down = to_student_grid(grid, 4)
    assert down.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    up = to_student_grid(down.view(1, 2, 2, 1), 16)
    assert up.shape == (1, 16, 1)
    assert up.min() >= 2.5
    assert up.max() <= 12.5


def test_student_tokens_are_row_major_as_the_teachers():
    """Pixel shuffle keeps the order of places: token k is block (k // side, k % side) of the grid of patches."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    patches = torch.stack([rows, columns], -1).view(1, 16, 2)
    tokens = pixel_shuffle(patches, 2).view(4, 4, 2)
    places = (tokens // 2).amin(1)
    assert places.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_centred_features_have_no_mean():
    features = TeacherFeatures(GridTeacher(), num_tokens=4)
    tiles = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    features.set_mean([tiles])
    assert features.get([""] * 16, tiles).mean((0, 1)).abs().max() < 1e-5
    plain = TeacherFeatures(GridTeacher(), num_tokens=4, centre=False)
    plain.set_mean([tiles])
    assert plain.get([""] * 16, tiles).mean((0, 1)).abs().max() > 0.1


def test_teachers_take_uint8_only_and_stay_in_eval():
    teacher = GridTeacher()
    with pytest.raises(ValueError, match="uint8"):
        teacher.features(torch.rand(1, 3, 8, 8))
    assert not teacher.train().training
    assert not teacher.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).requires_grad


def test_half_a_store_is_not_opened(tmp_path):
    features = TeacherFeatures(GridTeacher(), num_tokens=4)

    def batches(first):
        yield 1, ["a"], torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        features.build_store(tmp_path / "store", batches)
    assert not TeacherFeatures(GridTeacher(), num_tokens=4).open_store(tmp_path / "store")


def test_a_store_of_another_teacher_is_built_anew(tmp_path):
    features = TeacherFeatures(GridTeacher(), num_tokens=4)
    tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    features.build_store(tmp_path, lambda first: [(2, ["a", "b"], tiles)], made_by={"teacher": 1})
    assert TeacherFeatures(GridTeacher(), num_tokens=4).open_store(tmp_path, {"teacher": 1})
    assert not TeacherFeatures(GridTeacher(), num_tokens=4).open_store(tmp_path, {"teacher": 2})
    with pytest.raises(ValueError, match="no teacher features for \\['c'\\]"):
        features.get(["c"], tiles[:1])


def batches_of(tiles, at_third=lambda: None):
    """Four batches of four tiles, from a position on."""

    def batches(first):
        for start in range(first, 16, 4):
            if start == 8:
                at_third()
            yield start + 4, [f"k{n}" for n in range(start, start + 4)], tiles[start : start + 4]

    return batches


class Counting(GridTeacher):
    seen = 0

    def features(self, tiles):
        self.seen += len(tiles)
        return super().features(tiles)


@pytest.fixture
def broken_off(tmp_path, monkeypatch):
    """A whole store, and what a kill before its third batch leaves: more bytes and half a line behind what is sure."""
    monkeypatch.setattr(feature_store, "SYNC_SECONDS", 0)
    tiles = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    batches = batches_of(tiles, lambda: shutil.copytree(whole, killed))
    TeacherFeatures(GridTeacher(), num_tokens=4).build_store(whole, batches, made_by="a")
    for name in ("features.tmp", "rows.tmp"):
        with (killed / name).open("ab") as file:
            file.write(b'{"position": 99')
    return tiles, whole, killed


def test_a_store_that_was_broken_off_is_gone_on_with(broken_off):
    tiles, whole, killed = broken_off
    features = TeacherFeatures(Counting(), num_tokens=4)
    features.build_store(killed, batches_of(tiles), made_by="a")
    assert features.teacher.seen == 8
    assert {path.name for path in killed.iterdir()} == {"features.float16", "index.json"}
    for name in ("features.float16", "index.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["index.json", "features.float16"])
@pytest.mark.parametrize("spoil", [emptied, Path.unlink])
def test_a_damaged_store_is_computed_again(name, spoil, broken_off, caplog):
    tiles, whole, _ = broken_off
    content = (whole / name).read_bytes()
    spoil(whole / name)
    features = TeacherFeatures(Counting(), num_tokens=4)
    assert not features.open_store(whole, "a")
    assert ("are damaged" in caplog.text) == (whole / "index.json").exists()
    features.build_store(whole, batches_of(tiles), made_by="a")
    assert (whole / name).read_bytes() == content
    assert TeacherFeatures(GridTeacher(), num_tokens=4).open_store(whole, "a")


def lost(folder):
    (folder / "features.tmp").write_bytes(b"0" * 8)


def scribbled(folder):
    (folder / "rows.tmp").write_text('["not", "a", "head"]\n{"position": 4}\n')


@pytest.mark.parametrize(("spoil", "made_by"), [(lost, "a"), (scribbled, "a"), (lambda folder: None, "b")])
def test_what_is_not_of_this_store_is_not_gone_on_with(broken_off, spoil, made_by):
    tiles, whole, killed = broken_off
    spoil(killed)
    features = TeacherFeatures(Counting(), num_tokens=4)
    features.build_store(killed, batches_of(tiles), made_by=made_by)
    assert features.teacher.seen == 16
    assert (killed / "features.float16").read_bytes() == (whole / "features.float16").read_bytes()


def test_features_whose_index_found_no_room_are_not_computed_again(tmp_path, monkeypatch):
    tiles, store = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), tmp_path / "store"
    replace = os.replace

    def full(source, target):
        if Path(target).name == "index.json":
            raise OSError("no room")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no room"):
            TeacherFeatures(GridTeacher(), num_tokens=4).build_store(store, batches_of(tiles), made_by="a")
    features = TeacherFeatures(Counting(), num_tokens=4)
    assert not features.open_store(store)
    features.build_store(store, batches_of(tiles), made_by="a")
    assert features.teacher.seen == 0
    fresh = TeacherFeatures(GridTeacher(), num_tokens=4)
    fresh.build_store(tmp_path / "fresh", batches_of(tiles), made_by="a")
    for name in ("features.float16", "index.json"):
        assert (store / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_batch_that_failed_is_not_kept(tmp_path, monkeypatch):
    """Out of memory, say: neither its rows nor its share of the mean."""
    tiles = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)

    class Failing(GridTeacher):
        def features(self, tiles):
            found = super().features(tiles)
            if float(tiles.float().sum()) == float(self.bad.float().sum()):
                raise MemoryError
            return found

    teacher = Failing()
    teacher.bad = tiles[8:12]
    with pytest.raises(MemoryError):
        TeacherFeatures(teacher, num_tokens=4).build_store(tmp_path / "failed", batches_of(tiles))
    again = TeacherFeatures(Counting(), num_tokens=4)
    again.build_store(tmp_path / "failed", batches_of(tiles))
    assert again.teacher.seen == 8
    TeacherFeatures(GridTeacher(), num_tokens=4).build_store(tmp_path / "fresh", batches_of(tiles))
    assert (tmp_path / "failed" / "index.json").read_bytes() == (
        tmp_path / "fresh" / "index.json"
    ).read_bytes()
