"""The server's metrics, in the format of Prometheus."""

from __future__ import annotations

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server; any thread may change them."""

    def __init__(self, device: torch.device) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.queue = self._gauge("queue_length", "Choices that wait for a slot.")
        self.slots = self._gauge("slots_used", "Choices that are being answered.")
        self.slots_total = self._gauge("slots", "Choices that can be answered at a time.")
        self.adapters = self._gauge("adapters", "Adapters that are loaded.")
        self.memory = self._gauge("device_memory_bytes", "Memory of the device in use by tensors.")
        self.tokens = Counter("lit_adapter_tokens", "Tokens generated.", registry=self.registry)
        self.prompt_tokens = Counter(
            "lit_adapter_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.step = self._histogram("step_seconds", "A step of the engine.")
        self.waited = self._histogram("queue_seconds", "From the request to a slot.")
        self.first_token = self._histogram("first_token_seconds", "From the request to its first token.")
        self.between_tokens = self._histogram(
            "between_tokens_seconds", "Between two tokens of an answer; the mean of those sent together."
        )
        self.requests = Counter(
            "lit_adapter_requests", "Requests by their status.", ("route", "status"), registry=self.registry
        )
        self.seconds = self._histogram("request_seconds", "From a request to the end of its answer.")
        self.usual_seconds = 1.0
        """A running mean of how long a request takes."""
        if device.type == "cuda":
            self.memory.set_function(lambda: torch.cuda.memory_allocated(device))

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"lit_adapter_{name}", what, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"lit_adapter_{name}", what, buckets=_SECONDS, registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended; ``route`` is one of the server's own paths."""
        self.requests.labels(route, str(status)).inc()
        if route.endswith("/completions"):
            self.seconds.observe(seconds)
            if status == 200:
                self.usual_seconds += 0.1 * (seconds - self.usual_seconds)

    def page(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)
