"""The Python API: `LLM` in vLLM's shape, over one engine that this object owns."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from windlass.build.open import open_engine
from windlass.doctor.kept import kept_profile, with_kept_usage
from windlass.engine.engine import Engine
from windlass.engine.engine_stats import EngineStats
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Request
from windlass.engine.request_feed import FeedEntry, RequestFeed
from windlass.engine.service import Service
from windlass.engine.tokenizer import Tokenizer
from windlass.errors import RequestError, UsageError
from windlass.hub.locate import locate
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.phases import since
from windlass.plan import Plan
from windlass.protocol.prompts import ChatEncoder, Encoder, PromptEncoder
from windlass.speculative import SpeculativeConfig
from windlass.units import counted, parse_bytes
from windlass.workload import Workload, expected_output

Prompt = str | Mapping[str, Any]  # text, {"prompt": text} or {"prompt_token_ids": ids}
Conversation = Sequence[Mapping[str, Any]]
ParamsOf = SamplingParams | Sequence[SamplingParams] | None
OnError = Literal["raise", "return"]


# vLLM's keywords for what Windlass does not do, with the only value that is no request for it.
_REFUSED = {
    "gpu_memory_utilization": 0.9,
    "cpu_offload_gb": 0,
    "tensor_parallel_size": 1,
}


_CHAT_OPTIONS = (
    "use_tqdm", "on_error", "on_result", "chat_template_kwargs", "continue_final_message",
)  # fmt: skip


class LLM:
    """A model ready to answer, of a folder or of a name on the hub. Use as a context manager, or
    call `close`. Several threads may call it; prompts of all are computed together.

    Keywords are `windlass.options.EngineOptions`' fields, such as `host_memory="4GiB"`. Raises
    UsageError for unknown ones and for values that Windlass does not apply.

    What an engine needs, this sets for the whole process, and logs it as "windlass" (level INFO):
    with the native kernels torch computes with one thread, with torch's own with as many as
    `threads` says; malloc gives large blocks that are freed back to the system at once.
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
            model=model, tokenizer=tokenizer, dtype=dtype, seed=seed,
            **{"expert_usage": "auto", **checked_args(engine_args)},
        )  # fmt: skip
        self._engine = _open(options)
        self._service = Service(self._engine)
        self._closed = False
        self._ids = itertools.count()
        self._feed = RequestFeed(self._service, self._engine.capacity)
        self._last_run: _LastRun | None = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine's memory. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._service.close()

    @property
    def plan(self) -> Plan:
        """Where the memory goes."""
        return self._engine.plan

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means: the checkpoint's generation_config.json."""
        own = self._engine.default_params
        return replace(own, max_tokens=own.max_tokens or SamplingParams().max_tokens)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer that prompts go through."""
        return self._engine.tokenizer

    def get_metrics(self) -> EngineStats:
        """The engine's counters since it was opened: passes, tokens, what was read, found in memory
        and prefetched (`weights`)."""
        return self._service.stats()

    @property
    def prediction(self) -> dict[str, Any] | None:
        """What the last `generate` or `chat` took, phase by phase, beside what was to be expected
        of such prompts and limits, and how near it came to the bound: the `prediction` of
        `windlass run-batch --json`. By the rates that `windlass doctor` kept, else assumed ones,
        of which no accuracy is told.

        Estimated when it is first asked for. None before a run has ended, after one that raised,
        and where other prompts were under way when it began. `generate_iter` leaves it as it is.
        """
        return self._last_run.prediction if self._last_run else None

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
        pairs = _pairs(rows, sampling_params or self.get_default_sampling_params())
        return self._run(pairs, _prompt_encoder(self._engine), use_tqdm, on_error, on_result)

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
        `use_tqdm`, `on_error`, `on_result`, `continue_final_message` (answers go on with the last
        message); `chat_template_kwargs` are the template's variables."""
        _refuse_unknown(options, _CHAT_OPTIONS)
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        encoder = ChatEncoder(
            self._engine.tokenizer,
            self._engine.max_model_len - 1,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            goes_on=options.get("continue_final_message", False),
            chat_template=chat_template,
            variables=options.get("chat_template_kwargs"),
        )
        rows = [messages] if is_one else list(messages)
        pairs = _pairs(rows, sampling_params or self.get_default_sampling_params())
        return self._run(
            pairs, encoder, options.get("use_tqdm", True), options.get("on_error", "raise"),
            options.get("on_result"),
        )  # fmt: skip

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
        rows = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
        pairs = _pairs(rows, sampling_params or self.get_default_sampling_params())
        return self._feed.results(self._entries(pairs, _prompt_encoder(self._engine), "return"))

    def _run(
        self,
        pairs: Iterator[tuple[Any, SamplingParams]],
        encoder: Encoder,
        use_tqdm: bool,
        on_error: OnError,
        on_result: Callable[[RequestOutput], None] | None,
    ) -> list[RequestOutput]:
        self._check_open()
        if on_error not in ("raise", "return"):
            raise UsageError(f"on_error: got {on_error!r}, allowed raise, return")
        self._last_run = None
        entries = list(self._entries(pairs, encoder, on_error))  # all are checked here
        begin, is_alone = self._service.stats(), self._feed.is_idle
        places = {entry.request_id: place for place, entry in enumerate(entries)}
        results: dict[int, RequestOutput] = {}
        with (
            _progress(len(entries), enabled=use_tqdm) as bar,
            closing(self._feed.results(iter(entries))) as ended,
        ):
            for result in ended:
                place = places[result.request_id]
                if result.error is not None and on_error == "raise":
                    raise RequestError(f"prompts[{place}]: {result.error}")
                results[place] = result
                bar.advance(bar.task_ids[0])
                if on_result is not None:
                    on_result(result)
        work = _work(entries)
        if is_alone and work is not None:
            self._last_run = _LastRun(self._engine, work, begin, self._service.stats())
        return [results[place] for place in range(len(entries))]

    def _entries(
        self, rows: Iterable[tuple[Any, SamplingParams]], encoder: Encoder, on_error: OnError
    ) -> Iterator[FeedEntry]:
        """Rows as requests that the engine will take; bad ones raise or become failures."""
        for place, (row, params) in enumerate(rows):
            request_id = str(next(self._ids))
            try:
                text, ids = encoder.encode(row)
                # the place is the seed's name: the same call gives the same text again
                request = Request(request_id, tuple(ids), params, seed_key=str(place))
                self._service.validate(request)
                entry = FeedEntry(request_id, text, request)
            except RequestError as error:
                if on_error == "raise":
                    raise _of_prompt(place, error) from error
                entry = _failed(request_id, row, error)
            yield entry

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("LLM: got a call after close(), allowed before")


def _open(named: EngineOptions) -> Engine:
    options = locate(named).with_weights()
    return open_engine(with_kept_usage(options), profile=kept_profile(options))


def _prompt_encoder(engine: Engine) -> PromptEncoder:
    return PromptEncoder(engine.tokenizer, engine.max_model_len - 1)


def _failed(request_id: str, row: Any, error: RequestError) -> FeedEntry:
    text = row if isinstance(row, str) else None
    return FeedEntry(
        request_id, text, failure=RequestOutput.failed(request_id, str(error), prompt=text)
    )


def _of_prompt(place: int, error: RequestError) -> RequestError:
    return RequestError(f"prompts[{place}]: {error}", param=error.param, code=error.code)


class _LastRun:
    """A run that has ended, for whoever asks how it went."""

    def __init__(
        self, engine: Engine, work: Workload, begin: EngineStats, end: EngineStats
    ) -> None:
        self._engine = engine
        self._work = work
        self._phases = since(begin.phases, end.phases)
        self._is_warm = begin.passes > 0

    @cached_property
    def prediction(self) -> dict[str, Any] | None:
        check = self._engine.compare(self._phases, self._work, is_warm=self._is_warm)
        return None if check is None else check.to_json()


def _work(entries: Iterable[FeedEntry]) -> Workload | None:
    """All sequences of what was run; None where there was nothing to run."""
    lengths = [
        (len(entry.request.prompt_token_ids), expected_output(entry.request.params.max_tokens))
        for entry in entries
        if entry.request is not None
        for _ in range(entry.request.params.n)
    ]
    return Workload(*zip(*lengths, strict=True)) if lengths else None


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
        raise UsageError(
            f"sampling_params: got more than {counted(number, 'prompt')}, allowed one each"
        )


@contextmanager
def _progress(total: int, *, enabled: bool) -> Iterator[Progress]:
    """A bar with one task on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        bar.add_task("prompts", total=total)
        yield bar


def checked_args(engine_args: Mapping[str, Any]) -> dict[str, Any]:
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
    if name in ("host_memory", "device_memory") and isinstance(value, str):
        return parse_bytes(value, what=name)
    if name == "moe_expert_cache_size" and isinstance(value, int):
        return str(value)
    if name == "speculative_config" and isinstance(value, Mapping):
        return SpeculativeConfig.read(value)
    if name == "expert_usage" and value in ("auto", "off"):
        return value
    is_path = name in ("trace", "routing_trace", "plan", "expert_usage", "expert_map_store")
    return Path(value) if is_path and isinstance(value, str) else value


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = get_close_matches(name, [*known, *_REFUSED], n=1)
            hint = f" (did you mean {close[0]}?)" if close else f", allowed {', '.join(known)}"
            raise UsageError(f"unknown option: {name}{hint}")
