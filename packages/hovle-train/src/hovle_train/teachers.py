"""Several teachers at once: joined they are one teacher with wider features, and the student has a head for each.

Shapes: N tiles, P image tokens a tile, C_i channels of teacher i, C their sum, D hidden size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hovle_core.registry import Registry
from hovle_core.roles import TeacherEncoder
from hovle_train.features import to_student_grid
from hovle_train.recipe_sections import Named


class JoinedTeachers(TeacherEncoder):
    """Teachers whose grids are brought to the student's, one behind the other in the channels: `[N, √P, √P, C]`."""

    def __init__(self, teachers: Sequence[TeacherEncoder], num_tokens: int):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.num_tokens = num_tokens
        self.feature_size = sum(teacher.feature_size for teacher in teachers)
        self.requires_grad_(False)
        self.train(False)

    def grid_features(self, tiles: Tensor) -> Tensor:
        grids = [to_student_grid(teacher.features(tiles), self.num_tokens) for teacher in self.teachers]  # type: ignore[operator]
        side = round(self.num_tokens**0.5)
        return torch.cat(grids, dim=-1).unflatten(1, (side, side))


class JoinedHeads(nn.Module):
    """A head for each teacher, on the same tokens: `[M, D] -> [M, C]`."""

    def __init__(self, heads: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.parts], dim=-1)


def build_teacher(given: Sequence[Named], registry: Registry, num_tokens: int) -> TeacherEncoder:
    """The teacher of a recipe, or all of them joined. Raises ValueError for a plugin that returns something else."""
    built = []
    for named in given:
        teacher = registry.build("teacher", named.name, **named.options)
        if not isinstance(teacher, TeacherEncoder):
            raise ValueError(f"teacher {named.name!r} is a {type(teacher).__name__}, not a TeacherEncoder")
        built.append(teacher.eval().requires_grad_(False))
    return built[0] if len(built) == 1 else JoinedTeachers(built, num_tokens)


def widths(teacher: TeacherEncoder) -> list[int]:
    """Channels of each teacher in the features of a joined one, or of the only one."""
    parts = teacher.teachers if isinstance(teacher, JoinedTeachers) else [teacher]
    return [int(part.feature_size) for part in parts]  # type: ignore[arg-type]


def join_heads(heads: Sequence[nn.Module]) -> nn.Module:
    """The heads of several teachers as one; of one teacher its head alone."""
    return heads[0] if len(heads) == 1 else JoinedHeads(heads)


def heads_of(head: nn.Module) -> list[nn.Module]:
    """The head of each teacher."""
    return list(head.parts) if isinstance(head, JoinedHeads) else [head]


def load_heads(tensors: Mapping[str, Tensor], load: Callable[[dict[str, Tensor]], nn.Module]) -> nn.Module:
    """What `join_heads` made, from its state dict; `load` makes one head from its own."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("parts."):
            _, index, own = name.split(".", 2)
            parts.setdefault(int(index), {})[own] = tensor
    return JoinedHeads(load(parts[i]) for i in sorted(parts)) if parts else load(dict(tensors))


def target_names(given: Sequence[Named]) -> list[str]:
    """What the log calls the cosine to each of several teachers: `image_cosine/dinov3`; a second one `dinov3-2`."""
    names: list[str] = []
    for i, named in enumerate(given):
        before = sum(other.name == named.name for other in given[:i])
        names.append(f"image_cosine/{named.name}" + (f"-{before + 1}" if before else ""))
    return names


def made_by(given: Sequence[Named]) -> Any:
    """What the features of these teachers depend on, as JSON."""
    fields = [{"name": named.name, "options": named.options} for named in given]
    return fields[0] if len(fields) == 1 else fields
