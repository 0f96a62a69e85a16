"""Prometheus metrics, under the names of vLLM's, so that its dashboards read them."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_jax.generation.request import Delta, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84)
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a choice; several that came at once share their time.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "From submission to a slot.",
    "request_prefill_time_seconds": "From a slot to the first decoding step.",
    "request_decode_time_seconds": "From the first token to the last one.",
}
# Name -> field of `Stats`, and what it says.
COUNTERS = {
    "prompt_tokens": ("prompt", "Tokens of prompts, those of kept prefixes included."),
    "generation_tokens": ("generated", "Tokens generated."),
    "prefix_cache_queries": ("queried", "Tokens of prompts looked up among kept prefixes."),
    "prefix_cache_hits": ("cached", "Tokens of prompts found there."),
    "spec_decode_num_drafts": ("drafting_steps", "Decoding steps of a choice that verified drafts."),
    "spec_decode_num_draft_tokens": ("drafted", "Tokens drafted."),
    "spec_decode_num_accepted_tokens": ("accepted", "Drafts accepted."),
}


class Metrics:
    """What is counted here, and what the engine counts, which is asked when somebody looks."""

    def __init__(self, model: str, stats: Callable[[], Stats | None]):
        self._registry, self._model, self._stats = CollectorRegistry(), model, stats
        about = {"labelnames": ["model_name"], "registry": self._registry}
        self._times = {
            name: Histogram(f"vllm:{name}", text, buckets=SECONDS, **about).labels(model)
            for name, text in HISTOGRAMS.items()
        }
        self._ended = Counter(
            "vllm:request_success",
            "Choices by how they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def observe(self, name: str, seconds: float) -> None:
        self._times[name].observe(max(0.0, seconds))

    def ended(self, reason: str) -> None:
        self._ended.labels(self._model, reason).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's part: prometheus asks for it."""
        stats = self._stats()
        if stats is None:
            return
        gauges = {
            "num_requests_running": (stats.running, "Choices that have a slot."),
            "num_requests_waiting": (stats.waiting, "Choices that wait for a slot."),
            "kv_cache_usage_perc": (
                stats.held / max(stats.room, 1),
                "Tokens held, of those there is room for; 1 is all.",
            ),
        }
        for name, (value, text) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        for name, (field, text) in COUNTERS.items():
            family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], getattr(stats, field))
            yield family
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by their place in a step."
        family = CounterMetricFamily(name, text, labels=["model_name", "position"])
        for position, accepted in enumerate(stats.accepted_at):
            family.add_metric([self._model, str(position)], accepted)
        yield family


class Clock:
    """Times of one request. Times are of `time.monotonic`."""

    def __init__(self, metrics: Metrics, arrived: float):
        self._metrics, self._arrived = metrics, arrived
        self._last: dict[tuple[int, int], float] = {}
        self._first: dict[tuple[int, int], float] = {}
        self._known: set[int] = set()

    def take(self, prompt: int, delta: Delta, now: float) -> None:
        key, observe = (prompt, delta.choice), self._metrics.observe
        if prompt not in self._known:
            self._known.add(prompt)
            observe("time_to_first_token_seconds", now - self._arrived)
            observe("request_queue_time_seconds", delta.waited)
            observe("request_prefill_time_seconds", delta.prefilled)
        if key in self._last:
            for _ in delta.tokens:
                observe("inter_token_latency_seconds", (now - self._last[key]) / len(delta.tokens))
        self._first.setdefault(key, now)
        self._last[key] = now

    def end(self, now: float) -> None:
        self._metrics.observe("e2e_request_latency_seconds", now - self._arrived)
        for key, first in self._first.items():
            self._metrics.observe("request_decode_time_seconds", self._last[key] - first)
