"""What holds for every kind of spec: cheap to list, described, strict about its options."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from hovle_core.plugins import HovlePlugins, load_plugins
from hovle_core.registry import Registry, Spec

#: What `hovle --help` must not import.
HEAVY = ("torch", "transformers", "torchvision", "timm", "ray", "webdataset", "wandb", "tensorboardX")

_LIST = f"""
import sys
from hovle_core.plugins import load_plugins
load_plugins()
print(*[name for name in {HEAVY} if name in sys.modules])
"""


class SpecTests:
    """Base of all kinds. `subject` is what the spec's target returns for `options`, made once a class.

    Options that need files are made by overriding the class-scoped fixture `arguments`.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def plugins(cls) -> HovlePlugins:
        plugins = load_plugins(strict=False)
        if cls.name not in [spec.name for spec in plugins.registry.specs(cls.kind)]:
            plugins.raise_if_broken()  # the reason why it is not there, most likely
        return plugins

    @pytest.fixture(scope="class")
    @classmethod
    def registry(cls, plugins: HovlePlugins) -> Registry:
        return plugins.registry

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, registry: Registry) -> Spec:
        return registry.get(cls.kind, cls.name)

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls) -> dict[str, Any]:
        return dict(cls.options)

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, registry: Registry, arguments: dict[str, Any]) -> Any:
        return build(registry, cls.kind, cls.name, arguments)

    def test_is_listed_without_importing_torch(self, plugins: HovlePlugins, spec: Spec) -> None:
        """Every plugin is imported by every `hovle` command, also `hovle --help`: torch alone would add seconds."""
        (plugin,) = (name for name, provided in plugins.provided.items() if (self.kind, spec) in provided)
        environment = {
            **os.environ,
            "HOVLE_PLUGINS": plugin,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(
            [sys.executable, "-c", _LIST], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"it cannot be listed in a new process: {done.stderr.strip()}"
        assert not done.stdout.strip(), (
            f"listing plugin {plugin!r} imports {done.stdout.strip()}: import it in the module of the target "
            f"({spec.target}), not in that of the plugin"
        )

    def test_says_what_it_is(self, spec: Spec) -> None:
        """The summary is all that `hovle plugins list` shows of it."""
        assert spec.summary.strip(), f"Spec({spec.name!r}, ...) has no summary: write a line"
        assert "\n" not in spec.summary, "the summary has several lines: write one"

    def test_refuses_options_that_it_does_not_know(
        self, registry: Registry, arguments: dict[str, Any]
    ) -> None:
        """A misspelt option in a recipe must stop the run and not be ignored."""
        wrong = {**arguments, "hovle_no_such_option": 0}
        assert is_refused(lambda: registry.build(self.kind, self.name, **wrong)), (
            "an option that does not exist was taken without a word: name every option in the signature, no **kwargs"
        )


def build(registry: Registry, kind: str, name: str, arguments: Mapping[str, Any], seed: int = 0) -> Any:
    """Build the spec from one random state, for those whose weights are random in tests."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return registry.build(kind, name, **arguments)


def is_refused(call: Any) -> bool:
    """Whether `call()` raises ValueError, the error of a user's mistake."""
    try:
        call()
    except ValueError:
        return True
    return False
