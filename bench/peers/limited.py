"""The comparison with too little memory: a job of many requests inside a memory cgroup, by default
of a third of the checkpoint, Windlass by each of its schedules against llama.cpp, each at its best
number of sequences, and one request alone. Weights are bf16; the page cache is empty when an engine
starts."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers import launch
from peers.document import Document
from peers.job import Job
from peers.models import Model
from windlass.plan import SCHEDULES, Schedule

_MIB = 1 << 20
_SHARE_FOR_KV = 0.6  # of the limit: beyond, llama.cpp has hardly a page left for weights
_LLAMA_SETTINGS = {
    "flash_attn": 1, "kv_unified": True, "warm_up": False, "load_mode": "mmap",
}  # fmt: skip
_START_UBATCH, _OTHER_UBATCHES = 2048, (512, 8192)  # rows of a trip through the weights
_SWEEP_LIMIT_S = 60.0  # of each phase of a wave
LEAST_BYTES = 512 * _MIB  # a smaller limit holds no Python with torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedWish:
    """What the user asked for."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    llama_sequences: tuple[int, ...]
    windlass_sequences: tuple[int, ...]  # 0: as planned
    schedules: tuple[Schedule, ...]  # of Windlass
    limit_bytes: int | None  # None: a third of the checkpoint
    has_alone: bool  # whether one request runs alone too, by the first schedule
    is_quick: bool  # rates for the planner are assumed instead of measured
    threads: int
    timeout_s: float
    phase_s: float  # of a wave of llama.cpp; the rest is scaled up


@dataclass(frozen=True, slots=True)
class _Way:
    """How a job is run. `at_once`: sequences, 0 where the engine plans them; `n_ubatch`: rows per
    trip of llama.cpp; `schedule`: of Windlass."""

    at_once: int
    n_ubatch: int = _START_UBATCH
    schedule: Schedule = SCHEDULES[0]

    def __str__(self) -> str:
        schedule = "" if self.schedule == SCHEDULES[0] else f", {self.schedule}"
        return f"{self.at_once or 'planned'} at once, {self.n_ubatch} rows{schedule}"


class Limited:
    """The runs of one model; entries go to the document."""

    def __init__(self, document: Document, hint: LimitedWish) -> None:
        self._document = document
        self._wish = hint

    def run(self, model: Model, engines: Sequence[str]) -> None:
        """All requests at the best number of sequences of each engine, then one request."""
        for engine in engines:
            schedules = self._wish.schedules if engine == "windlass" else SCHEDULES[:1]
            for schedule in schedules:
                best = self._best(model, engine, schedule)
                if best is not None:
                    self._run(model, engine, self._wish.requests, best)
                if self._wish.has_alone and schedule == schedules[0]:
                    alone = replace(best, at_once=1) if best else _Way(1, schedule=schedule)
                    self._run(model, engine, 1, alone)

    def limit_bytes(self, model: Model) -> int:
        """In whole MiB."""
        return max(LEAST_BYTES, (self._wish.limit_bytes or _third(model)) // _MIB * _MIB)

    def _candidates(self, model: Model, engine: str) -> list[int]:
        hint = self._wish
        if engine == "windlass":
            return list(hint.windlass_sequences)
        tokens = hint.prompt_tokens + hint.output_tokens
        room = _SHARE_FOR_KV * self.limit_bytes(model) / (tokens * model.kv_bytes_per_token)
        most = min(room, hint.requests)
        return [count for count in hint.llama_sequences if count <= most]

    def _best(self, model: Model, engine: str, schedule: Schedule) -> _Way | None:
        """By a share of the job: as many requests as run at once, or all where it is planned."""
        found = [_Way(count, schedule=schedule) for count in self._candidates(model, engine)]
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
            "limited_sweeps", self._key(model, engine, requests, way), engine,
            lambda: self._measure(model, engine, requests, way, phase_s=_SWEEP_LIMIT_S),
        )  # fmt: skip
        return requests / entry["total_s"] if entry["total_s"] else 0.0

    def _run(self, model: Model, engine: str, requests: int, way: _Way) -> None:
        entry = self._document.record(
            "limited", self._key(model, engine, requests, way), engine,
            lambda: self._measure(model, engine, requests, way, phase_s=self._wish.phase_s),
        )  # fmt: skip
        print(f"  {entry['total_s'] or entry['message']}", flush=True)
        self._compare(entry)

    def _compare(self, entry: dict[str, Any]) -> None:
        """Stops where Windlass answers a job otherwise than in an earlier run."""
        names = ("model", "requests", "prompt_tokens", "output_tokens")
        ours = _answers(entry)
        for other in self._document.data["limited"]:
            is_same_job = all(other[name] == entry[name] for name in names)
            theirs = _answers(other) if is_same_job else None
            if ours and theirs and ours != theirs:
                raise SystemExit(f"{entry['key']}: other answers than {other['key']}: a bug")

    def _key(self, model: Model, engine: str, requests: int, way: _Way) -> str:
        limit = self._wish.limit_bytes
        where = "" if limit is None else f", in {self.limit_bytes(model) // _MIB} MiB"
        return f"{model.name} {engine}, {requests} requests, {way}{where}"

    def _measure(
        self, model: Model, engine: str, requests: int, way: _Way, *, phase_s: float
    ) -> dict[str, Any]:
        hint, limit = self._wish, self.limit_bytes(model)
        settings: dict[str, Any] = _LLAMA_SETTINGS | {
            "n_batch": way.n_ubatch, "n_ubatch": way.n_ubatch,
        }  # fmt: skip
        if engine == "windlass":
            settings = {"host_memory": limit, "planned": True}
            if way.schedule != SCHEDULES[0]:
                settings["schedule"] = way.schedule
        own = {}
        if engine == "windlass" and not hint.is_quick:
            own["profile"] = str(_measure_rates(model, hint.threads))
        job = Job(
            model=str(model.file(engine, "bf16")), vocab_size=model.config["vocab_size"],
            threads=hint.threads, sequences=requests, at_once=min(way.at_once, requests),
            prompt_tokens=hint.prompt_tokens, output_tokens=hint.output_tokens,
            prefill_limit_s=phase_s, decode_limit_s=phase_s, settings=settings | own,
        )  # fmt: skip
        outcome = launch.run_in_group(engine, job, hint.timeout_s, limit)
        result, total_s = outcome.result, None
        if result is not None:
            total_s = result["prefill_s"] + result["decode_s"]
        return {
            "model": model.name, "requests": requests, "at_once": way.at_once, "limit_bytes": limit,
            "is_third": limit == _third(model), "settings": settings,
            "prompt_tokens": hint.prompt_tokens, "output_tokens": hint.output_tokens,
            "total_s": total_s, **outcome.to_json(),
        }  # fmt: skip


def _answers(entry: dict[str, Any]) -> str | None:
    """A digest; None of other engines, and where nothing ran."""
    return entry["result"] and entry["result"]["more"].get("answers")


def _third(model: Model) -> int:
    return model.checkpoint_bytes // 3 // _MIB * _MIB


def _measure_rates(model: Model, threads: int) -> Path:
    """The file of what `windlass doctor` measures, or has kept, of this machine with this model.
    Outside of the group: what is measured needs more memory than a run."""
    done = subprocess.run(
        [*(sys.executable, "-m", "windlass.cli", "doctor", "--json"),
         *("--model", str(model.checkpoint), "--threads", str(threads))],
        env=launch.environ(threads), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    path = model.folder / "profile.json"
    path.write_text(json.dumps(json.loads(done.stdout)["profile"]), encoding="utf-8")
    return path
