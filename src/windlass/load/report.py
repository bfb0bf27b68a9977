"""Numbers of a run, with the names and the table of `vllm bench serve`. Times in milliseconds."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from windlass.load.answers import Answer
from windlass.load.names import METRICS


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to tell. `goodput`: milliseconds that a good request stays below, by metric. The rate
    and the bound of requests at once are told where there are any."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float]
    rate: float = float("inf")
    most: int | None = None


class Report:
    """Of `answers` that took `seconds` together."""

    def __init__(self, answers: Sequence[Answer], seconds: float, wanted: Wanted) -> None:
        self._answers = answers
        self._seconds = seconds
        self._wanted = wanted
        self.good = [one for one in answers if not one.error]
        self.failed = [one for one in answers if one.error]
        self._peaks = _peaks(self.good)

    def values(self, metric: str) -> list[float]:
        """Of all requests that were answered."""
        found: Iterator[float | None]
        if metric == "itl":
            found = (each for one in self.good for each in one.itl_s)
        elif metric == "tpot":
            found = (one.tpot_s for one in self.good)
        else:
            found = (one.ttft_s if metric == "ttft" else one.latency_s for one in self.good)
        return [1000 * each for each in found if each is not None]

    def to_json(self, *, detailed: bool) -> dict[str, Any]:
        inputs = sum(one.input_tokens for one in self.good)
        outputs = sum(one.output_tokens for one in self.good)
        result: dict[str, Any] = {
            "duration": self._seconds,
            "completed": len(self.good),
            "failed": len(self.failed),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": len(self.good) / self._seconds,
            "request_goodput": self._goodput() if self._wanted.goodput else None,
            "output_throughput": outputs / self._seconds,
            "total_token_throughput": (inputs + outputs) / self._seconds,
            "max_output_tokens_per_s": self._peaks[0],
            "max_concurrent_requests": self._peaks[1],
        }
        for metric in self._wanted.metrics:
            values = self.values(metric) or [0.0]
            result[f"mean_{metric}_ms"] = float(np.mean(values))
            result[f"median_{metric}_ms"] = float(np.median(values))
            result[f"std_{metric}_ms"] = float(np.std(values))
            for percent in self._wanted.percentiles:
                result[f"p{percent:g}_{metric}_ms"] = float(np.percentile(values, percent))
        if detailed:
            every = self._answers
            result |= {
                "input_lens": [one.input_tokens for one in every],
                "output_lens": [one.output_tokens for one in every],
                "ttfts": [one.ttft_s for one in every],
                "itls": [one.itl_s for one in every],
                "latencies": [one.latency_s for one in every],
                "start_times": [one.start for one in every],
                "generated_texts": [one.text for one in every],
                "errors": [one.error for one in every],
            }
        return result

    def lines(self) -> Iterator[str]:
        """The table."""
        found, wanted = self.to_json(detailed=False), self._wanted
        yield f"{' Serving Benchmark Result ':=^50}"
        yield _line("Successful requests:", found["completed"])
        yield _line("Failed requests:", found["failed"])
        if wanted.most is not None:
            yield _line("Maximum request concurrency:", wanted.most)
        if wanted.rate != float("inf"):
            yield _line("Request rate configured (RPS):", wanted.rate)
        yield _line("Benchmark duration (s):", found["duration"])
        yield _line("Total input tokens:", found["total_input_tokens"])
        yield _line("Total generated tokens:", found["total_output_tokens"])
        yield _line("Request throughput (req/s):", found["request_throughput"])
        if wanted.goodput:
            yield _line("Request goodput (req/s):", found["request_goodput"])
        yield _line("Output token throughput (tok/s):", found["output_throughput"])
        yield _line("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"])
        yield _line("Peak concurrent requests:", float(found["max_concurrent_requests"]))
        yield _line("Total token throughput (tok/s):", found["total_token_throughput"])
        for metric in wanted.metrics:
            short, header = METRICS[metric]
            yield f"{header:-^50}"
            for label, key in (
                ("Mean", "mean"),
                ("Median", "median"),
                *((f"P{one:g}", f"p{one:g}") for one in wanted.percentiles),
            ):
                yield _line(f"{label} {short} (ms):", found[f"{key}_{metric}_ms"])
        yield "=" * 50

    def _goodput(self) -> float:
        def is_good(one: Answer) -> bool:
            took = {"ttft": one.ttft_s, "tpot": one.tpot_s or 0.0, "e2el": one.latency_s}
            return all(1000 * took[name] <= most for name, most in self._wanted.goodput.items())

        return sum(map(is_good, self.good)) / self._seconds


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def _peaks(answers: Sequence[Answer]) -> tuple[float, int]:
    """Pieces of text in the fullest second, and most requests under way at once."""
    pieces: Counter[int] = Counter()
    changes: list[tuple[float, int]] = []
    begin = min((one.start for one in answers), default=0.0)
    for one in answers:
        moment = one.start + one.ttft_s - begin
        pieces[int(moment)] += 1
        for distance in one.itl_s:
            moment += distance
            pieces[int(moment)] += 1
        changes += [(one.start, 1), (one.start + one.latency_s, -1)]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return float(max(pieces.values(), default=0)), most
