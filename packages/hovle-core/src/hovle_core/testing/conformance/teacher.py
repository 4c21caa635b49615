"""Conformance of teachers (`hovle_core.roles.TeacherEncoder`)."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hovle_core.registry import Registry
from hovle_core.roles import TeacherEncoder
from hovle_core.testing.conformance.base import SpecTests, build, is_refused


class TeacherTests(SpecTests):
    """A frozen encoder: uint8 tiles `[N, 3, S, S]` -> float features `[N, h, w, feature_size]`, S = `side`."""

    kind = "teacher"
    side: ClassVar[int] = 112

    @pytest.fixture(scope="class")
    @classmethod
    def tiles(cls) -> Tensor:
        """Three pictures of coloured cells, uint8 `[3, 3, S, S]`."""
        cells = torch.randint(0, 256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
        return nn.functional.interpolate(cells, (cls.side, cls.side)).to(torch.uint8)

    def test_is_a_teacher(self, subject: Any) -> None:
        """Stages call `features`, which checks tiles and switches gradients off."""
        assert isinstance(subject, TeacherEncoder), (
            f"the target returns a {type(subject).__name__}: make it a subclass of hovle_core.roles.TeacherEncoder"
        )

    def test_features_are_as_declared(self, subject: TeacherEncoder, tiles: Tensor) -> None:
        """The projection of the student is made for `feature_size` channels before a feature is seen."""
        features = subject.features(tiles)
        assert features.ndim == 4, f"features must be [N, h, w, C], got {list(features.shape)}"
        assert len(features) == len(tiles), f"{len(tiles)} tiles gave {len(features)} grids"
        channels = features.shape[-1]
        assert channels == subject.feature_size, (
            f"feature_size says {subject.feature_size}, the features {list(features.shape)} have {channels} channels "
            "(the channels come last)"
        )
        assert features.is_floating_point(), f"features are {features.dtype}: give floats"
        assert features.isfinite().all(), "features hold NaN or infinity: are the tiles normalised?"

    def test_same_tiles_same_features(self, subject: TeacherEncoder, tiles: Tensor) -> None:
        """Features are cached and runs are resumed: a target that changes between two looks is noise."""
        assert torch.equal(subject.features(tiles), subject.features(tiles)), (
            "the same tiles gave other features the second time: is dropout on, or augmentation?"
        )

    def test_a_tile_does_not_see_its_neighbours(self, subject: TeacherEncoder, tiles: Tensor) -> None:
        """How samples are packed into batches must not change what is learnt."""
        whole = subject.features(tiles)
        alone = torch.cat([subject.features(tile[None]) for tile in tiles])
        assert torch.allclose(whole, alone, rtol=1e-3, atol=1e-3 * float(whole.std())), (
            f"features of a tile depend on the batch around it (up to {float((whole - alone).abs().max()):.2g}): "
            "is batch normalisation in training mode?"
        )

    def test_rows_and_columns_are_where_they_are_in_the_picture(self, subject: TeacherEncoder) -> None:
        """The student's token at a place learns the feature of that place: a turned grid teaches nonsense."""
        plain = torch.full((1, 3, self.side, self.side), 128, dtype=torch.uint8)
        painted = plain.clone()
        half = self.side // 2
        painted[:, 0, half:, :half] = 255  # red, lower left
        change = (subject.features(painted) - subject.features(plain)).norm(dim=-1)[0]
        h, w = change.shape
        quarters = {
            f"{row} {column}": float(change[rows, columns].mean())
            for row, rows in (("upper", slice(0, max(1, h // 2))), ("lower", slice(h // 2, h)))
            for column, columns in (("left", slice(0, max(1, w // 2))), ("right", slice(w // 2, w)))
        }
        assert any(quarters.values()), "painting a quarter of the picture red changed no feature"
        if h > 1 and w > 1:  # a single cell has no place
            most = max(quarters, key=lambda place: quarters[place])
            assert most == "lower left", (
                f"painting the lower left changed the {most} of the grid most: {quarters}"
            )

    def test_is_frozen(self, subject: TeacherEncoder, tiles: Tensor) -> None:
        """A teacher never trains: what requires a gradient costs memory and may move."""
        trains = [name for name, p in subject.named_parameters() if p.requires_grad]
        assert not trains, (
            f"these require gradients: {trains[:3]}; call self.requires_grad_(False) at the end"
        )
        assert not subject.features(tiles).requires_grad, "features() carries a gradient"

    def test_stays_in_eval(self, subject: TeacherEncoder, tiles: Tensor) -> None:
        """The loop calls `.train()` on what is around it; dropout and batch statistics must stay off."""
        before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
        nn.ModuleDict({"teacher": subject}).train(True)
        training = [
            name or "the teacher itself" for name, module in subject.named_modules() if module.training
        ]
        assert not training, (
            f".train() of a parent reached {training[:3]}: keep TeacherEncoder.train as it is"
        )
        subject.features(tiles)
        moved = [
            name for name, tensor in subject.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        assert not moved, f"looking at tiles changed {moved[:3]}"

    def test_refuses_tiles_that_are_normalised_already(self, subject: TeacherEncoder, tiles: Tensor) -> None:
        """Normalised twice, features are wrong and nothing else shows it."""
        assert is_refused(lambda: subject.features(tiles.float() / 255)), (
            "float tiles were taken: override grid_features and leave TeacherEncoder.features as it is"
        )

    def test_survives_saving_and_loading(
        self,
        subject: TeacherEncoder,
        registry: Registry,
        arguments: dict[str, Any],
        tiles: Tensor,
        tmp_path: Path,
    ) -> None:
        """A resumed run builds the teacher anew, and must find the same one."""
        state = {name: tensor.clone().contiguous() for name, tensor in subject.state_dict().items()}
        again = build(registry, self.kind, self.name, arguments, seed=1)
        if state:  # a teacher without weights has nothing to load
            save_file(state, tmp_path / "teacher.safetensors")
            again.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
        assert torch.equal(again.features(tiles), subject.features(tiles)), (
            "built again with the same weights, its features differ: what they depend on must be in the state dict "
            "(register_buffer) or follow from the options"
        )
