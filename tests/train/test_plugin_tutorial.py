"""docs/plugins.md and docs/tutorial-backbone.md, done as they say: written, tested, broken as printed, trained with."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hovle_core.cli import main
from hovle_core.plugins import load_plugins
from hovle_train.config import Recipe
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime

DOCS = Path(__file__).parents[2] / "docs"


class Tutorial:
    """A page, and the package that it writes, on sys.path as pip would have it."""

    def __init__(self, page: str, name: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        text = (DOCS / page).read_text()
        self.blocks: list[tuple[str, str]] = re.findall(
            r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
        )
        commands = [line for kind, block in self.blocks if kind == "bash" for line in block.splitlines()]
        assert commands[:2] == [
            f"hovle plugin new {name} --kind {kind}",
            f"pip install -e 'hovle-{name}[test]'",
        ]
        assert main([*commands[0].split()[1:], "--out", str(folder)]) == 0
        self.module = f"hovle_{name}"
        source = folder / f"hovle-{name}" / "src"
        self.code = source / self.module / f"{kind}.py"
        self.code.write_text(self.block("python"))
        info = source / f"{self.module}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hovle-{name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[hovle]\n{name} = {self.module}.plugin\n")
        monkeypatch.syspath_prepend(source)
        # A change of the same size within the same second would find the old bytecode.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def block(self, kind: str) -> str:
        return next(block for of, block in self.blocks if of == kind)

    def change(self, old: str, new: str) -> None:
        text = self.code.read_text()
        assert old in text
        self.code.write_text(text.replace(old, new))
        self.forget()

    def forget(self) -> None:
        for module in [name for name in sys.modules if name.startswith(self.module)]:
            del sys.modules[module]


@pytest.fixture
def edges(tmp_path, monkeypatch) -> Iterator[Tutorial]:
    tutorial = Tutorial("plugins.md", "edges", "teacher", tmp_path, monkeypatch)
    yield tutorial
    tutorial.forget()


@pytest.fixture
def parrot(tmp_path, monkeypatch) -> Iterator[Tutorial]:
    tutorial = Tutorial("tutorial-backbone.md", "parrot", "backbone", tmp_path, monkeypatch)
    yield tutorial
    tutorial.forget()


def passes_and_fails_as_printed(tutorial: Tutorial, name: str, old: str, new: str, capfd) -> None:
    assert main(["plugin", "test", name]) == 0
    assert re.search(r"\n[12]\d passed, 0 failed\n$", capfd.readouterr().out)
    tutorial.change(old, new)
    assert main(["plugin", "test", name]) == 1
    report = capfd.readouterr().out
    for line in tutorial.block("").splitlines():
        assert line in report, line


def test_the_teacher_passes_and_its_mistake_is_reported_as_printed(edges, capfd) -> None:
    passes_and_fails_as_printed(edges, "edges", "self.feature_size = 5", "self.feature_size = 3", capfd)


def test_the_backbone_passes_and_its_mistake_is_reported_as_printed(parrot, capfd) -> None:
    passes_and_fails_as_printed(parrot, "parrot", "            torch.manual_seed(self.seed)\n", "", capfd)


def test_the_demos_distillation_trains_with_the_teacher(edges, world, tmp_path) -> None:
    """The command of the page on the demo's own recipe, with few steps over small data."""
    from hovle_demo.run import demo_pipeline

    (command,) = re.findall(r"`hovle demo --set (\S+)`", (DOCS / "plugins.md").read_text())
    out = tmp_path / "demo"
    for name, shards in (("images", "images"), ("text", "texts")):
        shutil.copytree(world / shards, out / "prepared" / "shards" / name)
    few = [f"model.backbone.options.path={world / 'llm'}", "train.steps=12", "train.global_batch_size=8",
           "train.log_every=1", "train.precision=float32", "train.min_fill=0", "train.micro_batch_tokens=512",
           "optim.warmup_steps=1"]  # fmt: skip
    plugins = load_plugins()
    overrides = [command, *(f"distillation.{one}" for one in few)]
    recipe = demo_pipeline("small", out, overrides, plugins.registry).recipes["distillation"]
    assert recipe.stage.options["teacher"]["name"] == "edges"
    recipe.observers = {"wandb": "disabled"}
    Trainer(Recipe.model_validate(recipe.model_dump()), plugins, Runtime()).run()
    metrics = read_metrics(recipe.path / "metrics.jsonl")
    assert metrics[-1]["image_cosine"] > metrics[0]["image_cosine"] + 0.1
    assert (recipe.path / "final" / "model.safetensors").is_file()


def test_alignment_trains_through_the_backbone(parrot, make_recipe) -> None:
    backbone = {"name": "parrot", "options": {"hidden_size": 64}}
    embedding = {"num_hidden_layers": 1, "image_size": 56}
    recipe = make_recipe(
        "alignment", model={"backbone": backbone, "embedding": embedding}, train={"steps": 12}
    )
    Trainer(recipe, load_plugins(), Runtime()).run()
    metrics = read_metrics(recipe.path / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
