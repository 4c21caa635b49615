"""Hook implementations. Imports no torch: listing plugins must stay cheap."""

from hovle_core.hookspecs import hookimpl
from hovle_core.registry import Spec

HOVLE_HOOK_API = 1


@hookimpl
def hovle_teachers() -> list[Spec]:
    return [
        Spec(
            name="transformers",
            target="hovle_teacher_transformers.teacher:VisionTower",
            summary="vision tower of a checkpoint (CLIP, SigLIP, DINOv2/3, InternVL): path=DIRECTORY or Hub id",
        ),
        Spec(
            name="internvl",
            target="hovle_teacher_transformers.internvl:InternVLTower",
            summary="InternVL's vision tower with its connector, features in LLM space: path=DIRECTORY or Hub id",
        ),
    ]
