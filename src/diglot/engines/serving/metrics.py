"""What the proxy counts, in the form of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "diglot_proxy_requests", "Requests by path and status.", ["path", "status"], registry=own
        )
        self.seconds = Histogram(
            "diglot_proxy_request_seconds",
            "From the last byte of a request to its answer.",
            buckets=_SECONDS,
            registry=own,
        )
        self.under_way = Gauge("diglot_proxy_requests_under_way", "Requests accepted and not answered.", registry=own)
        self.sampled = Counter(
            "diglot_proxy_sampled_tokens", "The student's tokens in turns that were found.", registry=own
        )
        self.scored = Counter("diglot_proxy_scored_tokens", "Those of them that were scored.", registry=own)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
