"""Settings in YAML: sections without unknown keys, and errors that say which key was meant."""

from __future__ import annotations

import difflib
import re
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A part of a settings file: no unknown keys, no silent conversions of what was meant, finite numbers."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: the 1.1 that PyYAML speaks reads 1e-3 as a string, and people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$"), list("+-0123456789")
)


def read_yaml(text: str) -> Any:
    """`yaml.safe_load`, where `1e-3` is a number. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A pydantic error, one line a problem, with the nearest known key where one is misspelt."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {sorted(known)}"
            lines.append(f"  {where}: unknown key, {hint}")
        else:
            # Our own validators say which value they mean.
            own = problem["type"] in ("missing", "value_error")
            given = "" if own else f", got {problem['input']!r}"
            lines.append(f"  {where}: {problem['msg'].removeprefix('Value error, ')}{given}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(current.model_fields)
