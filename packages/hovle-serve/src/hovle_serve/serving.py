"""What is served and how: one checked config for `hovle serve` and for Ray Serve, and the app made from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hovle_core.openmp import in_passing_thread
from hovle_serve.access import Access, KeyLimits
from hovle_serve.media import MediaFetcher, parsed_host
from hovle_serve.protocol import Limits

if TYPE_CHECKING:  # the config is read before torch is imported
    from fastapi import FastAPI


class EngineConfig(BaseModel):
    """`model` is a run, a folder of runs, a checkpoint or a hub id; `name` is what clients call it, by default the
    last part of that. The rest is the engine's. A bad or unknown field is a ValueError."""

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = Field(None, min_length=1)
    max_batch: int = Field(16, ge=1)
    max_cache_tokens: int = Field(65536, ge=1)
    max_queue: int = Field(64, ge=1)
    max_prefix_tokens: int = Field(16384, ge=0)

    @property
    def served_name(self) -> str:
        if self.name is not None:
            return self.name
        path = Path(self.model)
        return path.resolve().name if path.exists() else self.model


class AccessConfig(BaseModel):
    """`api_key_file` holds a key a line; without it everybody who reaches the port may ask. `key_limits` are those of a
    key, `limits` those of a request; pictures given by URL are fetched from `image_hosts` only."""

    model_config = ConfigDict(extra="forbid")

    api_key_file: str | None = None
    key_limits: KeyLimits = KeyLimits()
    limits: Limits = Limits()
    image_hosts: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> "AccessConfig":
        if self.api_key_file is None and self.key_limits != KeyLimits():
            raise ValueError(
                "key_limits (--max-in-flight, --max-requests-per-minute) are those of a key: give an api_key_file "
                "(--api-key-file) as well"
            )
        for host in self.image_hosts:
            parsed_host(host)  # raises for what is none
        return self


class ServeConfig(EngineConfig, AccessConfig):
    """One model on one machine."""


class ClusterConfig(AccessConfig):
    """Several models behind one address; of one model its fields may stand here themselves, without `models`."""

    models: list[EngineConfig] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "models" in fields:
            return fields
        one = {name: fields[name] for name in EngineConfig.model_fields if name in fields}
        return {**{name: value for name, value in fields.items() if name not in one}, "models": [one]}


def build_app(config: ServeConfig) -> "FastAPI":
    """Load the model and start its engine (`app.state.engine`), which the app closes at its shutdown.

    Raises ValueError where there is nothing to serve (see `hovle_core.runs.latest_checkpoint`) and as
    `read_api_keys`.
    """
    access = build_access(config)

    from hovle_serve.api import create_app
    from hovle_serve.chat import load
    from hovle_serve.engine import Engine

    model, processor = in_passing_thread(lambda: load(config.model))  # the engine's own computes from here on
    engine = Engine(
        model,
        processor,
        config.max_batch,
        config.max_cache_tokens,
        config.max_queue,
        config.max_prefix_tokens,
    )
    media = MediaFetcher(config.image_hosts) if config.image_hosts else None
    return create_app(engine, config.served_name, access, config.limits, media)


def build_access(config: AccessConfig) -> Access:
    """Raises ValueError as `read_api_keys`."""
    keys = () if config.api_key_file is None else read_api_keys(config.api_key_file)
    return Access(keys, config.key_limits)


def read_api_keys(path: str) -> list[str]:
    """The keys of a file, one a line; empty lines and those that begin with # are left out.

    Raises ValueError for a file that cannot be read, is no UTF-8 or holds no key, and for a key that clients send in
    unlike bytes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ValueError(f"api_key_file {path!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"api_key_file {path!r} is not UTF-8 text") from error
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if odd := [
        i for i, line in enumerate(lines, 1) if line in keys and not (line.isascii() and line.isprintable())
    ]:
        raise ValueError(
            f"api_key_file {path!r}, line {odd[0]}: a key has printable characters of ASCII only, as headers have"
        )
    if not keys:
        raise ValueError(f"api_key_file {path!r} holds no key: write one a line, or serve without a key file")
    return keys
