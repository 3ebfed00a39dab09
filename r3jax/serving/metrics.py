"""Figures for Prometheus, of one server."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """`text` is what /metrics says."""

    def __init__(self, waiting: Callable[[], int]):
        """waiting: rows in the queue now."""
        self.registry = CollectorRegistry()
        on: Any = {"registry": self.registry}
        self.requests = Counter("r3jax_requests", "Requests answered.", ["path", "status"], **on)
        self.seconds = Histogram("r3jax_request_seconds", "From request to answer.", ["path"], buckets=BUCKETS, **on)
        self.batches = Histogram("r3jax_batch_rows", "Rows of a batch.", ["mode"], buckets=ROWS, **on)
        self.read = Counter("r3jax_text_tokens", "Tokens of texts read.", ["mode"], **on)
        self.written = Counter("r3jax_thought_tokens", "Tokens written by the model.", **on)
        self.cut = Counter("r3jax_cut_texts", "Texts longer than the model reads.", ["mode"], **on)
        Gauge("r3jax_waiting_rows", "Rows in the queue.", **on).set_function(waiting)

    def text(self) -> str:
        return generate_latest(self.registry).decode()
