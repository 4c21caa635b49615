"""Teacher features on the student's grid."""

import pytest
import torch

from hovle_core.patch_embed import pixel_shuffle
from hovle_core.testing import GridTeacher
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

    def batches():
        yield ["a"], torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        features.build_store(tmp_path / "store", batches())
    assert not TeacherFeatures(GridTeacher(), num_tokens=4).open_store(tmp_path / "store")


def test_a_store_of_another_teacher_is_built_anew(tmp_path):
    features = TeacherFeatures(GridTeacher(), num_tokens=4)
    tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    features.build_store(tmp_path, [(["a", "b"], tiles)], made_by={"teacher": 1})
    assert TeacherFeatures(GridTeacher(), num_tokens=4).open_store(tmp_path, {"teacher": 1})
    assert not TeacherFeatures(GridTeacher(), num_tokens=4).open_store(tmp_path, {"teacher": 2})
    with pytest.raises(ValueError, match="no teacher features for \\['c'\\]"):
        features.get(["c"], tiles[:1])
