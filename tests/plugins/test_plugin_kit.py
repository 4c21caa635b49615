"""`hovle plugin new` and `hovle plugin test`: what is written passes, and what is broken is named with its reason."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from hovle_core.cli import main
from hovle_core.kit.check import parse_options
from hovle_core.kit.new import KINDS
from hovle_core.registry import spelt


class Workshop:
    """Generated packages, installed as pip would: their sources and a dist-info folder on sys.path."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def new(self, name: str, kind: str) -> Path:
        assert main(["plugin", "new", name, "--kind", spelt(kind), "--out", str(self.folder)]) == 0
        package = self.folder / f"hovle-{name}"
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        info = package / "src" / f"hovle_{name.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        points = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["hovle"].items())
        (info / "entry_points.txt").write_text(f"[hovle]\n{points}")
        self.monkeypatch.syspath_prepend(package / "src")
        return package

    def source(self, name: str, kind: str) -> Path:
        module = f"hovle_{name.replace('-', '_')}"
        return self.folder / f"hovle-{name}" / "src" / module / f"{kind}.py"


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    before = set(sys.modules)
    yield Workshop(tmp_path, monkeypatch)
    for module in set(sys.modules) - before:
        if module.startswith("hovle_my_"):
            del sys.modules[module]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_listed_and_passes_its_tests(kind: str, workshop, capfd) -> None:
    called = spelt(kind)
    package = workshop.new(f"my-{called}", kind)
    assert main(["plugins", "list"]) == 0
    out = capfd.readouterr().out
    assert f"my-{called}  (hovle-my-{called} 0.1.0)\n" in out
    assert re.search(rf"{called} +my-{called} +The {called} my-{called} for HoVLE\.", out)

    tests = [
        "-q",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        str(package / "tests"),
    ]
    code = pytest.main(tests)
    out = capfd.readouterr().out
    assert code == 0, out
    assert int(re.search(r"(\d+) passed", out)[1]) >= 9
    assert "skipped" not in out


def test_a_report_of_all_that_holds(workshop, capfd) -> None:
    workshop.new("my-teacher", "teacher")
    assert main(["plugin", "test", "my-teacher"]) == 0
    out = capfd.readouterr().out
    assert "teacher my-teacher  (hovle-my-teacher 0.1.0)\n" in out
    assert "  ok      stays in eval\n" in out
    assert re.search(r"\n1\d passed, 0 failed\n$", out)
    assert main(["plugin", "test", "my-teacher", "--option", "patch_size=16", "--only", "my-teacher"]) == 0


def test_a_report_of_what_fails_and_why_it_matters(workshop, capfd) -> None:
    workshop.new("my-teacher", "teacher")
    source = workshop.source("my-teacher", "teacher")
    source.write_text(source.read_text().replace("self.feature_size = feature_size", "self.feature_size = 7"))
    assert main(["plugin", "test", "my-teacher"]) == 1
    out = capfd.readouterr().out
    flat = " ".join(out.split())
    assert (
        "FAILED features are as declared feature_size says 7, the features [3, 8, 8, 64] have 64 channels"
        in flat
    )
    assert "why it matters: The projection of the student is made for `feature_size` channels before" in flat
    assert re.search(r"\n\d+ passed, 1 failed\n$", out)
    assert "assert 64 == 7" not in out


def test_an_error_of_the_plugins_own_code_is_shown_once_with_its_place(workshop, capfd) -> None:
    workshop.new("my-teacher", "teacher")
    assert main(["plugin", "test", "my-teacher", "--option", "patch_sise=16"]) == 1
    out = capfd.readouterr().out
    assert out.count("did you mean 'patch_size'?") == 1
    assert out.count("as above: ") >= 8


def test_a_plugin_that_imports_what_is_heavy_is_told_where_to_put_it(workshop, capfd) -> None:
    package = workshop.new("my-tokenizer", "tokenizer")
    module = package / "src" / "hovle_my_tokenizer" / "plugin.py"
    module.write_text("import wandb\n" + module.read_text())
    assert main(["plugin", "test", "my-tokenizer"]) == 1
    out = " ".join(capfd.readouterr().out.split())
    assert "listing plugin 'my-tokenizer' imports wandb: import it in the module of the target" in out


def test_wrong_arguments_say_what_to_do(workshop, capsys) -> None:
    def error(*arguments: str) -> str:
        assert main(["plugin", *arguments]) == 2
        return capsys.readouterr().err

    package = workshop.new("my-tokenizer", "tokenizer")
    out = ["--kind", "tokenizer", "--out", str(package.parent)]
    assert "hovle-my-tokenizer exists already: choose another name" in error("new", "my-tokenizer", *out)
    assert "NAME 'My_Own' must be lower-case words" in error("new", "My_Own", *out)
    assert "no plugin 'my-tokeniser' is installed; did you mean 'my-tokenizer'?" in error(
        "test", "my-tokeniser"
    )
    assert "does not provide 'other'" in error("test", "my-tokenizer", "--only", "other")
    assert "provides nothing that the suite tests" in error("test", "serve")
    assert "--option 'seed' must read KEY=VALUE" in error("test", "my-tokenizer", "--option", "seed")
    for name in ("train", "core"):  # a module and a distribution of ours
        assert f"hovle-{name} is installed already and would be replaced" in error("new", name, *out)
    assert "would make a class None" in error("new", "none", *out)
    workshop.new("my-dataset", "dataset")
    capsys.readouterr()
    assert "'my-dataset' needs path: give --option path=VALUE" in error("test", "my-dataset")
    with pytest.raises(SystemExit):
        main(["plugin", "new", "x", "--kind", "recipe"])


def test_the_command_that_is_printed_for_a_dataset_passes(workshop, tmp_path, capfd) -> None:
    package = workshop.new("my-dataset", "dataset")
    assert "hovle plugin test my-dataset --option path=FILE" in (package / "README.md").read_text()
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\nthree\n")
    assert main(["plugin", "test", "my-dataset", "--option", f"path={lines}"]) == 0
    assert re.search(r"\b9 passed, 0 failed", capfd.readouterr().out)


def test_options_are_json_where_they_read_as_such() -> None:
    given = ["size=56", "path=/data/x", "weights=null", 'model_kwargs={"depth": 2}', "expression=a=b"]
    assert parse_options(given) == {
        "size": 56, "path": "/data/x", "weights": None, "model_kwargs": {"depth": 2}, "expression": "a=b",
    }  # fmt: skip


def test_a_plugin_outside_of_the_workspace(tmp_path) -> None:
    """Generated, built as a wheel, installed by pip into a clean environment, and tested from there.

    The environment has nothing of its own but the plugin; what that depends on is this one's, behind it on the path.
    """
    assert main(["plugin", "new", "my-teacher", "--kind", "teacher", "--out", str(tmp_path)]) == 0
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, environment = tmp_path / "wheels", tmp_path / "environment"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels)]
    subprocess.run([*pip, *build, str(tmp_path / "hovle-my-teacher")], check=True)
    (wheel,) = wheels.glob("*.whl")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (site / "workspace.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    command = [str(python), "-m", "hovle_core.cli", "plugin", "test", "my-teacher"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "teacher my-teacher  (hovle-my-teacher 0.1.0)" in done.stdout
