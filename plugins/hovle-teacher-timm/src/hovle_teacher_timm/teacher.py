"""A timm model as a HoVLE teacher.

Shapes: N tiles, S tile side in pixels, h x w the teacher's grid, C its channels.
"""

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from hovle_core.feature_maps import (
    Resample,
    check_grid,
    check_layers,
    joined_maps,
    per_channel,
    resized_tiles,
)
from hovle_core.precision import has_fast_bfloat16
from hovle_core.roles import TeacherEncoder
from hovle_teacher_timm.connector import Connector
from hovle_teacher_timm.weights import (
    WHEELS,
    from_intern_vit_names,
    load_strictly,
    read_safetensors,
    wheel_state,
)


class TimmTeacher(TeacherEncoder):
    """Any timm model that has `forward_intermediates`, ViT or CNN, frozen and always in eval.

    Args:
        model_name: timm's name, with or without a pretrained tag.
        weights: `"timm"` (pretrained, from the hub), a path to a `.safetensors` file,
            `"efficientnet-lite0-wheel"` (`tf_efficientnet_lite0` only), `"mobilenetv2-wheel"` (`mobilenetv2_100` only),
            or None (random; for tests).
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
        precision: that the model computes in, "float32", "bfloat16" or "auto": bfloat16 where it is fast.
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
        precision: Literal["float32", "bfloat16", "auto"] = "float32",
    ) -> None:
        super().__init__()
        if precision not in (known := ("float32", "bfloat16", "auto")):
            raise ValueError(f"precision: {precision!r} is none of {known}")
        check_grid(size, grid, resample)
        self.model = _create(model_name, weights, dict(model_kwargs or {}))
        layers = [int(info["num_chs"]) for info in self.model.feature_info]  # type: ignore[union-attr]
        self.feature_layers = check_layers(feature_layer, len(layers), model_name)
        self._layer_sizes = [layers[layer] for layer in self.feature_layers]
        self.feature_size = sum(self._layer_sizes)
        self.connector = None if connector is None else Connector.load(Path(connector), self.feature_size)
        self.connector_size = None if self.connector is None else self.connector.size
        self.grid, self.resample = grid, resample
        self.size, self.precision = size, precision
        # The final norm belongs to the last layer only; earlier layers were never meant to pass through it.
        self._with_norm = self.feature_layers == [len(layers) - 1]
        # CNNs take any size; a ViT's patches must fill its input.
        self._patch = int(getattr(getattr(self.model, "patch_embed", None), "patch_size", (1,))[0])
        own: Mapping[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", per_channel("mean", mean or own["mean"]), persistent=False)
        self.register_buffer("std", per_channel("std", std or own["std"]), persistent=False)
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
        x = resized_tiles(tiles, self.size, self._patch)
        x = ((x / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        low = self.precision == "bfloat16" or (self.precision == "auto" and has_fast_bfloat16(x.device))
        with torch.autocast(x.device.type, torch.bfloat16) if low else nullcontext():
            maps = self.model.forward_intermediates(  # type: ignore[operator]
                x,
                indices=self.feature_layers,
                norm=self._with_norm,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        joined = joined_maps([features.float() for features in maps], self.grid, self.resample)
        return joined.permute(0, 2, 3, 1).contiguous()


def _create(model_name: str, weights: str | None, model_kwargs: dict[str, Any]) -> nn.Module:
    """The timm model with its weights. Raises ValueError with the nearest names for an unknown model."""
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"model_name: timm {timm.__version__} has no model {model_name!r}; did you mean {', '.join(near)}?"
            if near
            else f"model_name: timm {timm.__version__} has no model {model_name!r}; timm.list_models() lists them"
        )
    if weights in WHEELS:
        wheel = WHEELS[weights]
        if model_name != wheel.model_name:
            raise ValueError(f"weights: {weights} fits {wheel.model_name} only, not {model_name}")
        model = timm.create_model(
            model_name, pretrained=False, **{"num_classes": wheel.num_classes, **model_kwargs}
        )
        load_strictly(model, wheel_state(wheel, model), str(weights))
    else:
        # No classifier: a teacher's head is never used.
        model_kwargs.setdefault("num_classes", 0)
        model = timm.create_model(model_name, pretrained=weights == "timm", **model_kwargs)
        if weights not in (None, "timm"):
            load_strictly(model, from_intern_vit_names(read_safetensors(Path(weights))), weights)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model_name: {model_name} has no forward_intermediates in timm {timm.__version__}")
    return model
