"""Write docs/hooks.md, and a page of each hook in docs/hooks/, from the docstrings of hooks, contracts and conformance
tests: python docs/write_hooks.py"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hovle_core import hookspecs, roles
from hovle_core.kit.new import KINDS as WRITTEN
from hovle_core.kit.new import fields_of, render
from hovle_core.plugins import HOOKS
from hovle_core.registry import KINDS, hook_of, spelt
from hovle_core.testing import conformance

DOCS = Path(__file__).parent
WRITTEN_BY = "Written by `python docs/write_hooks.py` from docstrings; a test compares."
#: Kind -> what its target returns, where that is a class of ours, and the suite that asks for it.
CONTRACTS = {
    "teacher": roles.TeacherEncoder,
    "backbone": roles.LLMBackbone,
    "tokenizer": roles.TokenizerProvider,
    "token_mixer": roles.TokenMixer,
}
SUITES = {
    "teacher": conformance.TeacherTests,
    "backbone": conformance.BackboneTests,
    "tokenizer": conformance.TokenizerTests,
    "dataset": conformance.DatasetTests,
    "stage": conformance.StageTests,
    "token_mixer": conformance.TokenMixerTests,
}
KIND_OF = {hook_of(kind): kind for kind in KINDS}


def pages() -> dict[str, str]:
    """Path under docs/ -> text."""
    return {"hooks.md": "\n".join(_index())} | {f"hooks/{hook}.md": "\n".join(_page(hook)) for hook in HOOKS}


def _index() -> Iterator[str]:
    yield "# Hooks\n"
    yield f"{WRITTEN_BY} How to use them: [plugins.md](plugins.md).\n"
    yield _markdown(hookspecs.__doc__) + "\n"
    section = None
    for hook in HOOKS:
        if (title := _section(hook)) != section:
            if section is not None:
                yield ""
            section = title
            yield f"## {section[0].upper()}{section[1:]}\n"
        first = " ".join(_markdown(getattr(hookspecs, hook).__doc__).split("\n\n")[0].split())
        yield f"- [`{hook}`](hooks/{hook}.md): {first}"
    yield ""
    yield "## What `hovle plugin test` asks of every kind\n"
    yield from _promises(conformance.SpecTests, ())
    yield ""


def _page(hook: str) -> Iterator[str]:
    kind = KIND_OF.get(hook)
    yield f"# `{hook}`\n"
    yield f"{WRITTEN_BY} All hooks: [hooks.md](../hooks.md).\n"
    yield f"```python\n{_signature(hook)}\n```\n"
    yield _markdown(getattr(hookspecs, hook).__doc__) + "\n"
    if kind in WRITTEN:
        yield f"`hovle plugin new NAME --kind {spelt(kind)}` writes a package with it:\n"
        code = render("plugin.py", fields_of("name", kind))
        yield f"```python\n{code[code.index('@hookimpl') :]}```\n"
    if kind in CONTRACTS:
        yield from _contract(CONTRACTS[kind])
    if kind in SUITES:
        yield f"## What `hovle plugin test` asks (`hovle_core.testing.conformance.{SUITES[kind].__name__}`)\n"
        of_all = "[what it asks of every kind](../hooks.md#what-hovle-plugin-test-asks-of-every-kind)"
        yield f"Of a {spelt(kind)}, beside {of_all}:\n"
        yield from _promises(SUITES[kind], dir(conformance.SpecTests))
        yield ""


def _source() -> list[str]:
    return inspect.getsource(hookspecs).splitlines()


def _section(hook: str) -> str:
    """The title above a hook in hookspecs.py."""
    lines = _source()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"def {hook}("))
    return [found[1] for line in lines[:at] if (found := re.match(r"# --- (.+?) -+$", line))][-1]


def _signature(hook: str) -> str:
    line = next(line for line in _source() if line.startswith(f"def {hook}("))
    return line.partition("  #")[0]


def _contract(contract: type) -> Iterator[str]:
    yield f"## Contract: `hovle_core.roles.{contract.__name__}`\n"
    yield _markdown(contract.__doc__) + "\n"
    methods = [
        f"- `{name}`: {_line(method)}"
        for name, method in vars(contract).items()
        if inspect.isfunction(method) and not name.startswith("_")
    ]
    if methods:
        yield "\n".join(methods) + "\n"


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
    (DOCS / "hooks").mkdir(exist_ok=True)
    for path, text in pages().items():
        (DOCS / path).write_text(text)
