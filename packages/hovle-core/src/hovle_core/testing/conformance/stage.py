"""Conformance of training stages (`hovle_train.stages.base.Stage`), by what the loop asks of them.

hovle-core knows neither recipes nor shards, so the class around these tests makes them: `hovle plugin new --kind stage`
writes one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from hovle_core.processor import HovleProcessor
from hovle_core.registry import Registry
from hovle_core.testing.conformance.base import SpecTests

WEIGHTS, PICKLES = ".safetensors", (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class StageTests(SpecTests):
    """A stage of a small run. Override the class-scoped fixtures `recipe`, `batches` and `text_batch`.

    `subject` is the stage; `module` what its `build` returned, every parameter moved off its start, so that nothing
    hides behind projections that begin at zero.
    """

    kind = "stage"

    @pytest.fixture(scope="class")
    @classmethod
    def recipe(cls) -> Any:
        """A small `hovle_train.config.Recipe` of this stage."""
        raise NotImplementedError("override the class-scoped fixture `recipe`")

    @pytest.fixture(scope="class")
    @classmethod
    def batches(cls, subject: Any, module: nn.Module) -> Sequence[Any]:
        """Packed batches from `subject.stream`, after `subject.setup`."""
        raise NotImplementedError("override the class-scoped fixture `batches`")

    @pytest.fixture(scope="class")
    @classmethod
    def text_batch(cls, subject: Any) -> Any:
        """A packed batch without pictures."""
        raise NotImplementedError("override the class-scoped fixture `text_batch`")

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, recipe: Any, registry: Registry) -> dict[str, Any]:
        return {"recipe": recipe, "registry": registry}

    @pytest.fixture(scope="class")
    @classmethod
    def built(cls, subject: Any) -> tuple[nn.Module, HovleProcessor]:
        module, processor = subject.build()
        subject.processor = processor
        return module, processor

    @pytest.fixture(scope="class")
    @classmethod
    def module(cls, subject: Any, built: tuple[nn.Module, HovleProcessor]) -> nn.Module:
        module, prefixes = built[0], tuple(subject.trainable(built[0]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.requires_grad_(name.startswith(prefixes))
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=generator))
        return module.eval()

    def totals(self, stage: Any, module: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
        counts = dict.fromkeys(stage.target_kinds, 0.0)
        for batch in batches:
            for kind, count in stage.targets(module, batch).items():
                counts[kind] += count
        return {kind: max(1.0, count) for kind, count in counts.items()}

    def test_builds_a_module_and_its_processor(
        self, subject: Any, built: tuple[nn.Module, HovleProcessor]
    ) -> None:
        """The loop keeps masters in float32 and moves the module by itself."""
        module, processor = built
        assert isinstance(module, nn.Module), (
            f"build() returned a {type(module).__name__} first, not a module"
        )
        assert isinstance(processor, HovleProcessor), f"build() returned a {type(processor).__name__} second"
        other = {f"{p.dtype} on {p.device}" for p in module.parameters()} - {"torch.float32 on cpu"}
        assert not other, f"parameters are {sorted(other)}: build in float32 on the CPU"

    def test_builds_the_same_each_time(self, built: tuple[nn.Module, HovleProcessor], registry: Registry,
                                       arguments: dict[str, Any]) -> None:  # fmt: skip
        """Every rank builds its own, and a resumed run builds anew: new weights come from the recipe's seed."""
        first, second = (registry.build(self.kind, self.name, **arguments) for _ in range(2))
        torch.manual_seed(1)
        one = first.build()[0].state_dict()
        torch.manual_seed(2)
        two = second.build()[0].state_dict()
        differing = [name for name, tensor in one.items() if not torch.equal(two[name], tensor)]
        assert not differing, f"built twice, {differing[:3]} differ: seed new weights with recipe.seed"

    def test_trains_what_it_says(self, subject: Any, module: nn.Module) -> None:
        """A prefix that matches nothing would train nothing, or less than was meant."""
        prefixes = subject.trainable(module)
        assert prefixes, "trainable() is empty: name what trains, [''] for everything"
        names = [name for name, _ in module.named_parameters()]
        idle = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)]
        assert not idle, f"no parameter starts with {idle}; they are called {names[0]!r}, ..., {names[-1]!r}"

    def test_gradients_reach_what_trains_and_nothing_else(
        self, subject: Any, module: nn.Module, batches: Sequence[Any]
    ) -> None:
        """What gets no gradient stays as it began, however long a run is."""
        module.zero_grad()
        totals = self.totals(subject, module, batches)
        for batch in batches:
            value, _ = subject.loss(module, batch, totals)
            assert value.ndim == 0, f"the loss has shape {list(value.shape)}: return its sum"
            assert value.isfinite(), f"the loss is {float(value)}"
            value.backward()
        parameters = dict(module.named_parameters())
        for prefix in subject.trainable(module):
            reached = [
                n
                for n, p in parameters.items()
                if n.startswith(prefix) and p.grad is not None and p.grad.any()
            ]
            assert reached, f"{prefix!r} is to train, and no gradient reaches it"
        frozen = [name for name, p in parameters.items() if p.grad is not None and not p.requires_grad]
        assert not frozen, f"{frozen[:3]} are frozen and have gradients"

    def test_counts_what_it_logs(self, subject: Any, module: nn.Module, batches: Sequence[Any]) -> None:
        """The log divides each sum by the number of targets of the same name, over all ranks."""
        kinds = set(subject.target_kinds)
        counted = set(subject.targets(module, batches[0]))
        assert counted <= kinds, f"targets() names {sorted(counted - kinds)}, target_kinds is {sorted(kinds)}"
        _, logged = subject.loss(module, batches[0], self.totals(subject, module, batches))
        assert set(logged) <= kinds, (
            f"loss() logs {sorted(set(logged) - kinds)}, target_kinds is {sorted(kinds)}"
        )
        carried = [name for name, value in logged.items() if value.requires_grad]
        assert not carried, f"{carried} of the log carry gradients, and so all of their graphs: detach them"

    def test_loss_is_a_share_of_the_whole_step(
        self, subject: Any, module: nn.Module, batches: Sequence[Any]
    ) -> None:
        """Divided by the targets of the step over all ranks: micro-batches and world size then change no result."""
        totals = self.totals(subject, module, batches)
        once = float(subject.loss(module, batches[0], totals)[0].detach())
        doubled = {kind: 2 * count for kind, count in totals.items()}
        twice = float(subject.loss(module, batches[0], doubled)[0].detach())
        assert abs(once - 2 * twice) <= 1e-4 * max(1e-3, abs(once)), (
            f"twice as many targets in the step turn {once:.6g} into {twice:.6g}, not into half: "
            "divide sums by `totals` and not by what is in the batch"
        )

    def test_same_batch_same_loss(self, subject: Any, module: nn.Module, batches: Sequence[Any]) -> None:
        """A step's randomness is torch's, seeded by the loop: nothing else may be drawn from."""
        totals = self.totals(subject, module, batches)
        values = []
        for _ in range(2):
            torch.manual_seed(0)
            values.append(float(subject.loss(module, batches[0], totals)[0].detach()))
        assert values[0] == values[1], f"the same batch gave {values[0]} and then {values[1]}"

    def test_takes_a_batch_without_pictures(self, subject: Any, module: nn.Module, text_batch: Any) -> None:
        """Ranks have no picture in some steps: `pixel_values` is None there."""
        value, _ = subject.loss(module, text_batch, self.totals(subject, module, [text_batch]))
        assert value.isfinite(), f"the loss of a batch without pictures is {float(value)}"

    def test_exports_a_checkpoint(
        self, subject: Any, built: tuple[nn.Module, HovleProcessor], tmp_path: Path
    ) -> None:
        """The next stage, chat and serving start from the folder: transformers' format, no pickles."""
        subject.export(*built, tmp_path)
        files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert any(name.endswith(WEIGHTS) for name in files), (
            f"export wrote no {WEIGHTS} file: {sorted(files)}"
        )
        pickles = sorted(name for name in files if name.endswith(PICKLES))
        assert not pickles, f"export wrote pickles, which can run code: {pickles}; save with safetensors"
        AutoConfig.from_pretrained(tmp_path)
