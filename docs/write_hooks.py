"""Write docs/hooks.md from the docstrings of hooks, contracts and conformance tests: python docs/write_hooks.py"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hovle_core import hookspecs, roles
from hovle_core.plugins import HOOKS
from hovle_core.testing import conformance

PAGE = Path(__file__).with_name("hooks.md")
SUITES = ("Teacher", "Backbone", "Tokenizer", "Dataset", "Stage")


def page() -> str:
    """The whole page."""
    return "\n".join([*_hooks(), *_contracts(), *_suites()])


def _hooks() -> Iterator[str]:
    yield "# Hooks, contracts, and what a plugin must keep\n"
    yield "Written by `python docs/write_hooks.py` from docstrings; a test compares.\n"
    yield "How to use them: [plugins.md](plugins.md).\n"
    yield _markdown(hookspecs.__doc__) + "\n"
    section = None
    lines = inspect.getsource(hookspecs).splitlines()
    for name in HOOKS:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
        titles = [found[1] for line in lines[:at] if (found := re.match(r"# --- (.+?) -+$", line))]
        if titles[-1] != section:
            section = titles[-1]
            yield f"## {section[0].upper()}{section[1:]}\n"
        signature = lines[at].removeprefix("def ").partition("  #")[0].rstrip(":")
        yield f"### `{signature}`\n"
        yield _markdown(getattr(hookspecs, name).__doc__) + "\n"


def _contracts() -> Iterator[str]:
    yield "## Contracts (`hovle_core.roles`)\n"
    for contract in (roles.TeacherEncoder, roles.LLMBackbone, roles.TokenizerProvider):
        yield f"### `{contract.__name__}`\n"
        yield _markdown(contract.__doc__) + "\n"
        for name, method in vars(contract).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                yield f"- `{name}`: {_line(method)}"
        yield ""


def _suites() -> Iterator[str]:
    yield "## What `hovle plugin test` asks (`hovle_core.testing.conformance`)\n"
    yield "Of every kind:\n"
    yield from _promises(conformance.SpecTests, ())
    for kind in SUITES:
        suite = getattr(conformance, f"{kind}Tests")
        yield f"\nOf a {kind.lower()}:\n"
        yield from _promises(suite, dir(conformance.SpecTests))
    yield ""


def _promises(suite: Any, known: Any) -> Iterator[str]:
    for base in reversed(suite.__mro__):
        for name, test in vars(base).items():
            if name.startswith("test_") and name not in known:
                yield f"- *{name.removeprefix('test_').replace('_', ' ')}*: {_line(test)}"


def _line(documented: Any) -> str:
    return " ".join(_markdown(documented.__doc__).split())


def _markdown(docstring: str | None) -> str:
    assert docstring, "every hook, contract and test says what it is"
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", inspect.cleandoc(docstring))
    return text.replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page())
