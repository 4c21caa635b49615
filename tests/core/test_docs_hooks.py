"""docs/hooks.md is what the docstrings say."""

import runpy
from pathlib import Path

import pytest

from hovle_core.plugins import HOOKS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    return runpy.run_path(str(DOCS / "write_hooks.py"))["page"]()


def test_the_page_is_current(page: str) -> None:
    assert (DOCS / "hooks.md").read_text() == page, "run `python docs/write_hooks.py`"


def test_every_hook_is_on_it_once(page: str) -> None:
    for hook in HOOKS:
        assert page.count(f"### `{hook}(") == 1, hook
    assert page.index("## What exists") < page.index("hovle_teachers(") < page.index("## Tell me when")
    assert ":class:" not in page
