"""The same app on Ray Serve: `serve deploy` with `import_path: hovle_serve.deployment:app`, see docs/serve.md."""

from typing import TYPE_CHECKING

from ray import serve
from ray.serve import Application

from hovle_serve.serving import ServeConfig, build_app

if TYPE_CHECKING:
    from fastapi import FastAPI


@serve.ingress()
class HovleServer:
    """A replica: one model, one engine."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config

    def __serve_build_asgi_app__(self) -> "FastAPI":
        app = build_app(self.config)
        self.engine = app.state.engine
        return app

    def check_health(self) -> None:
        """Ray replaces a replica whose health check raises."""
        if not self.engine.is_running:
            raise RuntimeError("the engine's thread has ended")


def app(args: ServeConfig) -> Application:
    """What Ray Serve calls with `args` of the config file, whose `deployments` may override what is set here.

    Replicas come and go with the requests in flight: one for each `max_batch` of them. A replica takes what its batch
    and queue hold, and answers more with 429 itself; what finds every replica full waits in Ray, as many again.
    """
    deploy = serve.deployment(
        name="hovle",
        max_ongoing_requests=args.max_batch + args.max_queue,
        max_queued_requests=args.max_queue,
        autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": args.max_batch},
        graceful_shutdown_timeout_s=120,  # a replica that is replaced finishes what it answers
    )
    return deploy(HovleServer).bind(args)
