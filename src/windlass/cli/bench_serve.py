"""`windlass bench serve`: loads an OpenAI server and measures its answers, with the flags, labels
and JSON names of `vllm bench serve`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from windlass.cli.engine_flags import CONFIG_FLAG, say_line
from windlass.cli.flags import Command, Flag, choice, integer, number, several
from windlass.errors import UsageError
from windlass.load.names import ENDPOINTS, GOODPUT_METRICS, METRICS

EXIT_SOME_FAILED, EXIT_ALL_FAILED = 3, 1
_SERVER, _PROMPTS, _LOAD, _RESULTS = "server", "prompts", "load", "results"
_SHOWN_ERRORS = 10


def _above_0(text: str) -> float:
    value = number(text)
    if not value > 0:
        raise UsageError(f"value: got {text!r}, allowed a number above 0, or inf")
    return value


def _percentile(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 100:
        raise UsageError(f"value: got {text!r}, allowed 0 to 100")
    return value


def _ratio(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise UsageError(f"value: got {text!r}, allowed 0 up to 1")
    return value


def _goodput(text: str) -> dict[str, float]:
    """`ttft:300 tpot:50`, or with commas."""
    pairs = (pair.partition(":") for pair in text.replace(",", " ").split())
    return {choice(*GOODPUT_METRICS)(name): _above_0(value) for name, _, value in pairs}


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"value: got {text!r}, allowed a JSON object")
    return found


FLAGS = (
    Flag(name="backend", aliases=("--endpoint-type",), read=choice(*ENDPOINTS), default="openai",
         metavar="NAME", group=_SERVER,
         help="openai (/v1/completions, default) or openai-chat (/v1/chat/completions)"),
    Flag(name="base-url", metavar="URL", group=_SERVER,
         help="the server, in place of --host and --port"),
    Flag(name="host", metavar="ADDRESS", default="127.0.0.1", group=_SERVER,
         help="default 127.0.0.1"),
    Flag(name="port", read=integer(1, 65535), metavar="N", default=8000, group=_SERVER,
         help="default 8000"),
    Flag(name="endpoint", metavar="PATH", group=_SERVER, help="default: by --backend"),
    Flag(name="api-key", metavar="KEY", group=_SERVER,
         help="bearer token (default: OPENAI_API_KEY of the environment)"),
    Flag(name="model", aliases=("-m",), metavar="NAME", group=_SERVER,
         help="as requests name it (default: the server's first)"),
    Flag(name="dataset-name", read=choice("random", "custom"), default="random", metavar="NAME",
         group=_PROMPTS, help="random (words, about as many tokens as asked for, default) or custom"
         ' (--dataset-path: a line of {"prompt": "..."} each)'),
    Flag(name="dataset-path", read=Path, metavar="FILE", group=_PROMPTS, help="of custom prompts"),
    Flag(name="num-prompts", read=integer(1), default=1000, metavar="N", group=_PROMPTS,
         help="requests (default 1000)"),
    Flag(name="random-input-len", aliases=("--input-len",), read=integer(1), default=1024,
         metavar="N", group=_PROMPTS, help="tokens of a prompt (default 1024)"),
    Flag(name="random-output-len", aliases=("--output-len",), read=integer(1), default=128,
         metavar="N", group=_PROMPTS, help="tokens of an answer at most (default 128)"),
    Flag(name="random-prefix-len", read=integer(0), default=0, metavar="N", group=_PROMPTS,
         help="tokens before it that all prompts share (default 0)"),
    Flag(name="random-range-ratio", read=_ratio, default=0.0, metavar="R", group=_PROMPTS,
         help="lengths are drawn from (1 - R) to (1 + R) times those (default 0)"),
    Flag(name="custom-output-len", read=integer(1), default=256, metavar="N", group=_PROMPTS,
         help="tokens of an answer to a custom prompt without output_tokens (default 256)"),
    Flag(name="seed", read=integer(0), default=0, metavar="N", group=_PROMPTS,
         help="of prompts and arrivals (default 0)"),
    Flag(name="ignore-eos", read=None, default=False, group=_PROMPTS,
         help="answers go on to their full length"),
    Flag(name="temperature", read=number, metavar="T", group=_PROMPTS,
         help="(default: the server's)"),
    Flag(name="extra-body", read=_object, default={}, metavar="JSON", group=_PROMPTS,
         help='more fields of each request, such as {"top_p": 0.9}'),
    Flag(name="request-rate", read=_above_0, default=float("inf"), metavar="R", group=_LOAD,
         help="requests a second, whether or not answers come (default inf: all at once)"),
    Flag(name="burstiness", read=_above_0, default=1.0, metavar="B", group=_LOAD,
         help="1: a Poisson process (default); below: bursts, above: more even (gamma)"),
    Flag(name="max-concurrency", read=integer(1), metavar="N", group=_LOAD,
         help="requests under way at most; later ones wait, and their times begin when they are "
         "sent"),
    Flag(name="ready-check-timeout-sec", read=number, default=600.0, metavar="S", group=_LOAD,
         help="how long to wait until the server answers a first request (default 600; 0: not)"),
    Flag(name="num-warmups", read=integer(0), default=0, metavar="N", group=_LOAD,
         help="requests before those that are measured"),
    Flag(name="percentile-metrics", read=several(choice(*METRICS)), default=("ttft", "tpot", "itl"),
         metavar="NAMES", group=_RESULTS,
         help=f"what to tell of, with commas: {', '.join(METRICS)} (default: ttft,tpot,itl)"),
    Flag(name="metric-percentiles", read=several(_percentile), default=(99.0,), metavar="NUMBERS",
         group=_RESULTS, help="with commas, such as 50,99 (default 99)"),
    Flag(name="goodput", read=_goodput, default={}, metavar="NAME:MS", group=_RESULTS,
         help="count requests that stay below these, such as ttft:300,tpot:50"),
    Flag(name="save-result", read=None, default=False, group=_RESULTS, help="write a JSON file"),
    Flag(name="save-detailed", read=None, default=False, group=_RESULTS,
         help="with times and texts of each request"),
    Flag(name="result-dir", read=Path, metavar="DIR", group=_RESULTS, help="where (default: here)"),
    Flag(name="result-filename", metavar="NAME", group=_RESULTS,
         help="(default: {label}-{rate}qps-{model}-{time}.json)"),
    Flag(name="label", metavar="NAME", group=_RESULTS, help="(default: the backend)"),
    Flag(name="disable-tqdm", read=None, default=False, group=_RESULTS,
         help="no effect: there is no progress bar"),
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    from windlass.cli.bench_run import measured, save

    if (values["dataset_name"] == "custom") != (values["dataset_path"] is not None):
        raise UsageError("--dataset-path: allowed with --dataset-name custom, and needed there")
    api_key = values["api_key"] or os.environ.get("OPENAI_API_KEY")
    report, model = measured({**values, "api_key": api_key})
    for line in report.lines():
        print(line)
    for failed in report.failed[:_SHOWN_ERRORS]:
        say_line(f"failed: {failed.error}")
    if not all(one.has_usage for one in report.good):
        say_line("no usage in some streams: there, pieces of text were counted as tokens")
    if values["save_result"]:
        say_line(f"saved {save(values, model, report)}")
    if report.failed:
        return EXIT_SOME_FAILED if report.good else EXIT_ALL_FAILED
    return 0


COMMAND = Command(
    name="bench serve",
    help="Load an OpenAI server, and measure its answers.",
    flags=FLAGS,
    run=run,
)
