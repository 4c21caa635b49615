"""Specs are data; the registry finds, builds and names who provides."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hovle_core.registry import KINDS, Provider, Registry, Spec

OURS = Provider("hovle-x", "1.0")
THEIRS = Provider("other-dist", "2.0")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An importable package with a class, a function, a broken module and a recipe."""
    root = tmp_path / "registry_fixture_pkg"
    (root / "recipes").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "things.py").write_text(
        "class Thing:\n"
        "    def __init__(self, size, colour='red'):\n"
        "        if size < 0: raise TypeError('from inside')\n"
        "        self.size, self.colour = size, colour\n"
        "    @classmethod\n"
        "    def large(cls): return cls(100)\n"
    )
    (root / "broken.py").write_text("import a_module_that_is_not_there\n")
    (root / "recipes" / "tiny.yaml").write_text("a: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield root.name
    for name in [name for name in sys.modules if name.split(".")[0] == root.name]:
        del sys.modules[name]


def registry_of(*entries: tuple[str, Spec]) -> Registry:
    registry = Registry()
    registry.add_all(entries, OURS)
    return registry


def test_spec_is_data_and_imports_nothing() -> None:
    spec = Spec("a", "not_installed_anywhere.module:Thing", {"size": 3}, "a thing")
    assert spec == Spec("a", "not_installed_anywhere.module:Thing", {"size": 3}, "a thing")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, spec}) == 1


def test_spec_does_not_share_its_kwargs_with_the_caller() -> None:
    kwargs = {"size": 3}
    spec = Spec("a", "m:A", kwargs)
    kwargs["size"] = 4
    assert spec.kwargs == {"size": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "m:A"), "name ''"),
        ((" a", "m:A"), "without surrounding spaces"),
        (("a", "m.A"), "target 'm.A' must look like"),
        (("a", "m:"), "target 'm:' must look like"),
        (("a", ":A"), "target ':A' must look like"),
        (("a", "my-module:A"), "target 'my-module:A' must look like"),
        (("a", "m:A", ["size"]), "must be a mapping"),
        (("a", "m:A", {1: 2}), "must be a mapping with string keys"),
        (("a", "m:A", {}, None), "summary None"),
    ],
)
def test_malformed_specs_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec(*arguments)


def test_load_and_build(package: str) -> None:
    registry = registry_of(("teacher", Spec("thing", f"{package}.things:Thing", {"size": 3})))
    thing = registry.build("teacher", "thing")
    assert (thing.size, thing.colour) == (3, "red")
    thing = registry.build("teacher", "thing", size=5, colour="blue")
    assert (thing.size, thing.colour) == (5, "blue")
    assert Spec("large", f"{package}.things:Thing.large").load()().size == 100


def test_build_refuses_wrong_arguments_and_says_which_there_are(package: str) -> None:
    registry = registry_of(("teacher", Spec("thing", f"{package}.things:Thing", {"size": 3})))
    with pytest.raises(
        ValueError, match=r"teacher 'thing' of hovle-x 1\.0.*did you mean 'colour'.*size, colour"
    ):
        registry.build("teacher", "thing", color="blue")
    with pytest.raises(TypeError, match="from inside"):  # the target's own errors are not disguised
        registry.build("teacher", "thing", size=-1)


def test_load_names_spec_distribution_and_import_error(package: str) -> None:
    registry = registry_of(
        ("stage", Spec("broken", f"{package}.broken:Thing")),
        ("stage", Spec("typo", f"{package}.things:Thin")),
    )
    with pytest.raises(
        ValueError, match=r"'broken' of hovle-x 1\.0.*ModuleNotFoundError.*a_module_that_is_not"
    ):
        registry.get("stage", "broken").load()
    with pytest.raises(
        ValueError, match=r"'typo' of hovle-x 1\.0.*no attribute 'Thin'; did you mean 'Thing'"
    ):
        registry.get("stage", "typo").load()


def test_unknown_names_and_kinds_are_errors_with_suggestions() -> None:
    registry = registry_of(("stage", Spec("distillation", "m:D")), ("stage", Spec("alignment", "m:A")))
    with pytest.raises(
        ValueError, match=r"no stage 'distilation'; did you mean 'distillation'\? \(known: alignm"
    ):
        registry.get("stage", "distilation")
    with pytest.raises(ValueError, match="no teacher 'x'.*none is installed"):
        registry.build("teacher", "x")
    for call in (
        registry.specs,
        lambda kind: registry.get(kind, "x"),
        lambda kind: registry.provider(kind, "x"),
    ):
        with pytest.raises(ValueError, match="no kind 'teachers'; did you mean 'teacher'"):
            call("teachers")


def test_specs_are_sorted_and_kept_apart_by_kind() -> None:
    registry = registry_of(
        ("stage", Spec("b", "m:B")), ("teacher", Spec("b", "m:T")), ("stage", Spec("a", "m:A"))
    )
    assert [spec.name for spec in registry.specs("stage")] == ["a", "b"]
    assert [spec.target for spec in registry.specs("teacher")] == ["m:T"]
    assert all(registry.specs(kind) == [] for kind in set(KINDS) - {"stage", "teacher"})
    assert registry.provider("stage", "b") == ("hovle-x", "1.0")
    assert registry.get("stage", "b").distribution == "hovle-x 1.0"


def test_a_name_belongs_to_one_distribution() -> None:
    registry = registry_of(("teacher", Spec("a", "m:A")))
    with pytest.raises(ValueError, match=r"teacher 'a' is provided by both hovle-x 1\.0 and other-dist 2\.0"):
        registry.add_all([("teacher", Spec("new", "m:N")), ("teacher", Spec("a", "m:B"))], THEIRS)
    assert [spec.target for spec in registry.specs("teacher")] == ["m:A"]  # all of a provider or nothing
    with pytest.raises(ValueError, match=r"provided by hovle-x 1\.0 twice"):
        registry.add("teacher", Spec("a", "m:B"), OURS)


def test_resource_is_a_file_beside_the_package(package: str) -> None:
    registry = registry_of(
        ("recipe", Spec("tiny", f"{package}:recipes/tiny.yaml")),
        ("recipe", Spec("beside", f"{package}.things:recipes/tiny.yaml")),
        ("recipe", Spec("absent", f"{package}:recipes/none.yaml")),
        ("recipe", Spec("nowhere", "not_installed_anywhere:tiny.yaml")),
    )
    assert registry.resource("recipe", "tiny").read_text() == "a: 1\n"
    assert registry.resource("recipe", "beside") == registry.resource("recipe", "tiny")
    with pytest.raises(
        ValueError, match=r"recipe 'absent' of hovle-x 1\.0: there is no file 'recipes/none\.yaml'"
    ):
        registry.resource("recipe", "absent")
    with pytest.raises(ValueError, match="there is no package 'not_installed_anywhere'"):
        registry.resource("recipe", "nowhere")
