"""Numbers for Prometheus, under vLLM's names. Observed on the event loop; rendered in a thread."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from windlass.engine.engine_stats import EngineStats
from windlass.engine.outputs import RequestOutput
from windlass.protocol.openai import ApiRequest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "windlass:"
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_COUNTS = (1, 2, 5, 10, 20)


class Metrics:
    """Of one server. `stats`: the engine's counters, None while there is no engine. `batches`:
    counts of batches, None where there are none."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats | None],
        batches: Callable[[], Mapping[str, Any] | None],
    ) -> None:
        self._registry = CollectorRegistry()
        self._label = model_name
        self._stats = stats
        self._batches = batches

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(
                _PREFIX + name, what, ["model_name"], buckets=buckets, registry=self._registry
            )
            return found.labels(model_name)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Seconds until the first token.", _FIRST_TOKEN_S
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean seconds per token after it.", _TOKEN_S
        )
        self.whole = histogram("e2e_request_latency_seconds", "Seconds of a request.", _REQUEST_S)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.n = histogram("request_params_n", "Answers that a request wants.", _COUNTS)
        self.max_tokens = histogram(
            "request_params_max_tokens", "Longest answer that a request allows.", _TOKENS
        )
        self.ended = Counter(
            _PREFIX + "request_success", "Requests that have ended.",
            ["model_name", "finished_reason"], registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Engine(self))

    def begin(self, api: ApiRequest) -> "Observed":
        """A request is under way."""
        return Observed(self, api)

    def render(self) -> bytes:
        """All numbers as text; some milliseconds."""
        return generate_latest(self._registry)

    def count_end(self, reason: str) -> None:
        self.ended.labels(self._label, reason).inc()

    def engine(self) -> Iterator[Metric]:
        """What the engine and the batches count."""
        yield from self._of_batches()
        stats = self._stats()
        if stats is None:
            return
        for name, what, value in _gauges(stats):
            gauge = GaugeMetricFamily(_PREFIX + name, what, labels=["model_name"])
            gauge.add_metric([self._label], value)
            yield gauge
        for name, what, label, values in _counters(stats):
            names = ["model_name"] if label is None else ["model_name", label]
            counter = CounterMetricFamily(_PREFIX + name, what, labels=names)
            for key, value in values.items():
                counter.add_metric([self._label] if label is None else [self._label, key], value)
            yield counter

    def _of_batches(self) -> Iterator[Metric]:
        found = self._batches() or {}
        for name, what, label, values in (
            ("batches", "Batches.", "status", found.get("by_status", {})),
            ("batch_rows", "Rows of batches that have not ended.", "state", found.get("rows", {})),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, what, labels=["model_name", label])
            for key, value in values.items():
                gauge.add_metric([self._label, key], value)
            yield gauge


class _Engine:
    """What is asked for when somebody looks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.engine()


def _gauges(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("num_requests_running", "Sequences under way.", stats.running),
        ("num_requests_waiting", "Sequences that wait.", stats.waiting),
        ("num_batch_requests_running", "Of those under way, batches'.", stats.running_batch),
        ("num_batch_requests_waiting", "Of those that wait, batches'.", stats.waiting_batch),
        ("kv_cache_usage_perc", "Share of the KV cache that sequences hold.", stats.kv_cache_usage),
        ("peak_memory_bytes", "Most memory that the process had.", stats.peak_rss_bytes),
    ]


def _counters(
    stats: EngineStats,
) -> list[tuple[str, str, str | None, Mapping[str, float]]]:
    store = stats.weights
    return [
        ("prompt_tokens", "Prompt tokens computed.", None, {"": stats.prompt_tokens}),
        ("generation_tokens", "Tokens generated.", None, {"": stats.generated_tokens}),
        ("num_preemptions", "Sequences computed again.", None, {"": stats.num_preemptions}),
        ("prefix_cache_queries", "Prompt tokens looked for.", None,
         {"": stats.prefix_cache_queries}),
        ("prefix_cache_hits", "Of these, found.", None, {"": stats.prefix_cache_hits}),
        ("passes", "Passes.", None, {"": stats.passes}),
        ("pass_seconds", "Seconds in passes.", None, {"": stats.pass_s}),
        ("weights_wait_seconds", "Seconds that passes waited for weights.", None,
         {"": stats.wait_s}),
        ("expert_requests", "Experts that passes needed.", None, {"": stats.expert_requests}),
        ("expert_evictions", "Parts that gave way to others.", None, {"": store.evictions}),
        ("expert_hits", "Where they were.", "tier", stats.expert_places),
        ("link_bytes", "Bytes moved, by the tier that they come from.", "link",
         {route.source: moved for route, moved in store.link_bytes.items()}),
        ("expert_prefetch_issued", "Parts read ahead.", None, {"": store.prefetch_issued}),
        ("expert_prefetch_used", "Of these, used.", None, {"": store.prefetch_used}),
        ("expert_prefetch_wasted", "Of these, given up.", None, {"": store.prefetch_cancelled}),
    ]  # fmt: skip


def named_values(stats: EngineStats) -> dict[str, float]:
    """The engine's numbers by the names that `/metrics` has for them, labels in brackets."""
    found = {name: value for name, _, value in _gauges(stats)}
    for name, _, label, values in _counters(stats):
        for key, value in values.items():
            found[name if label is None else f"{name}[{key}]"] = value
    return found


class Observed:
    """One request, from the moment it was read."""

    def __init__(self, metrics: Metrics, api: ApiRequest) -> None:
        self._metrics = metrics
        self._api = api
        self._begin = time.monotonic()

    def end(self, outputs: Mapping[int, RequestOutput]) -> None:
        """It has ended, with these; fewer than prompts where the client left."""
        own, now = self._metrics, time.monotonic()
        for number, prompt in enumerate(self._api.prompts):
            output = outputs.get(number)
            if output is None:
                own.count_end("abort")
                continue
            own.prompt_tokens.observe(len(prompt.token_ids))
            own.n.observe(prompt.params.n)
            own.max_tokens.observe(prompt.params.max_tokens or 0)
            for choice in output.outputs:
                own.count_end(choice.finish_reason or "abort")
                own.output_tokens.observe(len(choice.token_ids))
            self._times(output, now)

    def _times(self, output: RequestOutput, now: float) -> None:
        own, times = self._metrics, output.metrics
        if times is None or times.first_token_time is None or times.finished_time is None:
            return
        own.first_token.observe(times.first_token_time - self._begin)
        own.whole.observe(now - self._begin)
        longest = max(len(choice.token_ids) for choice in output.outputs)
        if longest > 1:
            rest = times.finished_time - times.first_token_time
            own.per_token.observe(rest / (longest - 1))
