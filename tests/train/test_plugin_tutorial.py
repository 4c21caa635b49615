"""docs/plugins.md, done as it says: the teacher of the tutorial is written, tested and trained with."""

import re
import sys
from pathlib import Path

import pytest

from hovle_core.cli import main
from hovle_core.plugins import load_plugins
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime

TUTORIAL = Path(__file__).parents[2] / "docs" / "plugins.md"


@pytest.fixture
def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def edges(blocks, tmp_path, monkeypatch):
    """The package of the tutorial, on sys.path as pip would have it."""
    commands = [line for kind, block in blocks if kind == "bash" for line in block.splitlines()]
    assert commands[:2] == ["hovle plugin new edges --kind teacher", "pip install -e 'hovle-edges[test]'"]
    assert main([*commands[0].split()[1:], "--out", str(tmp_path)]) == 0
    source = tmp_path / "hovle-edges" / "src"
    code = next(block for kind, block in blocks if kind == "python")
    (source / "hovle_edges" / "teacher.py").write_text(code)
    info = source / "hovle_edges-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hovle-edges\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[hovle]\nedges = hovle_edges.plugin\n")
    monkeypatch.syspath_prepend(source)
    yield source / "hovle_edges" / "teacher.py"
    for module in [name for name in sys.modules if name.startswith("hovle_edges")]:
        del sys.modules[module]


def test_the_tutorials_teacher_passes_and_its_mistake_is_reported_as_printed(edges, blocks, capfd) -> None:
    assert main(["plugin", "test", "edges"]) == 0
    assert re.search(r"\n1\d passed, 0 failed\n$", capfd.readouterr().out)

    edges.write_text(edges.read_text().replace("self.feature_size = 5", "self.feature_size = 3"))
    for module in [name for name in sys.modules if name.startswith("hovle_edges")]:
        del sys.modules[module]
    assert main(["plugin", "test", "edges"]) == 1
    report = capfd.readouterr().out
    printed = next(block for kind, block in blocks if kind == "")
    for line in printed.splitlines():
        assert line in report, line


def test_the_tutorials_teacher_trains(edges, make_recipe) -> None:
    recipe = make_recipe(
        "distillation", options={"teacher": {"name": "edges", "options": {"cell": 28}}}, train={"steps": 20}
    )
    Trainer(recipe, load_plugins(), Runtime()).run()
    metrics = read_metrics(recipe.path / "metrics.jsonl")
    assert metrics[-1]["image_cosine"] > metrics[0]["image_cosine"] + 0.1
