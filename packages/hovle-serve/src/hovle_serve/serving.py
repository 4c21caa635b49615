"""What is served and how: one checked config for `hovle serve` and for Ray Serve, and the app made from it."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from hovle_serve.protocol import Limits

if TYPE_CHECKING:  # the config is read before torch is imported
    from fastapi import FastAPI


class ServeConfig(BaseModel):
    """`model` is a run, a folder of runs, a checkpoint or a hub id; `name` is what clients call it, by default the
    last part of that. `api_key_file` holds a key a line; without it everybody who reaches the port may ask.
    max_batch, max_cache_tokens, max_queue and max_prefix_tokens are the engine's, `limits` those of a request. A bad or
    unknown field is a ValueError."""

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = Field(None, min_length=1)
    api_key_file: str | None = None
    max_batch: int = Field(16, ge=1)
    max_cache_tokens: int = Field(65536, ge=1)
    max_queue: int = Field(64, ge=1)
    max_prefix_tokens: int = Field(16384, ge=0)
    limits: Limits = Limits()

    @property
    def served_name(self) -> str:
        if self.name is not None:
            return self.name
        path = Path(self.model)
        return path.resolve().name if path.exists() else self.model


def build_app(config: ServeConfig) -> "FastAPI":
    """Load the model and start its engine (`app.state.engine`), which the app closes at its shutdown.

    Raises ValueError where there is nothing to serve (see `hovle_core.runs.latest_checkpoint`) and for a key file
    without keys.
    """
    api_keys = () if config.api_key_file is None else read_api_keys(config.api_key_file)

    from hovle_serve.api import create_app
    from hovle_serve.chat import load
    from hovle_serve.engine import Engine

    model, processor = load(config.model)
    engine = Engine(
        model,
        processor,
        config.max_batch,
        config.max_cache_tokens,
        config.max_queue,
        config.max_prefix_tokens,
    )
    return create_app(engine, config.served_name, api_keys, config.limits)


def read_api_keys(path: str) -> list[str]:
    """The keys of a file, one a line; empty lines and those that begin with # are left out."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file {path!r} holds no key: write one a line, or serve without a key file")
    return keys
