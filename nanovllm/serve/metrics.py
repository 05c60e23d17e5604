"""What a Prometheus server may read."""

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response

from nanovllm.serve.client import Answer, EngineClient
from nanovllm.serve.engine_loop import News

FIRST = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100  # seconds
EACH = 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3


class Metrics:
    """Counts what an engine tells."""

    def __init__(self, client: EngineClient):
        self.client, self.registry = client, CollectorRegistry()
        count = partial(Counter, registry=self.registry, namespace="nanovllm")
        measure = partial(Histogram, registry=self.registry, namespace="nanovllm")
        self.prompt = count("prompt_tokens", "Tokens of the prompts of ended requests")
        self.cached = count("cached_tokens", "Of these, spared by the prefix cache")
        self.generated = count("generated_tokens", "Tokens generated")
        self.ended = count("requests", "Requests that have ended", ["finish_reason"])
        self.first = measure("time_to_first_token_seconds", "From arrival", buckets=FIRST)
        self.each = measure("time_per_output_token_seconds", "A request's mean", buckets=EACH)
        self.registry.register(self)
        client.on_news = self.note

    def note(self, known: list[tuple[Answer, News]]) -> None:
        """Something has come of some requests."""
        self.generated.inc(sum(len(news.token_ids) for _, news in known))
        for answer, news in known:
            if news.finish_reason is not None:
                self.note_end(answer, news)

    def note_end(self, answer: Answer, news: News) -> None:
        """A request has ended."""
        self.ended.labels(news.finish_reason).inc()
        if (end := news.metrics) is not None:
            self.prompt.inc(len(answer.prompt))
            self.cached.inc(end["num_cached_tokens"])
            for seen, value in (
                (self.first, end["time_to_first_token"]),
                (self.each, end["time_per_output_token"]),
            ):
                if value is not None:
                    seen.observe(value)

    def collect(self) -> Iterator[Metric]:
        """How much the engine has to do now; Prometheus's client asks."""
        load = self.client.load
        for name, text, value in (
            ("requests_running", "Requests that have a part in each step", load.num_running),
            ("requests_waiting", "Requests that wait for their first step", load.num_waiting),
            ("requests_open", "Requests whose caller waits", len(self.client.answers)),
            ("cache_usage_ratio", "Share of the cache's blocks in use", load.used_blocks),
        ):
            yield GaugeMetricFamily(f"nanovllm_{name}", text, value=value)
        text = "Times that a request gave its blocks back"
        yield CounterMetricFamily("nanovllm_preemptions", text, value=load.num_preemptions)

    async def page(self) -> Response:
        """All of it, in Prometheus's text format."""
        text = generate_latest(self.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
