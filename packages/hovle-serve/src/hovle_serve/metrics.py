"""What `/metrics` shows, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hovle_serve.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One registry an app, so that two apps in a process do not count for each other."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = Counter(
            "hovle_prompt_tokens", "Tokens of prompts whose answers began", registry=self.registry
        )
        self.completion_tokens = Counter(
            "hovle_completion_tokens",
            "Tokens of answers, also of those whose clients hung up",
            registry=self.registry,
        )
        self.first_token = Histogram(
            "hovle_time_to_first_token_seconds",
            "From the queue to the first text of an answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between = Histogram(
            "hovle_time_between_tokens_seconds",
            "From text to text of an answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        for name, text, value in (
            ("hovle_active_requests", "Requests that decode", lambda: engine.num_active),
            ("hovle_waiting_requests", "Requests in the queue", lambda: engine.num_waiting),
            (
                "hovle_reused_prompt_tokens",
                "Tokens of prompts not read again, so far",
                lambda: engine.reused_tokens,
            ),
            ("hovle_cached_tokens", "Tokens in the cache, padding included", lambda: engine.cached_tokens),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)
