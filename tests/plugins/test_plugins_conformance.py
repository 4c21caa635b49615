"""The plugins of this repository keep what `hovle plugin test` asks of anyone's."""

import pytest

from hovle_core.testing import tiny_tokenizer
from hovle_core.testing.conformance import BackboneTests, TeacherTests

TINY_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOVLE_CACHE", str(tmp_path_factory.mktemp("hovle-cache")))
        yield


class TestEfficientNetLite0(TeacherTests):
    name = "efficientnet-lite0"


class OfAHubTests(TeacherTests):
    """A model of the hub in small: two blocks with random weights are all that differs from the real one."""

    options = {"weights": None, "model_kwargs": {**TINY_VIT, "img_size": 112, "dynamic_img_size": True}}


class TestInternViT(OfAHubTests):
    name = "intern-vit-300m"


class TestSigLip(OfAHubTests):
    name = "siglip"


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
