"""Whether Ray has room for a run: what asks for more than there is would wait for it and say nothing."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hovle_train.config import Recipe
from hovle_train.runs import STATUS_FILE, write_text

logger = logging.getLogger(__name__)

# Ray's own unit of a resource, in which ten tenths are one.
_UNIT = 10_000
# Of a node's resources, what nobody asks for in a recipe.
_OWN = ("node:", "memory", "object_store_memory")


@dataclass
class Request:
    """`count` actors that each want `bundle`, on nodes with these labels."""

    what: str
    count: int
    bundle: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        wanted = [f"{name} {amount:g}" for name, amount in self.bundle.items()]
        wanted += [f"label {name}={value}" for name, value in self.labels.items()]
        return f"{self.count} {self.what} with {', '.join(wanted)} each"


def requests(recipe: Recipe, cpus: int) -> list[Request]:
    """What a run asks Ray for, its workers with `cpus` cores each."""
    resources, pool = recipe.resources, recipe.resources.teacher_pool
    bundle = {"CPU": cpus, **({"GPU": 1} if resources.use_gpu else {}), **resources.custom}
    if resources.accelerator_type is not None:
        bundle[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    found = [Request("workers (resources)", resources.num_workers, bundle, resources.labels)]
    if pool is not None:
        bundle = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.custom}
        bundle = {name: amount for name, amount in bundle.items() if amount > 0}
        found.insert(0, Request("teachers (resources.teacher_pool)", pool.actors, bundle, pool.labels))
    return found


def cores_a_worker(recipe: Recipe, nodes: Sequence[Mapping[str, Any]]) -> int:
    """As many cores as all workers can have of what the nodes have, when teachers have theirs; at least one.

    Where they do not fit yet, an equal share of the cores that there are: a cluster may grow.
    """
    most = max((int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]), default=1)
    rooms = (cpus for cpus in range(most, 0, -1) if without_room(requests(recipe, cpus), nodes) is None)
    total = sum(int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"])
    return next(rooms, max(1, total // recipe.resources.num_workers))


def without_room(asked: Sequence[Request], nodes: Sequence[Mapping[str, Any]]) -> Request | None:
    """The first request that does not fit into what `ray.nodes()` tells of, all of it being free, one after the other;
    None if all do."""
    free = [(_units(node["Resources"]), node.get("Labels", {})) for node in nodes if node["Alive"]]
    for request in asked:
        bundle = _units(request.bundle)
        for _ in range(request.count):
            for has, labels in free:
                if _matches(request.labels, labels) and all(
                    has.get(name, 0) >= amount for name, amount in bundle.items()
                ):
                    for name, amount in bundle.items():
                        has[name] -= amount
                    break
            else:
                return request
    return None


def check_room(recipe: Recipe, cpus: int, is_own: bool) -> None:
    """Say what a run would wait for, since a cluster may grow; raise ValueError where Ray is this machine's own
    (`is_own`), which does not."""
    import ray

    nodes = ray.nodes()
    request = without_room(requests(recipe, cpus), nodes)
    if request is None:
        return
    there = "; ".join(_said(node) for node in nodes if node["Alive"])
    if is_own:
        raise ValueError(f"there is no room for {request}: this machine has {there}. Ask for less")
    message = f"waiting for nodes: there is no room for {request}, among {there}"
    logger.warning(message)
    write_text(recipe.path / STATUS_FILE, message)


def _said(node: Mapping[str, Any]) -> str:
    has = [
        f"{name} {amount:g}"
        for name, amount in sorted(node["Resources"].items())
        if not name.startswith(_OWN)
    ]
    has += [
        f"label {k}={v}" for k, v in sorted(node.get("Labels", {}).items()) if not k.startswith("ray.io/")
    ]
    return ", ".join(has) or "a node without resources"


def _units(resources: Mapping[str, float]) -> dict[str, int]:
    return {name: round(amount * _UNIT) for name, amount in resources.items()}


def _matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node may have these labels; Ray's operators (!x, in(x, y)) are left to Ray."""
    return all(
        labels.get(name) == value for name, value in wanted.items() if not value.startswith(("!", "in("))
    )
