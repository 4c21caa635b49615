"""The tensors of a checkpoint folder in safetensors, read one at a time from disk."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors_names(folder: Path) -> list[str]:
    """`model.safetensors`, or the shards that the index names.

    Raises FileNotFoundError where neither is, or where a shard is missing; pickled weights are refused.
    """
    if (index := folder / SAFETENSORS_INDEX).is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [SAFETENSORS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        if index.is_file():
            raise FileNotFoundError(f"{folder} lacks {missing}, which {SAFETENSORS_INDEX} names")
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f" (there is {', '.join(pickles[:3])})" if pickles else ""
        raise FileNotFoundError(
            f"{folder} has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}{found}; pickled weights are refused, since "
            "they can run code: save them as safetensors where they come from"
        )
    return names


class TensorFiles:
    """`with TensorFiles(folder) as tensors: tensors["name"]`; a tensor is mapped from disk when it is asked for.

    `shapes` and `file_of` say of every name its shape and file. Raises FileNotFoundError as `safetensors_names`,
    ValueError for a damaged file or a tensor that two files hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = safetensors_names(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file_of: dict[str, str] = {}

    def __enter__(self) -> "TensorFiles":
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for name in self.names:
            try:
                file = self._open.enter_context(safe_open(self.folder / name, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} is damaged or no safetensors file: {error}") from None
            self._files[name] = file
            for tensor in file.keys():  # noqa: SIM118 (no mapping)
                if tensor in self.file_of:
                    raise ValueError(f"{tensor} is in {self.file_of[tensor]} and in {name} of {self.folder}")
                self.file_of[tensor] = name
                self.shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self.file_of[name]].get_tensor(name)

    def metadata(self, file: str) -> dict[str, str]:
        return self._files[file].metadata() or {}
