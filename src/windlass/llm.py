"""The Python API: `LLM` in vLLM's shape, over one engine that this object owns."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from windlass.build.open import open_engine
from windlass.doctor.kept import kept_profile
from windlass.engine.engine import Engine
from windlass.engine.engine_stats import EngineStats
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import WINDOW, Request
from windlass.errors import RequestError, UsageError
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.phases import since
from windlass.plan import Plan
from windlass.units import parse_bytes
from windlass.workload import Workload, expected_output

Prompt = str | Mapping[str, Any]  # text, {"prompt": text} or {"prompt_token_ids": ids}
Conversation = Sequence[Mapping[str, Any]]
ParamsOf = SamplingParams | Sequence[SamplingParams] | None
OnError = Literal["raise", "return"]
Encode = Callable[[Any], tuple[str | None, list[int]]]  # a row -> its text, if any, and its ids


# vLLM's keywords for what Windlass does not do, with the only value that is no request for it.
_REFUSED = {
    "gpu_memory_utilization": 0.9,
    "cpu_offload_gb": 0,
    "tensor_parallel_size": 1,
}


class _Entry(NamedTuple):
    """One prompt, checked: a request, or why there is none."""

    request_id: str
    text: str | None
    request: Request | None = None
    failure: RequestOutput | None = None


class LLM:
    """A model ready to answer. Use as a context manager, or call `close`; not for several threads.

    Keywords are `windlass.options.EngineOptions`' fields, such as `host_memory="4GiB"`. Raises
    UsageError for unknown ones and for values that Windlass does not apply.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        **engine_args: Any,
    ) -> None:
        options = EngineOptions(
            model=model, tokenizer=tokenizer, dtype=dtype, seed=seed, **_checked(engine_args)
        )
        self._engine = open_engine(options, profile=partial(kept_profile, options))
        self._closed = False
        self._ids = itertools.count()
        self._texts: dict[str, str | None] = {}  # prompts in the engine
        self._results: dict[str, RequestOutput] = {}  # finished, not yet asked for
        self._comparison: Callable[[], dict[str, Any] | None] | None = None  # of the last run

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine's memory. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    @property
    def plan(self) -> Plan:
        """Where the memory goes."""
        return self._engine.plan

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means: the checkpoint's generation_config.json."""
        return self._engine.default_params

    def get_metrics(self) -> EngineStats:
        """The engine's counters since it was opened."""
        return self._engine.stats()

    @property
    def prediction(self) -> dict[str, Any] | None:
        """What the last `generate` or `chat` took, phase by phase, beside what was to be expected
        of such prompts and limits, and how near it came to the bound: the `prediction` of
        `windlass run-batch --json`. By the rates that `windlass doctor` kept, else assumed ones.

        Estimated when it is first asked for. None before a run has ended, after one that raised,
        and where other prompts were under way when it began. `generate_iter` leaves it as it is.
        """
        return self._comparison() if self._comparison else None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsOf = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        *,
        on_error: OnError = "raise",
        on_result: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Results in the order of the prompts; `on_result` gets each as it ends.

        All prompts are checked before any is computed: with `on_error="raise"` the first bad one
        raises RequestError, with "return" its row has `finish_reason` error and `.error`.

        Prompts without a `seed` draw by the engine's seed and their place in `prompts`: the same
        call gives the same text, whatever was called before; equal prompts in one call differ.
        """
        if lora_request is not None:
            raise UsageError(f"lora_request: got {lora_request!r}, allowed None: not supported yet")
        rows = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._run(rows, self._encode, sampling_params, use_tqdm, on_error, on_result)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsOf = None,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them, through the chat template. `options`:
        `use_tqdm`, `on_error`, `on_result`, and `chat_template_kwargs`, the template's variables.
        """
        _refuse_unknown(options, ("use_tqdm", "on_error", "on_result", "chat_template_kwargs"))
        tokenizer = self._engine.tokenizer

        def encode(conversation: Any) -> tuple[str | None, list[int]]:
            text = tokenizer.render_chat(
                conversation,
                tools,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                variables=options.get("chat_template_kwargs"),
            )
            return text, tokenizer.encode(text, add_special_tokens=False)

        is_one = bool(messages) and isinstance(messages[0], Mapping)
        return self._run(
            [messages] if is_one else list(messages),
            encode,
            sampling_params,
            options.get("use_tqdm", True),
            options.get("on_error", "raise"),
            options.get("on_result"),
        )

    def generate_iter(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Results as they end; `request_id` counts this object's prompts from 0. The prompts may be
        endless: only as many are taken as keep the engine busy. Bad ones become rows with
        `finish_reason` error. Leaving the loop early aborts what is under way. Draws as in
        `generate`: by a prompt's place in this call."""
        self._check_open()
        if isinstance(prompts, (str, Mapping)):
            prompts = [prompts]
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        pairs = _pairs(prompts, sampling_params)
        return self._iterate(self._prepare_all(pairs, self._encode, "return"))

    def _run(
        self,
        rows: Sequence[Any],
        encode: Encode,
        sampling_params: ParamsOf,
        use_tqdm: bool,
        on_error: OnError,
        on_result: Callable[[RequestOutput], None] | None,
    ) -> list[RequestOutput]:
        self._check_open()
        if on_error not in ("raise", "return"):
            raise UsageError(f"on_error: got {on_error!r}, allowed raise, return")
        pairs = _pairs(rows, sampling_params or self.get_default_sampling_params())
        self._comparison = None
        entries = list(self._prepare_all(pairs, encode, on_error))  # all are checked here
        begin, is_alone = self._engine.stats(), not self._engine.has_work
        places = {entry.request_id: place for place, entry in enumerate(entries)}
        results: dict[int, RequestOutput] = {}
        with (
            _progress(len(rows), enabled=use_tqdm) as advance,
            closing(self._iterate(iter(entries))) as ended,
        ):
            for result in ended:
                place = places[result.request_id]
                if result.error is not None and on_error == "raise":
                    raise RequestError(f"prompts[{place}]: {result.error}")
                results[place] = result
                advance()
                if on_result is not None:
                    on_result(result)
        if is_alone:
            self._comparison = _comparison(self._engine, entries, begin)
        return [results[place] for place in range(len(entries))]

    def _prepare_all(
        self, rows: Iterable[tuple[Any, SamplingParams]], encode: Encode, on_error: OnError
    ) -> Iterator[_Entry]:
        """Rows as requests that the engine will take; bad ones raise or become failures."""
        for place, (row, params) in enumerate(rows):
            request_id = str(next(self._ids))
            try:
                text, ids = encode(row)
                # the place is the seed's name: the same call gives the same text again
                request = Request(request_id, tuple(ids), params, seed_key=str(place))
                self._engine.validate(request)
                entry = _Entry(request_id, text, request)
            except RequestError as error:
                if on_error == "raise":
                    message = f"prompts[{place}]: {error}"
                    raise RequestError(message, param=error.param, code=error.code) from error
                text = row if isinstance(row, str) else None
                failure = RequestOutput.failed(request_id, str(error), prompt=text)
                entry = _Entry(request_id, text, failure=failure)
            yield entry

    def _iterate(self, entries: Iterator[_Entry]) -> Generator[RequestOutput, None, None]:
        """Results as they end. Takes no more entries than keep the engine busy; what has not ended
        when the caller stops is aborted."""
        waiting: set[str] = set()
        try:
            while True:
                self._check_open()
                room = max(1, WINDOW * self._engine.capacity) - len(waiting)
                for entry in itertools.islice(entries, max(0, room)):
                    self._start(entry)
                    waiting.add(entry.request_id)
                if not waiting:
                    return
                yield from self._collect(waiting)
        finally:
            self._abort(waiting)

    def _start(self, entry: _Entry) -> None:
        if entry.failure is not None:
            self._results[entry.request_id] = entry.failure
        if entry.request is not None:
            self._engine.add(entry.request)
            self._texts[entry.request_id] = entry.text

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("LLM: got a call after close(), allowed before")

    def _encode(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._engine.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping) and set(prompt) == {"prompt"}:
            return self._encode(prompt["prompt"])
        if isinstance(prompt, Mapping) and set(prompt) == {"prompt_token_ids"}:
            ids = prompt["prompt_token_ids"]
            if isinstance(ids, Sequence) and all(type(i) is int and i >= 0 for i in ids):
                return None, list(ids)
        raise RequestError(
            f"prompt: got {prompt!r:.80}, allowed a string, {{'prompt': string}} or "
            "{'prompt_token_ids': [ids]}",
            param="prompt",
        )

    def _collect(self, waiting: set[str]) -> Iterator[RequestOutput]:
        """The results that are there, of those `waiting`, which they leave; one step if none is."""
        if waiting.isdisjoint(self._results):
            assert self._engine.has_work, f"no work, yet {len(waiting)} requests wait"
            for output in self._engine.step().finished:
                if output.request_id in self._texts:  # else aborted in this very step
                    text = self._texts.pop(output.request_id)
                    self._results[output.request_id] = replace(output, prompt=text)
        for request_id in [key for key in self._results if key in waiting]:
            waiting.discard(request_id)
            yield self._results.pop(request_id)

    def _abort(self, waiting: set[str]) -> None:
        for request_id in waiting:
            self._results.pop(request_id, None)
            if self._texts.pop(request_id, _NOWHERE) is not _NOWHERE and not self._closed:
                self._engine.abort(request_id)


_NOWHERE = object()


def _comparison(
    engine: Engine, entries: Iterable[_Entry], begin: EngineStats
) -> Callable[[], dict[str, Any] | None] | None:
    """Of a run that ends now, estimated when it is called; None where there was nothing to run."""
    lengths = [
        (len(entry.request.prompt_token_ids), expected_output(entry.request.params.max_tokens))
        for entry in entries
        if entry.request is not None
        for _ in range(entry.request.params.n)
    ]
    if not lengths:
        return None
    work, phases = Workload(*zip(*lengths, strict=True)), since(begin.phases, engine.stats().phases)

    @cache
    def found() -> dict[str, Any] | None:
        check = engine.compare(work, phases, is_warm=begin.passes > 0)
        return None if check is None else check.to_json()

    return found


def _pairs(
    rows: Iterable[Any], sampling_params: SamplingParams | Iterable[SamplingParams]
) -> Iterator[tuple[Any, SamplingParams]]:
    """Each row with its parameters; UsageError where their numbers differ."""
    if isinstance(sampling_params, SamplingParams):
        yield from zip(rows, itertools.repeat(sampling_params), strict=False)
        return
    each = iter(sampling_params)
    number = 0
    for number, row in enumerate(rows, start=1):
        params = next(each, None)
        if not isinstance(params, SamplingParams):
            raise UsageError(f"sampling_params: got {params!r} for prompt {number - 1}, allowed "
                             "one SamplingParams, or one for each prompt")  # fmt: skip
        yield row, params
    if next(each, None) is not None:
        raise UsageError(f"sampling_params: got more than the {number} prompts, allowed one each")


@contextmanager
def _progress(total: int, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal; the body calls what it is given once per result."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, disable=not (enabled and console.is_terminal)
    ) as progress:
        task = progress.add_task("prompts", total=total)
        yield lambda: progress.advance(task)


def _checked(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords for EngineOptions. UsageError for unknown ones, and for what we do not do."""
    for name, harmless in _REFUSED.items():
        if engine_args.get(name, harmless) != harmless:
            raise UsageError(
                f"{name}: got {engine_args[name]!r}, allowed only {harmless!r}: not supported yet"
            )
    rest = {name: value for name, value in engine_args.items() if name not in _REFUSED}
    _refuse_unknown(rest, tuple(field.name for field in fields(EngineOptions)))
    return {name: _converted(name, value) for name, value in rest.items()}


def _converted(name: str, value: Any) -> Any:
    """What Python users write, as EngineOptions has it: sizes with a unit, paths as text."""
    if name == "host_memory" and isinstance(value, str):
        return parse_bytes(value, what=name)
    if name == "moe_expert_cache_size" and isinstance(value, int):
        return str(value)
    return Path(value) if name in ("trace", "plan") and isinstance(value, str) else value


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = get_close_matches(name, [*known, *_REFUSED], n=1)
            hint = f" (did you mean {close[0]}?)" if close else f", allowed {', '.join(known)}"
            raise UsageError(f"unknown option: {name}{hint}")
