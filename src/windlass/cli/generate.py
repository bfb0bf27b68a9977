"""`windlass generate`: one prompt, its answer streamed to standard output."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from windlass import __version__
from windlass.cli.engine_flags import CONFIG_FLAG, ENGINE_FLAGS, engine_options, say_line
from windlass.cli.flags import Command, Flag, integer, number
from windlass.cli.signals import leave_at_once
from windlass.cli.summary import (
    draft_lines,
    memory_words,
    phase_json,
    phase_lines,
    plan_lines,
    prefetch_lines,
    weights_json,
    weights_words,
)
from windlass.doctor.kept import kept_profile, with_kept_usage
from windlass.errors import RequestError, UsageError
from windlass.hub.locate import locate
from windlass.units import counted, format_bytes

if TYPE_CHECKING:
    from windlass.engine.engine import Engine
    from windlass.engine.outputs import RequestOutput
    from windlass.engine.request import Request
    from windlass.engine.service import Service
    from windlass.engine.tokenizer import Tokenizer
    from windlass.workload import Job

_SAMPLING = "sampling"
_PARAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

FLAGS = (
    Flag(name="chat", read=None, default=False, group=_SAMPLING,
         help="send the prompt as a user's message through the chat template"),
    Flag(name="system", metavar="TEXT", group=_SAMPLING, help="a system message, with --chat"),
    Flag(name="max-tokens", aliases=("-n",), read=integer(1), metavar="N", group=_SAMPLING,
         help="longest answer (default: the rest of the context)"),
    Flag(name="temperature", aliases=("--temp",), read=number, metavar="T", group=_SAMPLING,
         help="0 is greedy (default: the checkpoint's)"),
    Flag(name="top-p", read=number, metavar="P", group=_SAMPLING,
         help="draw from the likeliest tokens of this total probability"),
    Flag(name="top-k", read=integer(-1), metavar="K", group=_SAMPLING,
         help="draw from this many tokens; 0: all"),
    Flag(name="min-p", read=number, metavar="P", group=_SAMPLING,
         help="draw from tokens at least this probable, relative to the likeliest"),
    Flag(name="repetition-penalty", read=number, metavar="X", group=_SAMPLING,
         help="above 1 discourages repeating"),
    Flag(name="stop", metavar="TEXT", group=_SAMPLING, help="end the answer before this text"),
    Flag(name="ignore-eos", read=None, default=False, group=_SAMPLING,
         help="go on after the end of the answer"),
    Flag(name="json", read=None, default=False, group="records",
         help="end standard output with one line of JSON"),
    *ENGINE_FLAGS,
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    from windlass.build.open import open_engine
    from windlass.engine.service import Service

    sys.stdout.write("")  # where nobody can read the answer, that is found before a model is loaded
    job = _OneJob(_prompt(values), values)
    options = with_kept_usage(locate(engine_options(values)).with_weights(say_line))
    engine = open_engine(options, source=job, profile=kept_profile(options))
    with Service(engine) as service:
        print(*plan_lines(engine), sep="\n", file=sys.stderr)
        request = _request(engine, job)
        begin = time.monotonic()
        try:
            output = _stream(service, request)
        except KeyboardInterrupt:
            leave_at_once()  # a pass under way may take minutes
        seconds = max(time.monotonic() - begin, 1e-9)
        stats = service.stats()
    check = engine.compare(stats.phases)
    if output.error is not None:
        raise RequestError(output.error)
    choice = output.outputs[0]
    print(
        f"{counted(len(output.prompt_token_ids), 'token')} in, {len(choice.token_ids)} out, "
        f"{len(choice.token_ids) / seconds:.2f} per s; {format_bytes(stats.bytes_read)} read, "
        f"{weights_words(stats)}, {memory_words(stats)}",
        *prefetch_lines(stats),
        *draft_lines(stats),
        *phase_lines(stats, check),
        sep="\n",
        file=sys.stderr,
    )
    if values["json"]:
        document = {
            "version": __version__,
            "text": choice.text,
            "token_ids": choice.token_ids,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(choice.token_ids),
            "elapsed_time": seconds,
            "output_throughput": len(choice.token_ids) / seconds,
            **weights_json(stats),
            "peak_rss_bytes": stats.peak_rss_bytes,
            "peak_device_bytes": stats.peak_device_bytes,
            **phase_json(stats, check),
            "plan": engine.plan.to_json(),
        }
        print(json.dumps(document))
    return 0


def _prompt(values: Mapping[str, Any]) -> str:
    if values["system"] is not None and not values["chat"]:
        raise UsageError("--system: allowed only with --chat")
    given: str | None = values["prompt"]
    if given not in (None, "-"):
        return given
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt: give one after the options, or on standard input")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input: not UTF-8: {error}") from error


class _OneJob:
    """The one prompt, for the planner and for the engine."""

    def __init__(self, prompt: str, values: Mapping[str, Any]) -> None:
        self.values = values
        self._prompt = prompt
        self._token_ids: list[int] = []

    def encode(self, tokenizer: "Tokenizer", longest: int) -> list[int]:
        """Once: later calls give the same."""
        text, is_chat = self._prompt, bool(self.values["chat"])
        if is_chat and not self._token_ids:
            messages = [{"role": "user", "content": text}]
            if self.values["system"] is not None:
                messages.insert(0, {"role": "system", "content": self.values["system"]})
            text = tokenizer.render_chat(messages)
        self._token_ids = self._token_ids or tokenizer.encode(
            text, add_special_tokens=not is_chat, at_most=longest - 1
        )
        return self._token_ids

    def job(self, tokenizer: "Tokenizer", params: object, longest: int) -> "Job":
        from windlass.planner.choose import single_request

        return single_request(len(self.encode(tokenizer, longest)), self.values["max_tokens"])

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        return 0  # the prompt is tokenised before memory is planned


def _request(engine: "Engine", job: _OneJob) -> "Request":
    from windlass.engine.request import Request

    values, ids = job.values, job.encode(engine.tokenizer, engine.max_model_len)
    given = {name: values[name] for name in _PARAMS if values[name] is not None}
    params = replace(
        engine.default_params,
        **given,
        max_tokens=values["max_tokens"],
        stop=values["stop"] or (),
        ignore_eos=values["ignore_eos"],
    )
    return Request("0", tuple(ids), params, seed_key="generate")


def _stream(service: "Service", request: "Request") -> "RequestOutput":
    """Writes text as it comes; the answer ends with a newline."""
    stream = service.submit(request)
    while True:
        came = stream.take()
        sys.stdout.write("".join(delta.text for delta in came.deltas))
        if came.finished:
            sys.stdout.write("\n")
        sys.stdout.flush()
        if came.finished:
            return came.finished[0]


COMMAND = Command(
    name="generate",
    help="Answer one prompt, from the command line or standard input.",
    flags=FLAGS,
    run=run,
    positional=Flag(name="prompt", metavar="PROMPT", help="the prompt; absent or -: read it from "
                    "standard input"),
)  # fmt: skip
