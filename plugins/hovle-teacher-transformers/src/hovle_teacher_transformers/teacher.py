"""The vision tower of a transformers checkpoint as a HoVLE teacher.

Shapes: N tiles, S tile side in pixels, p patch side, h x w the grid, T all tokens, C channels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hovle_core.feature_maps import (
    Resample,
    check_grid,
    check_layers,
    joined_maps,
    per_channel,
    resized_tiles,
)
from hovle_core.hub import local_folder
from hovle_core.roles import TeacherEncoder

#: Where whole models keep their vision tower; its own tensors have no such prefix.
_TOWER = {r"^(model\.)?vision_tower\.": ""}
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class VisionTower(TeacherEncoder):
    """A vision transformer of transformers, alone or out of a model that has one, frozen and always in eval.

    Args:
        path: folder or hub id of a checkpoint in safetensors. Of a model with text, only the vision tower is read.
        size: side in pixels that tiles are resized to (bicubic, antialiased); None is the tower's own. Other sizes
            interpolate its position embeddings.
        feature_layer: index into the blocks; -1 is the last, with the tower's final norm if it has one. Of several
            (a list) the channels are joined, each layer normalised over its channels.
        grid: side of the grid that features are resampled to; None keeps the tower's own.
        resample: how, where grids differ: "average" of what falls into a cell, "bilinear", "bicubic" or "nearest".
        mean, std: RGB normalisation on the 0..1 scale; by default those of the checkpoint's image processor.

    Raises ValueError naming what `path` lacks: a vision tower, tensors of it, mean and std.
    """

    def __init__(
        self,
        path: str,
        size: int | None = None,
        feature_layer: int | Sequence[int] = -1,
        grid: int | None = None,
        resample: Resample = "average",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_grid(size, grid, resample)
        folder = local_folder(path, weights=True)
        config = vision_config(folder)
        self.model = load_tower(folder, config)
        self.patch, own = sides(config)
        self.size, self.grid, self.resample = size or own, grid, resample
        self.feature_layers = check_layers(feature_layer, config.num_hidden_layers, path)
        self.feature_size = config.hidden_size * len(self.feature_layers)
        self._is_last = self.feature_layers == [config.num_hidden_layers - 1]
        self.mean: Tensor
        self.std: Tensor
        for field, given in (("mean", mean), ("std", std)):
            values = per_channel(field, given or image_processor_field(folder, f"image_{field}", field))
            self.register_buffer(field, values, persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def grid_features(self, tiles: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]` -> float32 `[N, h, w, C]`."""
        x = (resized_tiles(tiles, self.size, self.patch) / 255 - self.mean) / self.std
        side = self.size // self.patch
        out = self.model(**tower_inputs(self.model, x, self.patch), output_hidden_states=not self._is_last)
        if self._is_last:
            layers = [out.last_hidden_state]
        else:  # the first of hidden_states is what the first block is given
            layers = [out.hidden_states[layer + 1] for layer in self.feature_layers]
        maps = [as_map(tokens, side) for tokens in layers]
        return joined_maps(maps, self.grid, self.resample).permute(0, 2, 3, 1).contiguous()


def vision_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint's vision tower. Raises ValueError where it has none of patches and blocks."""
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    missing = [
        name for name in ("patch_size", "hidden_size", "num_hidden_layers") if not hasattr(config, name)
    ]
    if missing:
        raise ValueError(
            f"path: {folder} holds a {config.model_type}, which is no vision transformer (its config lacks "
            f"{', '.join(missing)}); known to work are CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3 and InternVL"
        )
    return config


def load_tower(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The vision tower in float32; what else the files hold is not read. Raises ValueError for missing tensors."""
    model, found = AutoModel.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        # DINO models and bare towers have nothing to take off, and mappings of their own for older files.
        **({"key_mapping": _TOWER} if config.model_type == "internvl_vision" else {}),
    )
    lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if lacking:
        raise ValueError(
            f"path: {folder} lacks {len(lacking)} tensors of its {config.model_type}: {lacking[:3]}"
        )
    return model


def sides(config: PreTrainedConfig) -> tuple[int, int]:
    """(patch, picture) of a tower in pixels; NaFlex towers say how many patches they were trained on."""
    patch = config.patch_size[0] if isinstance(config.patch_size, list | tuple) else config.patch_size
    if hasattr(config, "num_patches"):
        return patch, patch * round(config.num_patches**0.5)
    size = config.image_size[0] if isinstance(config.image_size, list | tuple) else config.image_size
    return patch, size


def tower_inputs(model: PreTrainedModel, x: Tensor, patch: int) -> dict[str, Any]:
    """Normalised pixels `[N, 3, S, S]` as the tower wants them: as they are, or in patches (SigLIP 2's NaFlex)."""
    if model.config.model_type == "siglip2_vision_model":
        N, channels, side = x.shape[0], x.shape[1], x.shape[-1] // patch
        cut = x.reshape(N, channels, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": cut.reshape(N, side * side, -1),
            "pixel_attention_mask": torch.ones(N, side * side, dtype=torch.long, device=x.device),
            "spatial_shapes": torch.full((N, 2), side, dtype=torch.long),
        }
    own = sides(model.config)[1]
    if x.shape[-1] != own and model.config.model_type in ("clip_vision_model", "siglip_vision_model"):
        return {"pixel_values": x, "interpolate_pos_encoding": True}  # the others do it by themselves
    return {"pixel_values": x}


def as_map(tokens: Tensor, side: int) -> Tensor:
    """`[N, T, C]` -> `[N, C, side, side]`: class and register tokens come first, and are left out."""
    return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)).float()


def image_processor_field(folder: Path, name: str, option: str) -> list[float]:
    """A field of the checkpoint's image processor. Raises ValueError where there is none."""
    for file in _PROCESSOR_FILES:
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text())
            content = content.get("image_processor", content)
            if name in content:
                return list(content[name])
    raise ValueError(
        f"{option}: {folder} has no {' or '.join(_PROCESSOR_FILES)} with {name}: give the teacher's {option}"
    )
