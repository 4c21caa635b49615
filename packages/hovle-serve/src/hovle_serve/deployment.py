"""The same on Ray Serve: `serve deploy` with `import_path: hovle_serve.deployment:app`, see docs/serve.md.

A gateway (HTTP, keys, limits; no torch) before one deployment a model, each with replicas of its own.
"""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from hovle_serve.gateway import ReplicaLostError, Replicas, ReplicasBusyError, create_gateway
from hovle_serve.relay import Relayed, answered
from hovle_serve.serving import (
    AccessConfig,
    ClusterConfig,
    EngineConfig,
    ServeConfig,
    build_access,
    build_app,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

GATEWAY = "gateway"
DRAIN_SECONDS = 120  # a replica that is replaced finishes what it answers


class HovleModel:
    """A replica: one model, one engine."""

    def __init__(self, config: ServeConfig) -> None:
        self.app = build_app(config)

    async def answer(self, request: Relayed) -> AsyncGenerator[list[Message], None]:
        async with aclosing(answered(self.app, request)) as messages:
            async for together in messages:
                yield together

    def check_health(self) -> None:
        """Ray replaces a replica whose health check raises."""
        if not self.app.state.engine.is_running:
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        """Ray calls this when the replica has answered everybody."""
        if hasattr(self, "app"):
            self.app.state.engine.close()


@serve.ingress()
class Gateway:
    def __init__(self, config: AccessConfig, models: dict[str, DeploymentHandle]) -> None:
        self.config, self.models = config, models

    def __serve_build_asgi_app__(self) -> "FastAPI":
        replicas = {name: _replicas(handle) for name, handle in self.models.items()}
        return create_gateway(replicas, build_access(self.config), self.config.limits)


def _replicas(handle: DeploymentHandle) -> Replicas:
    ask = handle.options(method_name="answer", stream=True)

    async def replicas(request: Relayed) -> AsyncGenerator[list[Message], None]:
        response = ask.remote(request)
        del request  # megabytes, which the gateway counts no longer than until something of the answer comes
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for together in response:
                yield together
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLostError(str(error)) from error
        except RayTaskError as error:  # what an actor's death looks like to a task that waited for it
            if isinstance(getattr(error, "cause", None), RayActorError):
                raise ReplicaLostError(str(error)) from error
            raise
        except BackPressureError as error:
            raise ReplicasBusyError(str(error)) from error
        finally:
            with suppress(
                RayServeException, RayActorError
            ):  # it raises once more why a request was never begun
                response.cancel()  # does nothing at the end of an answer

    return replicas


def app(args: ClusterConfig) -> Application:
    """What Ray Serve calls with `args` of the config file, whose `deployments` may override what is set here.

    Replicas of a model come and go with its requests in flight: one for each `max_batch` of them. A replica takes what
    its batch and queue hold, and answers more with 429 itself; what finds every replica full waits in Ray, as many
    again, and more is answered with 503.
    """
    models = {config.served_name: _model(config, args) for config in args.models}
    if len(models) < len(args.models):
        raise ValueError("models: two of them have one name; give one of them another `name`")
    gateway = serve.deployment(
        name=GATEWAY,
        max_ongoing_requests=10_000,  # it bounds what it holds itself
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    return gateway(Gateway).bind(
        AccessConfig(**{name: getattr(args, name) for name in AccessConfig.model_fields}), models
    )


def _model(config: EngineConfig, access: AccessConfig) -> Application:
    deploy = serve.deployment(
        name=deployment_name(config),
        max_ongoing_requests=config.max_batch + config.max_queue,
        max_queued_requests=config.max_queue,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": config.max_batch,
        },
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    # Keys are the gateway's: nobody else reaches a replica.
    whole = ServeConfig(**config.model_dump(), limits=access.limits, image_hosts=access.image_hosts)
    return deploy(HovleModel).bind(whole)


def deployment_name(config: EngineConfig) -> str:
    """What `deployments` of a config file call a model: its name, with "-" for what Ray has another use for."""
    return re.sub(r"[^\w.-]", "-", config.served_name)
