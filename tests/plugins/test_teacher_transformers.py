"""Vision towers of transformers: tiny random checkpoints on disk keep the suite, and give what transformers gives."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from hovle_core.testing.conformance import TeacherTests
from hovle_teacher_transformers.internvl import InternVLTower
from hovle_teacher_transformers.teacher import VisionTower

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 56, "patch_size": 14}
TEXT = {**SIZES, "vocab_size": 99}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def clip():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))


def siglip():
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


def siglip2():
    return Siglip2Model(
        Siglip2Config(text_config=TEXT, vision_config={**SIZES, "patch_size": 14, "num_patches": 16})
    )


def dinov2():
    return Dinov2Model(Dinov2Config(**{**VISION, "intermediate_size": None}))


def dinov3():
    return DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=4))


def internvl():
    config = InternVLConfig(
        vision_config={**VISION, "attention_bias": True, "use_qk_norm": True},
        text_config={"model_type": "llama", "num_key_value_heads": 2, **TEXT, "hidden_size": 48},
    )
    return InternVLForConditionalGeneration(config)


@torch.no_grad()
def saved(make, folder):
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():  # position embeddings and scales that start at zero hide what is behind them
        p.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


@pytest.fixture(scope="module")
def tiles():
    cells = torch.randint(0, 256, (2, 3, 56, 56), generator=torch.Generator().manual_seed(1))
    return cells.to(torch.uint8)


def normalised(tiles):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (tiles.float() / 255 - mean) / std


def suite(make, spec="transformers", **options) -> type[TeacherTests]:
    class Tests(TeacherTests):
        name = spec

        @pytest.fixture(scope="class")
        @classmethod
        def arguments(cls, tmp_path_factory):
            folder = tmp_path_factory.mktemp(make.__name__)
            saved(make, folder)
            return {"path": str(folder), **options}

    return Tests


class TestClip(suite(clip)): ...


class TestSiglip(suite(siglip, size=112)): ...


class TestSiglip2NaFlex(suite(siglip2)): ...


class TestDinov2(suite(dinov2, size=112, feature_layer=[0, 1])): ...


class TestDinov3(suite(dinov3, grid=2, resample="bilinear")): ...


class TestInternVLTower(suite(internvl, size=112)): ...


class TestInternVLWithItsConnector(suite(internvl, "internvl", size=112)): ...


@pytest.mark.parametrize("make", [clip, siglip, dinov2, dinov3])
@torch.no_grad()
def test_features_are_the_towers_own(make, tiles, tmp_path):
    model = saved(make, tmp_path)
    tower = getattr(model, "vision_model", model)
    expected = tower(pixel_values=normalised(tiles), output_hidden_states=True)
    for layer, tokens in ((-1, expected.last_hidden_state), (0, expected.hidden_states[1])):
        features = VisionTower(str(tmp_path), feature_layer=layer).features(tiles)
        assert features.shape == (2, 4, 4, 32)
        torch.testing.assert_close(features.flatten(1, 2), tokens[:, -16:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_with_the_connector_features_are_what_the_llm_is_given(tiles, tmp_path):
    model = saved(internvl, tmp_path)
    given = model.model.get_image_features(pixel_values=normalised(tiles)).pooler_output
    features = InternVLTower(str(tmp_path)).features(tiles)
    assert features.shape == (2, 2, 2, 48)
    torch.testing.assert_close(features.flatten(1, 2), given, atol=1e-5, rtol=0)
    assert InternVLTower(str(tmp_path), grid=4, resample="nearest").features(tiles).shape == (2, 4, 4, 48)


def to_original(folder):
    """The checkpoint as OpenGVLab publishes it: other names, q, k and v joined, another config."""
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    vision |= {
        "qk_normalization": True,
        "qkv_bias": True,
        "image_size": 56,
        "patch_size": 14,
        "model_type": "intern_vit_6b",
    }
    del vision["use_qk_norm"], vision["attention_bias"]
    content = {
        "model_type": "internvl_chat", "vision_config": vision, "llm_config": {"hidden_size": 48}, "select_layer": -1,
        "downsample_ratio": 0.5, "ps_version": "v2",
    }  # fmt: skip
    state = {}
    found = load_file(folder / "model.safetensors")
    names = {
        "multi_modal_projector.layer_norm": "mlp1.0", "multi_modal_projector.linear_1": "mlp1.1",
        "multi_modal_projector.linear_2": "mlp1.3", "vision_tower.": "vision_model.", "cls_token": "class_embedding",
        "position_embeddings": "position_embedding", "patch_embeddings.projection": "patch_embedding",
        "encoder.layer.": "encoder.layers.", "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm", "layernorm_before": "norm1", "layernorm_after": "norm2", "lambda_": "ls",
        "attention.q_proj": "attn.qkv",
    }  # fmt: skip
    for name, tensor in found.items():
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            tensor = torch.cat([found[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"])
        for ours, original in names.items():
            name = name.replace(ours, original)
        state[name] = tensor
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").unlink()


def test_the_original_format_is_the_same_teacher(tiles, tmp_path):
    saved(internvl, tmp_path)
    teacher = InternVLTower(str(tmp_path))
    to_original(tmp_path)
    original = InternVLTower(str(tmp_path))
    assert original.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    original.mean, original.std = teacher.mean, teacher.std
    assert torch.equal(original.features(tiles), teacher.features(tiles))
    state = load_file(tmp_path / "model.safetensors")
    del state["mlp1.3.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"InternVLMultiModalProjector lacks \['linear_2.bias'\]"):
        InternVLTower(str(tmp_path))


def test_what_a_folder_lacks_is_named(tmp_path):
    saved(clip, tmp_path)
    with pytest.raises(ValueError, match="'clip', which is no InternVL; the teacher 'transformers' takes"):
        InternVLTower(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(
        ValueError, match="mean: .* has no preprocessor_config.json .* give the teacher's mean"
    ):
        VisionTower(str(tmp_path))
    assert VisionTower(str(tmp_path), mean=MEAN, std=STD).feature_size == 32
    state = load_file(tmp_path / "model.safetensors")
    del state["vision_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors of its clip_vision_model"):
        VisionTower(str(tmp_path), mean=MEAN, std=STD)
