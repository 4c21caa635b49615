"""InternVL's vision tower with its connector: what the checkpoint's own LLM is given for a picture.

The student is to make tokens that an LLM reads; these are tokens that one does read. Two formats are known: that of
transformers, and the original one (`internvl_chat`), whose code is not run.
Shapes: N tiles, S tile side in pixels, h x w the grid after pixel shuffle, C the LLM's hidden size.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel, LlamaConfig
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from hovle_core.config import IMAGENET_MEAN, IMAGENET_STD
from hovle_core.feature_maps import Resample, check_grid, joined_maps, per_channel, resized_tiles
from hovle_core.hub import local_folder
from hovle_core.patch_embed import pixel_shuffle
from hovle_core.roles import TeacherEncoder
from hovle_core.tensor_files import TensorFiles
from hovle_teacher_transformers.teacher import as_map, image_processor_field, load_tower, sides

ORIGINAL = "internvl_chat"
_CONNECTOR = {r"^(model\.)?multi_modal_projector\.": ""}
# The original names of connector and tower -> transformers'.
_ORIGINAL_CONNECTOR = {r"^mlp1\.0\.": "layer_norm.", r"^mlp1\.1\.": "linear_1.", r"^mlp1\.3\.": "linear_2."}
_ORIGINAL_TOWER = {
    r"^vision_model\.": "",
    r"^embeddings\.class_embedding": "embeddings.cls_token",
    r"^embeddings\.position_embedding": "embeddings.position_embeddings",
    r"^embeddings\.patch_embedding\.": "embeddings.patch_embeddings.projection.",
    r"^encoder\.layers\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.([qk])_norm\.": r".attention.\1_norm.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.ls([12])$": r".lambda_\1",
}
_NOT_READ = ("model_type", "use_mean_pooling")
_ORIGINAL_FIELDS = {"qk_normalization": "use_qk_norm", "qkv_bias": "attention_bias"}

M = TypeVar("M", bound=nn.Module)


class InternVLTower(TeacherEncoder):
    """Vision tower, pixel shuffle and connector of an InternVL checkpoint, frozen and always in eval.

    Args:
        path: folder or hub id of the checkpoint in safetensors; its LLM is not read.
        size: side in pixels that tiles are resized to; None is the tower's own.
        grid: side of the grid that features are resampled to; None keeps the one after pixel shuffle.
        resample: how, where grids differ: "average" of what falls into a cell, "bilinear", "bicubic" or "nearest".

    Raises ValueError naming what `path` lacks.
    """

    mean: Tensor  # buffers
    std: Tensor

    def __init__(
        self, path: str, size: int | None = None, grid: int | None = None, resample: Resample = "average"
    ) -> None:
        super().__init__()
        check_grid(size, grid, resample)
        folder = local_folder(path, weights=True)
        raw = json.loads((folder / "config.json").read_text())
        is_original = raw.get("model_type") == ORIGINAL
        config = original_config(raw) if is_original else transformers_config(folder, raw)
        self.layer, self.factor = config.vision_feature_layer, round(1 / config.downsample_ratio)
        self.patch, own = sides(config.vision_config)
        self.size, self.grid, self.resample = size or own, grid, resample
        if self.size % (self.patch * self.factor):
            raise ValueError(
                f"size: {self.size} must be a multiple of {self.patch * self.factor}, a patch after pixel shuffle"
            )
        self.feature_size = config.text_config.hidden_size
        with TensorFiles(folder) as tensors:
            self.model = (
                _read(InternVLVisionModel(config.vision_config), tensors, _ORIGINAL_TOWER, folder)
                if is_original
                else load_tower(folder, config.vision_config)
            )
            names = _ORIGINAL_CONNECTOR if is_original else _CONNECTOR
            self.connector = _read(InternVLMultiModalProjector(config), tensors, names, folder)
        for field, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = usual if is_original else image_processor_field(folder, f"image_{field}", field)
            self.register_buffer(field, per_channel(field, values), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def grid_features(self, tiles: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]` -> float32 `[N, h, w, C]`."""
        x = (resized_tiles(tiles, self.size, self.patch) / 255 - self.mean) / self.std
        out = self.model(pixel_values=x, output_hidden_states=self.layer != -1)
        tokens = out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]
        side = self.size // self.patch
        features = self.connector(pixel_shuffle(tokens[:, -side * side :], self.factor))
        grid = as_map(features, side // self.factor)
        return joined_maps([grid], self.grid, self.resample).permute(0, 2, 3, 1).contiguous()


def transformers_config(folder: Path, raw: Mapping[str, Any]) -> InternVLConfig:
    """The config of a checkpoint in transformers' format. Raises ValueError for another model."""
    if raw.get("model_type") != InternVLConfig.model_type:
        raise ValueError(
            f"path: {folder} holds a {raw.get('model_type')!r}, which is no InternVL; the teacher 'transformers' "
            "takes vision towers of other models"
        )
    return InternVLConfig.from_pretrained(folder)


def original_config(raw: Mapping[str, Any]) -> InternVLConfig:
    """An original `config.json` as transformers' config; of the LLM only the width.

    Raises ValueError for a pixel shuffle that is not the released models'.
    """
    if raw.get("ps_version", "v2") != "v2":
        raise ValueError(
            f"ps_version is {raw['ps_version']!r}; only 'v2' is known, as in the released models"
        )
    known = InternVLVisionConfig.__dataclass_fields__
    vision = {_ORIGINAL_FIELDS.get(name, name): value for name, value in raw["vision_config"].items()}
    llm = raw.get("llm_config") or raw["text_config"]
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{name: value for name, value in vision.items() if name in known and name not in _NOT_READ},
            use_mean_pooling=True,  # no norm behind the last block
        ),
        text_config=LlamaConfig(hidden_size=llm["hidden_size"], num_attention_heads=1),
        downsample_ratio=raw["downsample_ratio"],
        vision_feature_layer=raw.get("select_layer", -1),
        projector_hidden_act="gelu",
    )


def _read(module: M, tensors: TensorFiles, names: Mapping[str, str], folder: Path) -> M:
    """`module` with the tensors that `names` rename into it. Raises ValueError for those missing or misshapen."""
    own = module.state_dict()
    state: dict[str, Tensor] = {}
    for name in tensors.shapes:
        new = name
        for pattern, replacement in names.items():
            new = re.sub(pattern, replacement, new)
        if new != name:
            state |= {part: tensor.float() for part, tensor in _split(new, tensors[name])}
    missing = sorted(own.keys() - state.keys())
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or wrong:
        raise ValueError(
            f"path: {folder} does not fit its config: {type(module).__name__} lacks {missing[:3]}, "
            f"and {sorted(wrong)[:3]} have another shape"
        )
    module.load_state_dict({name: state[name] for name in own})
    return module


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The original's joined q, k and v apart."""
    if ".attn.qkv." not in name:
        yield name, tensor
        return
    for kind, part in zip("qkv", tensor.chunk(3), strict=True):
        yield name.replace(".attn.qkv.", f".attention.{kind}_proj."), part.contiguous()
