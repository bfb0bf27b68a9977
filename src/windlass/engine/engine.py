"""The engine: requests in, tokens out, one pass per step. One thread owns it.

Knows no files and no HTTP. `engine/service.py` steps it on a thread of its own; what has one thread
anyway adds requests and calls `step`. Results come back as they end.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import torch

from windlass.device.base import Device, room_on_device
from windlass.device.process_memory import peak_resident_bytes
from windlass.device.streams import Streams
from windlass.engine.admission import Admission
from windlass.engine.drafting import Drafting
from windlass.engine.engine_stats import EngineStats
from windlass.engine.expectation import Check, Expectation, Rates
from windlass.engine.layer_drafts import LayerDrafts
from windlass.engine.live_view import LiveView
from windlass.engine.looking import look
from windlass.engine.open_requests import OpenRequests
from windlass.engine.outputs import RequestOutput
from windlass.engine.phase_meter import PhaseMeter, Readings
from windlass.engine.prompt_scores import ScoreRows
from windlass.engine.request import Delta, Request, StepResult, joined
from windlass.engine.request_rules import RequestRules
from windlass.engine.rows import ScheduledSequence
from windlass.engine.sampling import Likeliest
from windlass.engine.sequence import Sequence
from windlass.engine.tokenizer import Tokenizer
from windlass.errors import RequestError
from windlass.params import SamplingParams
from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.schedule.batch import Segment, make_batch, passes_of
from windlass.schedule.passes import PassShape, run_pass
from windlass.schedule.runtime import Outcome, Runtime
from windlass.speculative import SpeculativeConfig
from windlass.trace import Tracer
from windlass.weights.store import WeightStore
from windlass.workload import Workload

_RowOfLogits = torch.Tensor | Likeliest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What an engine knows from the beginning. `fingerprint`: what would change results."""

    plan: Plan
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()  # of the plan: what is expected of it
    default_params: SamplingParams
    rules: RequestRules
    fingerprint: Mapping[str, object]
    expectation: Expectation | None = None
    speculative: SpeculativeConfig | None = None
    keeps_bursts: bool = False  # whatever is measured
    is_paced: bool = False  # somebody waits for each answer
    has_job: bool = False  # what it will run is known


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine's passes run on. `resources` holds all of it and must not hold the engine:
    closing it also ends what an engine that was dropped without `close` has left."""

    runtime: Runtime
    shape: PassShape
    weights: WeightStore
    admission: Admission
    drafting: Drafting | None
    layer_drafts: LayerDrafts | None = None
    device: Device
    streams: Streams  # of the device that computes
    tracer: Tracer
    resources: ExitStack
    speculation: Callable[[], str] = str  # whether it pays, in words
    forecast_sources: Callable[[], str] = str  # which are on and off, in words
    device_peak: Callable[[], int] = int  # bytes of a device's memory that were taken at once
    abandon: Callable[[], object] = object  # returns when nothing of a failed pass is under way

    def computing(self) -> AbstractContextManager[None]:
        """What is asked of torch inside is work of the device's compute stream."""
        return self.streams.on(self.streams.compute)


class Engine:
    """Sequences, admission and sampling around one pass."""

    def __init__(self, setup: EngineSetup, parts: EngineParts) -> None:
        self.plan = setup.plan
        self.notes = setup.notes
        self.tokenizer = setup.tokenizer
        self.max_model_len = setup.rules.max_model_len
        self.limited_by = setup.rules.limited_by
        self.default_params = setup.default_params
        self.fingerprint = setup.fingerprint
        self._rules = setup.rules
        self._expectation = setup.expectation
        self._parts = parts
        self._weights = parts.weights
        self._admission = parts.admission
        self._tracer = parts.tracer
        self._dropped = weakref.finalize(self, _close_aside, parts.resources)
        self._dropped.atexit = False  # files and daemon threads end with the process
        self._open = OpenRequests(setup.rules, setup.tokenizer)
        self._passes = self._prompt_tokens = self._generated_tokens = 0
        self._pass_s = 0.0
        self._meter = PhaseMeter()

    # --- requests ---------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Sequences that can run at once."""
        return self.plan.max_num_seqs

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def validate(self, request: Request) -> None:
        """Raises RequestError if the request can never run here. Reads nothing that changes: any
        thread may ask at any time."""
        self._rules.check(request)

    def add(self, request: Request) -> None:
        """Queues a request; RequestError if it cannot run here or its id is in use."""
        self.validate(request)
        if request.request_id in self._open:
            raise RequestError(f"request id {request.request_id!r} is already running")
        self._open.add(request)
        for queued in self._rules.queued(request):
            self._admission.add(queued)

    def abort(self, request_id: str) -> None:
        """Drops a request; unknown ids are ignored, it may just have ended."""
        if (request := self._open.pop(request_id)) is not None:
            self._admission.drop(request)

    # --- steps ------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One pass and the tokens it brings."""
        begin = time.perf_counter()
        with self._parts.computing():  # pages are cleared
            has_filled = _draft(self._parts)
            rows = self._admission.compose(self._open)
        if self._parts.streams.runs_ahead:
            rows = [_of_likeliest(row) for row in rows]
        if not rows:
            assert not self._open, "requests wait, but nothing can run"
            return StepResult((), ())
        with self._tracer.span("pass", lane="engine", segments=len(rows)):
            micro, segments = self.plan.micro_batch_tokens, [row.segment for row in rows]
            batch = make_batch(segments, micro_batch_tokens=micro, groups=self.plan.groups)
            passes = passes_of(batch, self.plan.schedule)
            _prepare_masks(rows)
            parts = self._parts
            with _or_restart(parts), parts.computing():
                outcome = _join([run_pass(parts.runtime, parts.shape, one) for one in passes])
            self._passes += len(passes)
            num_rows = sum(segment.num_logits for segment in segments)
            with self._tracer.span("sample", rows=num_rows):
                result = self._take(rows, outcome)
            if self._parts.layer_drafts is not None:
                self._parts.layer_drafts.keep(rows, outcome.states)
        seconds = time.perf_counter() - begin
        self._pass_s += seconds
        took = self._meter.add(
            batch.segments,
            _readings(self._parts),
            passes=len(passes),
            output_tokens=sum(len(delta.token_ids) for delta in result.deltas),
            seconds=seconds,
        )
        if self._parts.drafting is not None and not has_filled:
            self._parts.drafting.passed(batch.segments, took)
        if self._admission.pace is not None:
            self._admission.pace.took(took.prompt_tokens, seconds)
        if not took.prompt_tokens:
            self._admission.turns.took(took.output_tokens, seconds)
        self._tracer.counter("rows", rows=batch.num_tokens)
        self._tracer.counter("disk", bytes=self._weights.stats().bytes_read)
        return result

    def _take(self, rows: list[ScheduledSequence], outcome: Outcome) -> StepResult:
        finished: list[RequestOutput] = []
        deltas: list[Delta] = []
        drawn_from, scores, scored = _RowsOfLogits(outcome), ScoreRows.of(outcome), 0
        for sequence, segment in rows:
            drafts = _drafts(segment)
            sequence.num_computed += segment.num_tokens - len(drafts)
            sequence.take_scores(segment, scores, scored)
            scored += len(segment.targets)
            self._prompt_tokens += segment.num_tokens * segment.is_prompt
            if not segment.wants_logits:
                continue
            deltas += self._advance(sequence, drawn_from.of(segment), drafts)
            if sequence.finish_reason is not None:
                self._admission.remove(sequence)
                output = self._open.end(sequence)
                if output is not None:
                    finished.append(output)
        return StepResult(tuple(finished), tuple(deltas))

    def _advance(
        self, sequence: Sequence, rows: Iterable[_RowOfLogits], drafts: tuple[int, ...]
    ) -> list[Delta]:
        """The sequence's next tokens as one delta: that after its last row, and for as long as the
        guess in the row behind is the token that was drawn, that after it. None where its request's
        constraints leave none: that request alone fails."""
        entry = self._open[sequence.request.request_id]
        deltas: list[Delta] = []
        before = sequence.num_computed
        try:
            for row, draft in zip(rows, (*drafts, None), strict=True):
                deltas.append(sequence.advance(row, self.tokenizer))
                self._generated_tokens += 1
                if sequence.finish_reason is not None or deltas[-1].token_ids != (draft,):
                    break
                sequence.num_computed += 1
        except RequestError as error:
            sequence.finish_reason, entry.failure = "error", error
        else:
            if sequence.finish_reason is not None:
                lengths = self._admission.lengths
                lengths.observe(len(sequence.output_ids), sequence.queued.max_output)
        entry.first_token = entry.first_token or time.monotonic()
        if self._parts.drafting is not None:
            self._parts.drafting.count(len(drafts), sequence.num_computed - before)
        return [joined(deltas)] if deltas else []

    # --- state ------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Totals so far; between two steps."""
        return EngineStats(
            passes=self._passes,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            pass_s=self._pass_s,
            phases=dict(self._meter.phases),
            **_stats_of(self._parts, self.plan),
        )

    def look(self) -> LiveView:
        """Who is under way and where weights are; on any thread, while a step runs too."""
        own = self._admission
        return look(list(own.running), own.num_held_pages, self.plan, self._weights)

    def rates(self, sequences: int) -> Rates | None:
        """What is to be expected while as many decode; on any thread. None where nothing is."""
        found = self._expectation
        return found.rates(self.plan, sequences) if found else None

    def compare(
        self,
        phases: Mapping[str, PhaseStats],
        work: Workload | None = None,
        *,
        is_warm: bool = False,
    ) -> Check | None:
        """What `phases` took for the job `work`, which has ended (None: the one that the engine was
        planned for, if any), beside what is to be expected of it. `is_warm`: passes had run before
        it. Reads nothing that steps change."""
        found = self._expectation
        return found.compare(self.plan, work, phases, is_warm=is_warm) if found else None

    def check(self) -> None:
        """Invariants of all stores; cheap enough for tests after every step."""
        self._admission.check()
        self._weights.check()

    def close(self) -> None:
        """Ends the reader threads, writes the trace. Idempotent."""
        self._dropped.detach()
        self._parts.resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _stats_of(parts: EngineParts, plan: Plan) -> dict[str, Any]:
    """The fields of `EngineStats` that the parts of an engine know."""
    own = parts.admission
    return {
        "weights": parts.weights.stats(),
        "peak_rss_bytes": peak_resident_bytes(),
        "peak_device_bytes": parts.device_peak(),
        "running": len(own.running),
        "waiting": len(own.waiting),
        "running_batch": sum(one.is_batch for one in own.running),
        "waiting_batch": own.waiting.num_batch,
        "kv_cache_usage": sum(own.num_held_pages.values())
        / max(1, sum(tier.kv_pages for tier in plan.tiers)),
        "num_preemptions": own.num_preemptions,
        "burst_passes": own.turns.num_passes,
        "bursts_have_lost": own.turns.have_lost,
        "prefix_cache_queries": own.prompt_pages.num_asked if plan.finds_prefixes else 0,
        "prefix_cache_hits": own.prompt_pages.num_found,
        "speculation": parts.speculation(),
        "forecast_sources": parts.forecast_sources(),
        "drafts": parts.drafting.stats() if parts.drafting else None,
    }


def _prepare_masks(rows: Iterable[ScheduledSequence]) -> None:
    """Has the masks of constrained rows made, while the pass runs."""
    for sequence, segment in rows:
        if sequence.constraint is not None and segment.wants_logits:
            sequence.constraint.prepare(_drafts(segment))


def _drafts(segment: Segment) -> tuple[int, ...]:
    """The guesses behind a sequence's last token."""
    return segment.token_ids[segment.num_tokens - segment.num_drafts :]


def _of_likeliest(row: ScheduledSequence) -> ScheduledSequence:
    """The row, without logits of which nothing is asked but the likeliest token."""
    sequence, segment = row
    if not (segment.wants_logits and sequence.takes_likeliest):
        return row
    return ScheduledSequence(sequence, replace(segment, takes_likeliest=True))


class _RowsOfLogits:
    """What a pass gives of each segment that wants logits, one after the other."""

    def __init__(self, outcome: Outcome) -> None:
        self._logits_RV = outcome.logits
        self._num_whole = 0  # rows that were given
        columns = outcome.likeliest, outcome.likeliest_logits
        self._likeliest = map(Likeliest, *(column.tolist() for column in columns))

    def of(self, segment: Segment) -> Iterable[_RowOfLogits]:
        """Its rows."""
        if segment.takes_likeliest:
            return list(islice(self._likeliest, segment.num_logits))
        first, self._num_whole = self._num_whole, self._num_whole + segment.num_logits
        rows: torch.Tensor = self._logits_RV[first : self._num_whole]
        return rows


@contextmanager
def _or_restart(parts: EngineParts) -> Iterator[None]:
    """Computes; after a failure all that run are computed again. BudgetError where a device has
    too little memory for it."""
    try:
        with torch.inference_mode(), room_on_device("a pass"):
            yield
    except BaseException:
        parts.abandon()
        parts.admission.restart()
        raise


def _draft(parts: EngineParts) -> bool:
    """The layer that drafts, over what the last pass computed. Whether prompts were among it."""
    if parts.layer_drafts is None:
        return False
    with parts.tracer.span("draft", lane="engine"), _or_restart(parts):
        return parts.layer_drafts.run()


def _readings(parts: EngineParts) -> Readings:
    store = parts.weights.stats()
    return Readings(store.bytes_read, parts.device.busy_s, store.wait_s, parts.tracer.seconds)


def _join(outcomes: list[Outcome]) -> Outcome:
    """Of passes one after the other, as of one."""
    if len(outcomes) == 1:
        return outcomes[0]
    columns = ([getattr(one, field.name) for one in outcomes] for field in fields(Outcome))
    return Outcome(*(None if own[0] is None else torch.cat(own) for own in columns))


def _close_aside(resources: ExitStack) -> None:
    """Closes in a thread of its own: the collector may run in a reader thread, for which `close`
    waits."""
    threading.Thread(target=resources.close, name="close", daemon=True).start()
