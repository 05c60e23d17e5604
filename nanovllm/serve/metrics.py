"""What a Prometheus server may read."""

from collections.abc import Iterator, Sized
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanovllm.engine.outputs import RequestMetrics
from nanovllm.engine.sequence import Sequence
from nanovllm.llm import LLM

FIRST = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100  # seconds
EACH = 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3


class Metrics:
    """Counts what an engine does for those who ask it."""

    def __init__(self, llm: LLM, waited_for: Sized):
        self.llm, self.waited_for, self.registry = llm, waited_for, CollectorRegistry()
        count = partial(Counter, registry=self.registry, namespace="nanovllm")
        measure = partial(Histogram, registry=self.registry, namespace="nanovllm")
        self.prompt = count("prompt_tokens", "Tokens of the prompts of ended requests")
        self.cached = count("cached_tokens", "Of these, spared by the prefix cache")
        self.generated = count("generated_tokens", "Tokens told to callers")
        self.ended = count("requests", "Requests that have ended", ["finish_reason"])
        self.first = measure("time_to_first_token_seconds", "From arrival", buckets=FIRST)
        self.each = measure("time_per_output_token_seconds", "A request's mean", buckets=EACH)
        self.registry.register(self)

    def note(self, seq: Sequence, num_new: int, end: RequestMetrics | None) -> None:
        """So many tokens of a sequence are told; it may have ended."""
        self.generated.inc(num_new)
        if seq.finish_reason is not None:
            self.ended.labels(seq.finish_reason).inc()
        if end is None:
            return
        self.prompt.inc(seq.num_prompt_tokens)
        self.cached.inc(end["num_cached_tokens"])
        for seen, value in (
            (self.first, end["time_to_first_token"]),
            (self.each, end["time_per_output_token"]),
        ):
            if value is not None:
                seen.observe(value)

    def collect(self) -> Iterator[Metric]:
        """How much the engine has to do now; Prometheus's client asks."""
        scheduler = self.llm.scheduler
        used = 1 - len(scheduler.block_manager.free_blocks) / scheduler.num_blocks
        for name, text, value in (
            ("requests_running", "Requests that have a part in each step", len(scheduler.running)),
            ("requests_waiting", "Requests that wait for a step", len(scheduler.waiting)),
            ("requests_open", "Requests whose caller waits", len(self.waited_for)),
            ("cache_usage_ratio", "Share of the cache's blocks in use", used),
        ):
            yield GaugeMetricFamily(f"nanovllm_{name}", text, value=value)
        text = "Times that a request gave its blocks back"
        yield CounterMetricFamily("nanovllm_preemptions", text, value=scheduler.num_preemptions)

    def page(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)
