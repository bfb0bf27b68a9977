"""`windlass quantize`: a checkpoint of 4- or 8-bit integers, which other programs read too."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass import __version__
from windlass.cli.engine_flags import CONFIG_FLAG, MODEL_NAMES, REVISION_FLAG, say_line
from windlass.cli.flags import Command, Flag, choice, integer, size
from windlass.cli.signals import EXIT_INTERRUPTED, StopSignals
from windlass.errors import UsageError
from windlass.hub.locate import locate
from windlass.options import EngineOptions
from windlass.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from windlass.quantize.convert import Quantized
    from windlass.quantize.perplexity import Perplexity
    from windlass.quantize.tensor_progress import TensorProgress

_TEXT = "perplexity"
_DEFAULT_WINDOW = 512


def _group(text: str) -> int:
    return int(choice("32", "64", "128")(text))


FLAGS = (
    Flag(name="model", aliases=MODEL_NAMES, metavar="DIR|ORG/NAME", is_required=True,
         help="a Hugging Face checkpoint in bf16, fp16 or fp32: a folder, a name on the hub or "
         "demo"),
    REVISION_FLAG,
    Flag(name="out", aliases=("-o",), read=Path, metavar="DIR", is_required=True,
         help="a new or empty folder, or one that the same command began"),
    Flag(name="format", read=choice("int4", "int8"), metavar="FORMAT", is_required=True,
         help="int4 or int8: symmetric integers, rounded to nearest"),
    Flag(name="group", read=_group, metavar="N",
         help="elements of a row with one scale: 32, 64 or 128 (default: 128 for int4, the whole "
         "row for int8)"),
    Flag(name="experts-only", read=None, default=False,
         help="only routed experts; attention, dense and shared networks stay as they are"),
    Flag(name="threads", aliases=("-t",), read=integer(1), metavar="N",
         help="of computation (default: one per core that affinity and quotas allow)"),
    Flag(name="text", read=Path, metavar="FILE", group=_TEXT,
         help="a UTF-8 text whose perplexity is measured before and after"),
    Flag(name="window", read=integer(2), metavar="N", group=_TEXT,
         help="tokens that are read at once, with --text (default "
         f"{_DEFAULT_WINDOW}); the first of a window is not counted"),
    Flag(name="host-memory", read=size, metavar="SIZE", group=_TEXT,
         help="memory the process may take while it measures, with --text (default: most of what "
         "is free); quantising itself takes about 300 MiB whatever the model"),
    Flag(name="verbose", read=None, default=False, group="records",
         help="a line for every expert instead of one for a layer's experts"),
    Flag(name="json", read=None, default=False, group="records",
         help="end standard output with one line of JSON"),
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    command = f"  windlass quantize {shlex.join(arguments)}"
    try:
        with StopSignals(f"stopped at once; what is finished is kept. Go on with:\n{command}"):
            return _run(values)
    except KeyboardInterrupt:
        message = "interrupted; what is finished is kept. Go on with:"
        print(f"\n{message}\n{command}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(values: Mapping[str, Any]) -> int:
    for name in ("window", "host_memory"):
        if values[name] is not None and values["text"] is None:
            raise UsageError(f"--{name.replace('_', '-')}: allowed only with --text")
    from windlass.quantize.convert import QuantizeOptions, quantize
    from windlass.quantize.scheme import make_scheme
    from windlass.quantize.tensor_errors import kind_lines, tensor_lines
    from windlass.quantize.tensor_progress import TensorProgress

    named = EngineOptions(model=values["model"], revision=values["revision"])
    values = {**values, "model": locate(named).with_weights(say_line).model}
    options = QuantizeOptions(
        model=values["model"],
        out=values["out"],
        scheme=make_scheme(values["format"], values["group"]),
        experts_only=values["experts_only"],
        threads=values["threads"],
    )
    text = None if values["text"] is None else _read_text(values)
    with TensorProgress() as progress:
        progress.begin("quantised", lambda per_s: f"{format_bytes(per_s)}/s")
        result = quantize(
            options, say=progress.say, on_step=lambda step: progress.step(step.done, step.total)
        )
        for line in tensor_lines(result.records, verbose=values["verbose"]):
            print(line)
        for line in (*kind_lines(result.records), _summary(result, values)):
            print(line)
        sys.stdout.flush()
        measured = {} if text is None else _perplexities(text, values, progress)
    if values["json"]:
        print(json.dumps(_document(result, values, measured)))
    return 0


def _read_text(values: Mapping[str, Any]) -> str:
    """Read, and the window found possible, before hours of other work."""
    from windlass.quantize.perplexity import check_window, read_text

    check_window(values["model"], values["window"] or _DEFAULT_WINDOW)
    return read_text(values["text"])


def _perplexities(
    text: str, values: Mapping[str, Any], progress: "TensorProgress"
) -> dict[str, "Perplexity"]:
    """Before and after, printed as they are known."""
    from windlass.quantize.perplexity import measure

    measured = {}
    for when, model in (("before", values["model"]), ("after", values["out"])):
        progress.begin(f"perplexity {when}", lambda per_s: f"{per_s:.0f} tokens/s")
        options = EngineOptions(
            model=str(model), host_memory=values["host_memory"], threads=values["threads"]
        )
        window = values["window"] or _DEFAULT_WINDOW
        measured[when] = found = measure(options, text, window=window, on_step=progress.step)
        print(
            f"perplexity {when}: {found.perplexity:.4f} ({found.num_tokens} tokens,"
            f" windows of {window})",
            flush=True,
        )
    return measured


def _summary(result: "Quantized", values: Mapping[str, Any]) -> str:
    if result.was_finished:
        return f"{values['out']}: was finished before; nothing was written"
    rate = result.source_bytes / max(result.seconds, 1e-9)
    return (
        f"{values['out']}: {format_bytes(result.bytes_before)} became"
        f" {format_bytes(result.bytes_after)}, in {format_seconds(result.seconds)}"
        f" ({format_bytes(rate)}/s)"
    )


def _document(
    result: "Quantized", values: Mapping[str, Any], measured: Mapping[str, "Perplexity"]
) -> dict[str, Any]:
    return {
        "version": __version__,
        "out": str(values["out"]),
        "format": values["format"],
        "group": values["group"],
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "elapsed_time": result.seconds,
        "was_finished": result.was_finished,
        **{f"perplexity_{when}": found.perplexity for when, found in measured.items()},
    }


COMMAND = Command(
    name="quantize",
    help="Write a checkpoint with 4- or 8-bit integers for matrices, as compressed-tensors.",
    flags=FLAGS,
    run=run,
)
