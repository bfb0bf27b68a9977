"""The comparison with too little memory: a job of many requests inside a memory cgroup of a third
of the checkpoint, Windlass against llama.cpp, each at its best number of sequences, and one
request alone. Weights are bf16; the page cache is empty when an engine starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peers import launch, sweep
from peers.document import Document
from peers.models import Model

_MIB = 1 << 20
_SHARE_FOR_KV = 0.6  # of the limit: beyond, llama.cpp has hardly a page left for weights
_LLAMA_SETTINGS = {
    "flash_attn": 1, "kv_unified": True, "warm_up": False, "load_mode": "mmap",
}  # fmt: skip
_START_UBATCH, _OTHER_UBATCHES = 2048, (512, 8192)  # rows of a trip through the weights
_SWEEP_LIMIT_S = 60.0  # of each phase of a wave
_LEAST_BYTES = 512 * _MIB  # a smaller limit holds no Python with torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedWish:
    """What the user asked for."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    llama_sequences: tuple[int, ...]
    windlass_sequences: tuple[int, ...]  # 0: as planned
    threads: int
    timeout_s: float
    phase_s: float  # of a wave of llama.cpp; the rest is scaled up


@dataclass(frozen=True, slots=True)
class _Way:
    """How a job is run. `at_once`: sequences, 0 where the engine plans them; `n_ubatch`: rows per
    trip of llama.cpp."""

    at_once: int
    n_ubatch: int

    def __str__(self) -> str:
        return f"{self.at_once or 'planned'} at once, {self.n_ubatch} rows"


class Limited:
    """The runs of one model; entries go to the document."""

    def __init__(self, document: Document, wish: LimitedWish) -> None:
        self._document = document
        self._wish = wish

    def run(self, model: Model, engines: Sequence[str]) -> None:
        """All requests at the best number of sequences of each engine, then one request."""
        for engine in engines:
            best = self._best(model, engine)
            if best is not None:
                self._run(model, engine, self._wish.requests, best)
            alone = replace(best, at_once=1) if best else _Way(1, _START_UBATCH)
            self._run(model, engine, 1, alone)

    def limit_bytes(self, model: Model) -> int:
        third = model.checkpoint_bytes // 3
        return max(_LEAST_BYTES, third // _MIB * _MIB)

    def _candidates(self, model: Model, engine: str) -> list[int]:
        wish = self._wish
        if engine == "windlass":
            return list(wish.windlass_sequences)
        tokens = wish.prompt_tokens + wish.output_tokens
        room = _SHARE_FOR_KV * self.limit_bytes(model) / (tokens * model.kv_bytes_per_token)
        most = min(room, wish.requests)
        return [count for count in wish.llama_sequences if count <= most]

    def _best(self, model: Model, engine: str) -> _Way | None:
        """By a share of the job: as many requests as run at once, or all where it is planned."""
        found = [_Way(count, _START_UBATCH) for count in self._candidates(model, engine)]
        if engine == "windlass" and len(found) < 2:
            return found[0] if found else None
        rates = {way: self._rate(model, engine, way) for way in found}
        best = max(rates, key=rates.__getitem__, default=None)
        if best is None or not rates[best]:
            return None
        if engine == "llama.cpp":
            more = [replace(best, n_ubatch=rows) for rows in _OTHER_UBATCHES]
            rates |= {way: self._rate(model, engine, way) for way in more}
        return max(rates, key=rates.__getitem__)

    def _rate(self, model: Model, engine: str, way: _Way) -> float:
        """Requests per second."""
        requests = way.at_once or self._wish.requests
        entry = self._document.record(
            "limited_sweeps", f"{model.name} {engine}, {requests} requests, {way}", engine,
            lambda: self._measure(model, engine, requests, way, phase_s=_SWEEP_LIMIT_S),
        )  # fmt: skip
        return requests / entry["total_s"] if entry["total_s"] else 0.0

    def _run(self, model: Model, engine: str, requests: int, way: _Way) -> None:
        key = f"{model.name} {engine}, {requests} requests, {way}"
        entry = self._document.record(
            "limited", key, engine,
            lambda: self._measure(model, engine, requests, way, phase_s=self._wish.phase_s),
        )  # fmt: skip
        print(f"  {entry['total_s'] or entry['message']}", flush=True)

    def _measure(
        self, model: Model, engine: str, requests: int, way: _Way, *, phase_s: float
    ) -> dict[str, Any]:
        wish, limit = self._wish, self.limit_bytes(model)
        settings: dict[str, Any] = _LLAMA_SETTINGS | {
            "n_batch": way.n_ubatch, "n_ubatch": way.n_ubatch,
        }  # fmt: skip
        if engine == "windlass":
            settings = {"host_memory": limit, "warm_up": False, "prefill": False}
        size = sweep.Size(sequences=requests, prompt_tokens=wish.prompt_tokens,
                          output_tokens=wish.output_tokens, threads=wish.threads)  # fmt: skip
        job = sweep.make_job(
            model, engine, "bf16", settings=settings, size=size, limits_s=(phase_s, phase_s),
            output_tokens=wish.output_tokens,
        )  # fmt: skip
        assert job is not None, "a third of a checkpoint that fits"
        job = replace(job, at_once=min(way.at_once, requests))
        outcome = launch.run_in_group(engine, job, wish.timeout_s, limit)
        result, total_s = outcome.result, None
        if result is not None:
            total_s = result["prefill_s"] + result["decode_s"]
        return {
            "model": model.name, "requests": requests, "at_once": way.at_once, "limit_bytes": limit,
            "is_third": limit < model.checkpoint_bytes // 3 + _MIB, "settings": settings,
            "prompt_tokens": wish.prompt_tokens, "output_tokens": wish.output_tokens,
            "total_s": total_s, **outcome.to_json(),
        }  # fmt: skip
