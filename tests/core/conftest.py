"""Fake distributions: what pip would have installed, without pip."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HEADER = (
    "from hovle_core.hookspecs import hookimpl\nfrom hovle_core.registry import Spec\nHOVLE_HOOK_API = 1\n"
)


class SitePackages:
    """A folder on sys.path with ``*.dist-info`` folders that importlib.metadata reads like any installed ones."""

    def __init__(self, path: Path, allow: Callable[[str], None]) -> None:
        self.path = path
        self.modules: list[str] = []
        self.allow = allow

    def install(
        self, plugin: str, source: str, *, dist: str = "", version: str = "1.0", header: str = HEADER
    ) -> None:
        """Add distribution ``dist`` (default ``dist-<plugin>``) whose plugin module holds ``header + source``.

        ``HOVLE_PLUGINS`` lists the plugins installed here, so that what else is installed does not matter.
        """
        dist = dist or f"dist-{plugin}"
        module = f"fake_{dist}_{plugin}".replace("-", "_")
        (self.path / f"{module}.py").write_text(header + textwrap.dedent(source))
        info = self.path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[hovle]\n{plugin} = {module}\n" if file.tell() == 0 else f"{plugin} = {module}\n")
        self.modules.append(module)
        self.allow(plugin)


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    path = tmp_path / "site-packages"
    path.mkdir()
    allowed: list[str] = []

    def allow(plugin: str) -> None:
        allowed.append(plugin)
        monkeypatch.setenv("HOVLE_PLUGINS", ",".join(allowed))
        monkeypatch.syspath_prepend(path)  # forgets what importlib.metadata had read of the folder

    monkeypatch.setenv("HOVLE_PLUGINS", "")
    monkeypatch.syspath_prepend(path)
    site = SitePackages(path, allow)
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)
