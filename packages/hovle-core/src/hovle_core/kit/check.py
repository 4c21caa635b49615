"""`hovle plugin test`: the conformance suite over what an installed plugin provides, and a plain report."""

import inspect
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hovle_core.kit.new import KINDS, fields_of, render
from hovle_core.plugins import HovlePlugins
from hovle_core.registry import Spec, did_you_mean, spelt

if TYPE_CHECKING:
    import pytest

_WIDTH = 100
# Stages and token mixers are also given what only a run has.
BUILT_FROM_OPTIONS = ("teacher", "backbone", "tokenizer", "dataset")


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """`["size=56", "path=/data"]` -> `{"size": 56, "path": "/data"}`; values are JSON where they read as such."""
    options: dict[str, Any] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"--option {option!r} must read KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def provided_specs(plugins: HovlePlugins, name: str, only: Sequence[str] = ()) -> list[tuple[str, Spec]]:
    """What plugin `name` provides that the suite knows, or of it only the specs named.

    Raises ValueError for a plugin that is not installed, is broken or disabled, or provides nothing to test.
    """
    info = {info.name: info for info in plugins.plugins}.get(name)
    if info is None:
        names = [info.name for info in plugins.plugins]
        raise ValueError(
            f"no plugin {name!r} is installed{did_you_mean(name, names)} (installed: {', '.join(names)}); "
            "pip install -e its folder first"
        )
    if info.status != "loaded":
        raise ValueError(info.error or f"plugin {name!r} is disabled by HOVLE_PLUGINS")
    found = [(kind, spec) for kind, spec in plugins.provided[name] if kind in KINDS]
    if not found:
        raise ValueError(
            f"plugin {name!r} provides nothing that the suite tests ({', '.join(map(spelt, KINDS))})"
        )
    names = [spec.name for _, spec in found]
    for wanted in only:
        if wanted not in names:
            raise ValueError(
                f"plugin {name!r} does not provide {wanted!r}{did_you_mean(wanted, names)} (it provides: "
                f"{', '.join(names)})"
            )
    return [
        (kind, plugins.registry.get(kind, spec.name)) for kind, spec in found if not only or spec.name in only
    ]


def file_for(kind: str, spec: Spec, options: Mapping[str, Any]) -> str:
    """A test file for one spec, as `hovle plugin new` writes it; datasets read what `options` name."""
    if kind != "dataset":
        written = ", ".join(f"{key!r}: {value!r}" for key, value in options.items())
        return render(f"{kind}_test.py", {**fields_of("plugin", kind), "name": spec.name, "options": written})
    return (
        "from hovle_core.testing.conformance import DatasetTests\n\n\n"
        f"class TestPlugin(DatasetTests):\n    name = {spec.name!r}\n    options = {dict(options)!r}\n"
    )


def run(specs: Sequence[tuple[str, Spec]], options: Mapping[str, Any]) -> int:
    """Test each spec and print the report; 0 if all holds, 1 if something does not.

    Raises ValueError where pytest is not installed, and for a spec that lacks an argument, which `options` can give.
    """
    try:
        import pytest
    except ImportError:
        raise ValueError(
            "hovle plugin test runs pytest, which is not installed: pip install pytest"
        ) from None
    for kind, spec in specs:
        if kind in BUILT_FROM_OPTIONS:
            _check_arguments(spec, options)
    failed = passed = 0
    with tempfile.TemporaryDirectory(prefix="hovle-plugin-test-") as folder:
        for number, (kind, spec) in enumerate(specs):
            print(f"{spelt(kind)} {spec.name}  ({spec.distribution})", flush=True)
            path = Path(folder) / f"test_spec_{number}.py"
            path.write_text(file_for(kind, spec, options))
            report = Report()
            quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
            pytest.main(
                [str(path), "-c", os.devnull, "--rootdir", folder, "--import-mode=importlib", *quiet],
                plugins=[report],
            )
            sys.modules.pop(path.stem, None)  # a second run in this process has a file of the same name
            report.show()
            failed, passed = failed + len(report.failed), passed + report.passed
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _check_arguments(spec: Spec, options: Mapping[str, Any]) -> None:
    """Raise ValueError naming the arguments that nobody gave and that have no default."""
    try:
        parameters = inspect.signature(spec.load()).parameters.values()
    except (TypeError, ValueError):  # no signature to look at, or not importable, which the suite reports
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in {**spec.kwargs, **options}
    ]
    if needed:
        raise ValueError(
            f"{spec.name!r} needs {', '.join(needed)}: give {' '.join(f'--option {name}=VALUE' for name in needed)}"
        )


class Report:
    """A pytest plugin that keeps what passed, and of what failed the test, the message and why it matters."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self._why: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: "list[pytest.Item]") -> None:
        self._why = {item.nodeid: " ".join((getattr(item, "obj").__doc__ or "").split()) for item in items}  # noqa: B009

    def pytest_collectreport(self, report: "pytest.CollectReport") -> None:
        if report.failed:
            self._fail("the tests can be collected", str(report.longrepr), "")

    def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
        title = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        if report.failed:
            self._fail(title, _message(report.longrepr), self._why.get(report.nodeid, ""))
        elif report.when == "call":
            self.passed += 1
            self.lines.append(f"  ok      {title}")

    def _fail(self, title: str, message: str, why: str) -> None:
        first = next((t for t, m in self.failed if m == message), None)
        self.failed.append((title, message))
        self.lines.append(f"  FAILED  {title}")
        if first is not None:  # such as an option that is missing: every test stops at it
            self.lines.append(f"            as above: {first}")
            return
        texts = [message, *([f"why it matters: {why}"] if why else [])]
        for text in texts:
            for line in text.splitlines():
                self.lines += textwrap.wrap(line, _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 14)

    def show(self) -> None:
        print("\n".join(self.lines), flush=True)


def _message(longrepr: Any) -> str:
    """The error alone, and where it was raised if it is not the suite's own word."""
    crash = getattr(longrepr, "reprcrash", None)
    if crash is None:
        return str(longrepr)
    if crash.message.startswith("AssertionError: "):
        return str(crash.message).removeprefix("AssertionError: ").partition("\nassert ")[0]
    return f"{crash.message}\n(raised in {crash.path}:{crash.lineno})"
