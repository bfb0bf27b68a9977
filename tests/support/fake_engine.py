"""An engine without a model: text is a function of the prompt, the parameters and the seed alone.

As a script it is `windlass` with this engine: `python tests/fake_engine.py run-batch -i ...`.
FAKE_OPEN_S: seconds that opening takes; FAKE_STEP_S: seconds per step; FAKE_LOG: a file that gets
one byte per generated token; FAKE_CAPACITY: sequences; FAKE_FINGERPRINT: what `fingerprint` says
of the checkpoint; FAKE_OPENING: a file that appears as opening begins.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from windlass.cli import generate, main, run_batch, serve
from windlass.engine.engine_stats import EngineStats
from windlass.engine.expectation import Rates
from windlass.engine.live_view import LiveView, RowNow
from windlass.engine.outputs import CompletionOutput, Logprob, RequestOutput
from windlass.engine.request import Delta, Request, StepResult
from windlass.errors import RequestError
from windlass.ids import Home, Part, WeightKey
from windlass.params import SamplingParams
from windlass.weights.stats import PartPlaces, Place, StoreStats

TOKENS_PER_STEP = 3
BOS = 256


class FakeTokenizer:
    """One token per byte."""

    takes_tools = False
    tells_time = False
    vocab_size = BOS + 1

    def encode(
        self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def facts(self) -> dict[str, Any]:
        return {"eos_token": None}

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now: int | None = None,
    ) -> str:
        if variables and variables.get("raise"):
            raise RequestError("chat template: asked to", param="messages")
        text = str(tools) if tools and self.takes_tools else ""
        text += "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        text += f"{variables}" if variables else ""
        text += f"<{now}>" if self.tells_time else ""
        return text + "<assistant>" * add_generation_prompt


@dataclass
class _Sequence:
    tokens: tuple[int, ...]
    reason: str
    done: int = 0


@dataclass
class _Running:
    request: Request
    sequences: list[_Sequence] = field(default_factory=list)


class FakePlan:
    """What `run-batch --json` repeats."""

    def to_json(self) -> dict[str, Any]:
        return {"host_memory": 1 << 20}

    max_num_seqs, max_model_len = 4, 4096
    tiers: tuple[object, ...] = ()
    above: object | None = None
    homes: ClassVar[dict[Home, object]] = {}

    def lines(self) -> list[str]:
        return ["plan: a fake one"]


class FakeEngine:
    """`fail_prompts`: prompts (text) whose results are errors, by how many times that happens;
    `error_code`: of these errors."""

    def __init__(
        self,
        *,
        capacity: int = 4,
        max_model_len: int = 256,
        step_s: float = 0.0,
        log: str | None = None,
        fail_prompts: dict[str, int] | None = None,
        error_code: str | None = None,
        fingerprint: str = "fake",
    ) -> None:
        self.tokenizer = FakeTokenizer()
        self.plan = FakePlan()
        self.notes: tuple[str, ...] = ()
        self.max_model_len = max_model_len
        self.limited_by = ""
        self.default_params = SamplingParams(temperature=0.5, max_tokens=None)
        self.fingerprint = {"checkpoint": fingerprint, "version": "0"}
        self.capacity = capacity
        self.peak_flying = 0
        self.is_closed = False
        self.added: list[Request] = []
        self.aborted: list[str] = []
        self.error_code = error_code
        self.fail_prompts = fail_prompts or {}
        self._step_s = step_s
        self._log = open(log, "ab", buffering=0) if log else None
        self._running: dict[str, _Running] = {}
        self._passes = self._prompt_tokens = self._generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def validate(self, request: Request) -> None:
        if any(not 0 <= i <= BOS for i in request.prompt_token_ids):
            raise RequestError("prompt: got an id outside the vocabulary", param="prompt")

    def add(self, request: Request) -> None:
        self.validate(request)
        assert request.request_id not in self._running, "request ids are unique"
        room = self.max_model_len - len(request.prompt_token_ids)
        if request.params.max_tokens is None:
            request = replace(request, params=replace(request.params, max_tokens=room))
        most = request.params.max_tokens
        assert most is not None and 0 < most <= room, "the protocol checks the length"
        self.added.append(request)
        running = _Running(request)
        for choice in range(request.params.n):
            running.sequences.append(_fake_tokens(request, choice))
        self._running[request.request_id] = running
        self._prompt_tokens += len(request.prompt_token_ids)
        self.peak_flying = max(
            self.peak_flying, sum(len(r.sequences) for r in self._running.values())
        )

    def look(self) -> LiveView:
        rows = tuple(
            RowNow(name, len(one.request.prompt_token_ids), len(one.request.prompt_token_ids), 0)
            for name, one in list(self._running.items())
        )
        key = WeightKey(Part.EXPERT, 1, 2)
        places = PartPlaces({key: Place.HELD}, {key: self._passes}, {})
        return LiveView(rows=rows, tiers=(), layers=(1, 3), num_experts=4, experts={"host": places})

    def rates(self, sequences: int) -> Rates | None:
        return Rates(10.0 * sequences, {"disk": 1e9}, False)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._running.pop(request_id, None)  # it may just have ended, as in the real one

    def step(self) -> StepResult:
        time.sleep(self._step_s)
        self._passes += 1
        places = self.capacity
        finished, deltas = [], []
        for request_id, running in sorted(self._running.items(), key=_is_batch):
            if places <= 0:
                break
            places -= len(running.sequences)
            for index, seq in enumerate(running.sequences):
                new = seq.tokens[seq.done : seq.done + TOKENS_PER_STEP]
                if not new:
                    continue
                seq.done += len(new)
                self._generated += len(new)
                if self._log:
                    self._log.write(b"." * len(new))
                top = running.request.params.logprobs if running.request.wants_deltas else None
                deltas.append(
                    Delta(
                        request_id, index, self.tokenizer.decode(new), new,
                        _fake_logprobs(new, top) or (),
                        seq.reason if seq.done == len(seq.tokens) else None,
                    )
                )  # fmt: skip
            if all(seq.done == len(seq.tokens) for seq in running.sequences):
                finished.append(self._finish(running))
                del self._running[request_id]
        return StepResult(tuple(finished), tuple(deltas))

    def _finish(self, running: _Running) -> RequestOutput:
        request = running.request
        prompt = self.tokenizer.decode(request.prompt_token_ids)
        if self.fail_prompts.get(prompt, 0) > 0:
            self.fail_prompts[prompt] -= 1
            failed = RequestOutput.failed(request.request_id, "a fault on purpose")
            return replace(failed, error_code=self.error_code)
        outputs = tuple(
            CompletionOutput(
                index=i,
                text=self.tokenizer.decode(seq.tokens),
                token_ids=seq.tokens,
                finish_reason=seq.reason,
                logprobs=_fake_logprobs(seq.tokens, request.params.logprobs),
            )
            for i, seq in enumerate(running.sequences)
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            passes=self._passes,
            prompt_tokens=self._prompt_tokens - self._prompt_tokens // 4,
            prefix_cache_queries=self._prompt_tokens,
            prefix_cache_hits=self._prompt_tokens // 4,  # as if a quarter had been found
            generated_tokens=self._generated,
            weights=fake_store_stats(self._passes),
            pass_s=self._passes * self._step_s,
            peak_rss_bytes=1 << 20,
            running=len(self._running),
            running_batch=sum(map(_is_batch, self._running.items())),
            waiting=0,
        )

    def compare(self, phases: object, work: object = None, *, is_warm: bool = False) -> None:
        return None

    def close(self) -> None:
        self.is_closed = True


def _is_batch(entry: tuple[str, _Running]) -> bool:
    return entry[1].request.is_batch


def fake_store_stats(passes: int) -> StoreStats:
    """Three of four experts are found; of what is prefetched half is used."""
    counts: dict[str, Any] = {
        field.name: 0
        for field in fields(StoreStats)
        if field.name not in ("requests", "hits", "hits_below")
    }
    return StoreStats(
        **{
            **counts,
            "bytes_read": 1000 * passes,
            "link_bytes": {},
            "requests": {Part.EXPERT: 8 * passes},
            "hits": {Part.EXPERT: 6 * passes},
            "prefetch_issued": 2 * passes,
            "prefetch_issued_bytes": 200 * passes,
            "prefetch_used": passes,
            "prefetch_used_bytes": 100 * passes,
        }
    )


def _fake_tokens(request: Request, choice: int) -> _Sequence:
    """Lower-case letters; an early end for some seeds."""
    params = request.params
    assert params.max_tokens is not None
    seed = params.seed if params.seed is not None else request.seed_key
    name = f"{request.prompt_token_ids} {params.temperature} {seed} {choice}"
    data = blake2b(name.encode()).digest() * (1 + params.max_tokens // 64)
    early = data[0] % 2 == 0
    length = max(1, params.max_tokens - (data[1] % 5 if early else 0))
    tokens = tuple(97 + byte % 26 for byte in data[:length])
    return _Sequence(tokens, "stop" if length < params.max_tokens else "length")


def _fake_logprobs(tokens: Sequence[int], top: int | None) -> tuple[dict[int, Logprob], ...] | None:
    if top is None:
        return None
    # the sampled token comes first and is the third best; the worst is impossible
    return tuple(
        {
            token: Logprob(-3.0, 3, chr(token)),
            **{
                i: Logprob(-float(rank) if rank < 5 else float("-inf"), rank, f"t{i}")
                for rank, i in enumerate(range(1, top + 2), start=1)
                if rank <= top and rank != 3
            },
        }
        for token in tokens
    )


def open_fake(options: object, **more: object) -> FakeEngine:
    """What `windlass.build.open.open_engine` is in the script."""
    if "FAKE_OPENING" in os.environ:
        Path(os.environ["FAKE_OPENING"]).touch()
    ready = time.monotonic() + float(os.environ.get("FAKE_OPEN_S", "0"))
    while time.monotonic() < ready:
        # a signal that comes just before one long sleep would not end it: loading has no such wait
        time.sleep(0.02)
    return FakeEngine(
        capacity=int(os.environ.get("FAKE_CAPACITY", "4")),
        step_s=float(os.environ.get("FAKE_STEP_S", "0")),
        log=os.environ.get("FAKE_LOG"),
        fingerprint=os.environ.get("FAKE_FINGERPRINT", "fake"),
    )


class FakeOptions:
    """Takes the fields that the real options have."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields


def install() -> None:
    """Puts the fake in place of `windlass.build.open`, and of what measures for it."""
    for command in (generate, run_batch, serve):
        command.kept_profile = lambda options: None  # type: ignore[attr-defined]
    build = ModuleType("windlass.build.open")
    build.open_engine = open_fake  # type: ignore[attr-defined]
    build.EngineOptions = FakeOptions  # type: ignore[attr-defined]
    sys.modules["windlass.build.open"] = build


if __name__ == "__main__":
    # a shell that starts tests in the background lets them ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install()
    sys.exit(main())
