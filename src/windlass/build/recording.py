"""Opens the file that routing is recorded in."""

import logging
from contextlib import ExitStack

from windlass.checkpoint.folder import CheckpointFolder
from windlass.options import EngineOptions, model_name
from windlass.replay.recorder import RoutingRecorder, trace_header
from windlass.replay.trace_file import TraceWriter

_logger = logging.getLogger(__name__)


def open_recorder(
    options: EngineOptions, model: CheckpointFolder, stamp: str, opened: ExitStack
) -> RoutingRecorder | None:
    """What writes `options.routing_trace`, if that is named; `opened` closes it. UsageError if the
    file cannot be made. Says (level WARNING) what it holds."""
    path, inputs = options.routing_trace, options.routing_trace_inputs
    if path is None:
        return None
    header = trace_header(
        model.spec.trunk,
        model=model_name(model.folder),
        stamp=stamp,
        inputs=inputs,
    )
    writer = TraceWriter(path, header)
    opened.callback(writer.close)
    what = ", and what they read, from which prompts could be made again" if inputs else ""
    _logger.warning(
        "routing-trace: %s gets the experts of every token%s; it is as private as the prompts",
        path, what,
    )  # fmt: skip
    return RoutingRecorder(writer)
