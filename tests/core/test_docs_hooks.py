"""docs/hooks.md, and the page of each hook, are what the docstrings say."""

import re
import runpy
from pathlib import Path

import pytest

from hovle_core.kit.new import KINDS
from hovle_core.plugins import HOOKS
from hovle_core.registry import hook_of

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return runpy.run_path(str(DOCS / "write_hooks.py"))["pages"]()


def test_the_pages_are_current(pages) -> None:
    for path, text in pages.items():
        assert (DOCS / path).read_text() == text, f"{path}: run `python docs/write_hooks.py`"
    assert {path.name for path in (DOCS / "hooks").iterdir()} == {f"{hook}.md" for hook in HOOKS}


def test_every_hook_has_a_page_and_a_line_in_the_index(pages) -> None:
    index = pages["hooks.md"]
    assert re.findall(r"\]\(hooks/(\w+)\.md\)", index) == list(HOOKS)
    assert index.index("## What exists") < index.index("hovle_teachers.md") < index.index("## Tell me when")
    for hook in HOOKS:
        assert f"```python\ndef {hook}(" in pages[f"hooks/{hook}.md"]
    assert ":class:" not in "".join(pages.values())


def test_pages_of_what_the_kit_writes_say_what_is_asked(pages) -> None:
    for kind in KINDS:
        page = pages[f"hooks/{hook_of(kind)}.md"]
        assert "## What `hovle plugin test` asks" in page
        assert page.count("\n- *") >= 5, kind
