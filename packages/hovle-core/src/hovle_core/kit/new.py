"""`hovle plugin new`: a package that installs, is listed and passes its tests as written."""

import keyword
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from hovle_core.registry import spelt

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

#: Kind, as the registry has it -> what a package of that kind needs beside hovle-core.
DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "teacher": ("torch",),
    "backbone": ("torch", "transformers"),
    "tokenizer": ("transformers",),
    "dataset": ("hovle-data",),
    "stage": ("hovle-data", "hovle-train", "torch"),
    "token_mixer": ("torch", "transformers"),
}
KINDS = tuple(DEPENDENCIES)


def write_package(name: str, kind: str, parent: Path) -> list[Path]:
    """Write the package of plugin `name` into `parent/hovle-<name>`; returns its files, the first to edit first.

    `kind` as people or as the registry write it (token-mixer, token_mixer).
    Raises ValueError for a name that is none or that an installed package has, and for a folder that is there already.
    """
    name, kind = name.removeprefix("hovle-"), kind.replace("-", "_")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"NAME {name!r} must be lower-case words of letters and digits joined by '-', such as my-{spelt(kind)}"
        )
    folder = parent / f"hovle-{name}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: choose another name, or another folder with --out")
    fields = fields_of(name, kind)
    _check_free(name, fields)
    source = folder / "src" / fields["module"]
    written = {
        source / f"{kind}.py": f"{kind}.py",
        source / "plugin.py": "plugin.py",
        folder / "tests" / f"test_{fields['module']}.py": f"{kind}_test.py",
        folder / "pyproject.toml": "pyproject.toml",
        folder / "README.md": "README.md",
    }
    for path, template in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(template, fields))
    (source / "__init__.py").write_text(f'"""{fields["summary"]}"""\n')
    return list(written)


def _check_free(name: str, fields: dict[str, str]) -> None:
    """Raise ValueError for a name whose package would hide an installed one, or whose class Python cannot spell."""
    if keyword.iskeyword(fields["class_name"]):
        raise ValueError(f"NAME {name!r} would make a class {fields['class_name']}: choose another name")
    taken = find_spec(fields["module"]) is not None
    with suppress(PackageNotFoundError):
        distribution(f"hovle-{name}")
        taken = True
    if taken:
        raise ValueError(
            f"hovle-{name} is installed already and would be replaced: choose another name, or uninstall it first"
        )


def fields_of(name: str, kind: str) -> dict[str, str]:
    """What the templates' `$fields` stand for."""
    words = name.split("-")
    dependencies = ", ".join(f'"{package}"' for package in ("hovle-core", *DEPENDENCIES[kind]))
    return {
        "name": name,
        "kind": kind,
        "called": spelt(kind),
        "module": "hovle_" + name.replace("-", "_"),
        "class_name": "".join(map(str.capitalize, words)),
        "summary": f"The {spelt(kind)} {name} for HoVLE.",
        "dependencies": dependencies,
        "options": "",
        "command": f"hovle plugin test {name}" + (" --option path=FILE" if kind == "dataset" else ""),
    }


def render(template: str, fields: dict[str, str]) -> str:
    text = files("hovle_core.kit").joinpath("templates", f"{template}.txt").read_text()
    return Template(text).substitute(fields)
