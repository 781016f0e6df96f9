"""What the server tells Prometheus."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .worker import Worker

PREFIX = "inference_budget"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, and gauges that are read when somebody asks.

    Args:
      worker: whose queue and rows are shown.
      memory_factors: of each budget class.
    """

    def __init__(self, worker: Worker, memory_factors: Mapping[str, float]) -> None:
        self._registry = registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": PREFIX, "registry": registry}
        self.requests = Counter("requests", "Requests to /v1/completions by status", ["status"], **options)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts, <BOS> included", **options)
        self.generated_tokens = Counter("generated_tokens", "Tokens generated and delivered", **options)
        self.finished = Counter(
            "finished", "Continuations that came to an end, by reason", ["finish_reason"], **options
        )
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request's body to its first token", buckets=SECONDS, **options
        )
        self.seconds = Histogram(
            "request_seconds", "From a request's body to the end of its answer", buckets=SECONDS, **options
        )
        self._gauge("queue_length", "Continuations that wait for a row").set_function(lambda: worker.waiting)
        self._gauge("queue_limit", "Continuations that may wait").set(worker.queue_limit)
        self._gauge("rows_in_use", "Rows that decode").set_function(lambda: worker.decoding)
        self._gauge("rows", "Rows that can decode at a time").set(worker.rows * len(memory_factors))
        factor = Gauge(
            "memory_factor", "How many times smaller a row's cache is than a full one", ["budget_class"], **options
        )
        for name, value in memory_factors.items():
            factor.labels(name).set(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, namespace=PREFIX, registry=self._registry)
