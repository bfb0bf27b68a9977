"""The engine: requests in, tokens out, one pass per step. One thread owns it.

Knows no files and no HTTP. Fronts add requests and call `step`; results come back as they end.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from windlass.engine.admission import Admission, ScheduledSequence
from windlass.engine.detokenizer import TextStream
from windlass.engine.engine_stats import EngineStats
from windlass.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from windlass.engine.phase_meter import PhaseMeter, Readings
from windlass.engine.request import Delta, Request, StepResult
from windlass.engine.sampling import Sampler, choice_seed
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.engine.steering import Check, Compare, Predicted
from windlass.engine.tokenizer import Tokenizer
from windlass.errors import RequestError
from windlass.ids import Part
from windlass.kvcache.pages import block_keys
from windlass.params import SamplingParams
from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.schedule.batch import CHUNK_TOKENS, Batch, make_batch, passes_of
from windlass.schedule.runtime import Outcome
from windlass.trace import Tracer
from windlass.weights.store import WeightStore
from windlass.workload import Workload

RunPass = Callable[[Batch], Outcome]


@dataclass(slots=True)
class _Open:
    """A request with choices still running."""

    request: Request
    left: int
    arrival: float
    choices: list[Sequence] = field(default_factory=list)  # that have begun, by their index
    first_token: float | None = None
    failure: RequestError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What `build` puts together for an engine."""

    plan: Plan
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()  # of the plan: what is expected of it
    default_params: SamplingParams
    vocab_size: int
    max_model_len: int
    longest: int  # the same where memory has no end: what the user or the model allows
    seed: int
    fingerprint: Mapping[str, object]  # what would change results
    peak_rss: Callable[[], int]
    prediction: Predicted | None = None  # of the job that the engine was opened for
    compare: Compare | None = None  # what can be predicted of any job, when it is asked for


class Engine:
    """Sequences, admission and sampling around one pass function."""

    def __init__(
        self,
        setup: EngineSetup,
        run_pass: RunPass,
        weights: WeightStore,
        admission: Admission,
        *,
        tracer: Tracer,
        disk_busy_s: Callable[[], float],
        on_close: Callable[[], None],
    ) -> None:
        """`on_close` must be idempotent and must not hold the engine: it also ends what an engine
        that was dropped without `close` has left."""
        self.plan = setup.plan
        self.notes = setup.notes
        self.tokenizer = setup.tokenizer
        self.max_model_len = setup.max_model_len
        self.default_params = setup.default_params
        self.fingerprint = setup.fingerprint
        self._setup = setup
        self._run_pass = run_pass
        self._weights = weights
        self._admission = admission
        self._tracer = tracer
        self._on_close = on_close
        self._dropped = weakref.finalize(self, _close_aside, on_close)
        self._dropped.atexit = False  # files and daemon threads end with the process
        self._open: dict[str, _Open] = {}
        self._passes = self._prompt_tokens = self._generated_tokens = 0
        self._pass_s = 0.0
        self._disk_busy_s = disk_busy_s
        self._meter = PhaseMeter()
        self._prediction = setup.prediction

    # --- requests ---------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Sequences that can run at once."""
        return self.plan.max_num_seqs

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def expected_output_tokens(self, max_tokens: int, quantile: float | None = None) -> float:
        """Tokens of an answer that may have `max_tokens`: the mean by what has ended so far (the
        short ones end first), or what the share `quantile` of answers does not exceed. `max_tokens`
        where none has ended."""
        lengths = self._admission.lengths
        if quantile is None:
            return lengths.mean(max_tokens)
        return lengths.quantile(quantile, max_tokens)

    def validate(self, request: Request) -> None:
        """Raises RequestError if the request cannot run here."""
        self._check(request)
        if request.request_id in self._open:
            raise RequestError(f"request id {request.request_id!r} is already running")

    def add(self, request: Request) -> None:
        """Queues a request; RequestError if it cannot run here."""
        self.validate(request)
        params, num_prompt = request.params, len(request.prompt_token_ids)
        max_output, longest = self.max_model_len - num_prompt, self._setup.longest
        if params.max_tokens is not None:
            max_output, longest = params.max_tokens, num_prompt + params.max_tokens
        self._open[request.request_id] = _Open(request, params.n, time.monotonic())
        keys: tuple[bytes, ...] = ()
        if self.plan.prefix_caching:
            keys = block_keys(request.prompt_token_ids, CHUNK_TOKENS)
        for index in range(params.n):
            self._admission.add(QueuedSequence(request, index, max_output, longest, keys))

    def abort(self, request_id: str) -> None:
        """Drops a request; unknown ids are ignored, it may just have ended."""
        entry = self._open.pop(request_id, None)
        if entry is not None:
            self._admission.drop(entry.request)

    def _check(self, request: Request) -> None:
        params, num_prompt = request.params, len(request.prompt_token_ids)
        if not num_prompt:
            raise RequestError("prompt has no tokens, allowed at least 1", param="prompt")
        room = self.max_model_len - num_prompt
        if room < 1 or (params.max_tokens is not None and params.max_tokens > room):
            wanted = "" if params.max_tokens is None else f" and max_tokens {params.max_tokens}"
            raise RequestError(
                f"prompt has {num_prompt} tokens{wanted}, limit {self.max_model_len} in all",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        vocab_size, ids = self._setup.vocab_size, request.prompt_token_ids
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(f"prompt token ids: allowed 0 to {vocab_size - 1}", param="prompt")
        self._sampler(request, 0)  # checks the ids that the parameters name

    def _start(self, queued: QueuedSequence) -> Sequence:
        """The choice that leaves the queue."""
        request = queued.request
        params = request.params
        choice = Sequence(
            queued,
            self._sampler(request, queued.index),
            TextStream(self.tokenizer, params) if params.detokenize else None,
            frozenset(self.tokenizer.eos_token_ids),
        )
        self._open[request.request_id].choices.append(choice)
        return choice

    def _sampler(self, request: Request, index: int) -> Sampler:
        seed = choice_seed(
            request.params, run_seed=self._setup.seed, seed_key=request.seed_key, choice=index
        )
        return Sampler(
            request.params,
            prompt_token_ids=request.prompt_token_ids,
            seed=seed,
            vocab_size=self._setup.vocab_size,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )

    # --- steps ------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One pass and the tokens it brings."""
        begin = time.perf_counter()
        rows = self._admission.compose(self._start)
        if not rows:
            assert not self._open, "requests wait, but nothing can run"
            return StepResult((), ())
        with self._tracer.span("pass", lane="engine", segments=len(rows)):
            batch = make_batch(
                [row.segment for row in rows], micro_batch_tokens=self.plan.micro_batch_tokens
            )
            passes = passes_of(batch, self.plan.schedule)
            try:
                with torch.inference_mode():
                    outcome = _join([self._run_pass(one) for one in passes])
            except BaseException:
                self._admission.restart()
                raise
            self._passes += len(passes)
            with self._tracer.span("sample", rows=len(outcome.logits)):
                result = self._take(rows, outcome)
        seconds = time.perf_counter() - begin
        self._pass_s += seconds
        self._meter.add(
            batch.segments,
            self._readings(),
            passes=len(passes),
            output_tokens=len(result.deltas),
            seconds=seconds,
        )
        stats = self._weights.stats()
        self._tracer.counter("rows", rows=batch.num_tokens)
        self._tracer.counter("disk", bytes=stats.bytes_read)
        return result

    def _take(self, rows: list[ScheduledSequence], outcome: Outcome) -> StepResult:
        finished: list[RequestOutput] = []
        deltas: list[Delta] = []
        taken = 0
        scores: Iterator[float] = iter(outcome.logprobs.tolist())
        for choice, segment in rows:
            choice.num_computed += segment.num_tokens
            for place, _ in enumerate(segment.targets, segment.first_position + 1):
                choice.prompt_logprobs[place] = next(scores)
            if segment.is_prompt:
                self._prompt_tokens += segment.num_tokens
            if not segment.wants_logits:
                continue
            entry = self._open[choice.request.request_id]
            try:
                deltas.append(choice.advance(outcome.logits[taken], self.tokenizer))
                self._generated_tokens += 1
            except RequestError as error:  # this request alone fails: constraints left no token
                choice.finish_reason, entry.failure = "error", error
            else:
                self._observe(choice)
            taken += 1
            entry.first_token = entry.first_token or time.monotonic()
            if choice.finish_reason is not None:
                self._admission.remove(choice)
                entry.left -= 1
                if not entry.left:
                    finished.append(self._finish(entry))
        return StepResult(tuple(finished), tuple(deltas))

    def _observe(self, choice: Sequence) -> None:
        if choice.finish_reason is not None:
            self._admission.lengths.observe(len(choice.output_ids), choice.queued.max_output)

    def _finish(self, entry: _Open) -> RequestOutput:
        request = entry.request
        del self._open[request.request_id]
        outputs: tuple[CompletionOutput, ...] = tuple(
            choice.output(self.tokenizer) for choice in entry.choices
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=entry.choices[0].prompt_output(self.tokenizer),
            num_cached_tokens=entry.choices[0].num_cached,
            metrics=RequestMetrics(
                arrival_time=entry.arrival,
                first_token_time=entry.first_token,
                finished_time=time.monotonic(),
            ),
            error=str(entry.failure) if entry.failure else None,
            error_code=entry.failure.code if entry.failure else None,
        )

    # --- state ------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Totals so far."""
        store, prompts = self._weights.stats(), self._admission.prompt_pages
        return EngineStats(
            passes=self._passes,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            bytes_read=store.bytes_read,
            expert_requests=store.requests.get(Part.EXPERT, 0),
            expert_hits=store.hits.get(Part.EXPERT, 0),
            wait_s=store.wait_s,
            pass_s=self._pass_s,
            peak_rss_bytes=self._setup.peak_rss(),
            running=len(self._admission.running),
            waiting=len(self._admission.waiting),
            num_preemptions=self._admission.num_preemptions,
            phases=dict(self._meter.phases),
            check=self._prediction.check(self._meter.phases) if self._prediction else None,
            prefix_cache_queries=prompts.num_asked if self.plan.prefix_caching else 0,
            prefix_cache_hits=prompts.num_found,
        )

    def compare(
        self, work: Workload, phases: Mapping[str, PhaseStats], *, is_warm: bool
    ) -> Check | None:
        """What `phases` took for the job `work`, which has ended, beside what is to be expected of
        it under the plan as it is. `is_warm`: passes had run before it."""
        found = self._setup.compare
        return found(self.plan, work, phases, is_warm=is_warm) if found else None

    def _readings(self) -> Readings:
        store = self._weights.stats()
        return Readings(store.bytes_read, self._disk_busy_s(), store.wait_s, self._tracer.seconds)

    def check(self) -> None:
        """Invariants of all stores; cheap enough for tests after every step."""
        self._admission.check()
        self._weights.check()

    def close(self) -> None:
        """Ends the reader threads, writes the trace. Idempotent."""
        self._dropped.detach()
        self._on_close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _join(outcomes: list[Outcome]) -> Outcome:
    """Of passes one after the other, as of one."""
    if len(outcomes) == 1:
        return outcomes[0]
    logits = torch.cat([outcome.logits for outcome in outcomes])
    return Outcome(logits, torch.cat([outcome.logprobs for outcome in outcomes]))


def _close_aside(close: Callable[[], None]) -> None:
    """Closes in a thread of its own: the collector may run in a reader thread, for which `close`
    waits."""
    threading.Thread(target=close, name="close", daemon=True).start()
