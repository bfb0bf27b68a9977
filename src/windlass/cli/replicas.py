"""What `run-batch` says and asks of replicas. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.cli.flags import Flag, integer
from windlass.cli.signals import StopSignals
from windlass.errors import UsageError
from windlass.hub.locate import Located
from windlass.options import AUTO, CPU, CUDA, EngineOptions

if TYPE_CHECKING:
    from windlass.batch.job import Summary
    from windlass.batch.job_options import JobOptions
    from windlass.batch.progress import JobProgress

_GROUP = "cluster"
_ALONE = ("trace", "routing_trace", "expert_map_store", "plan")  # of one engine and its machine


def _replicas(text: str) -> int | str:
    return text if text == AUTO else integer(1)(text)


REPLICA_FLAGS = (
    Flag(name="replicas", read=_replicas, metavar="N|auto", group=_GROUP,
         help="run on so many machines or devices of a Ray cluster, each with an engine and a copy "
         "of the model of its own; auto: on all of them, those that join too"),
    Flag(name="ray-address", metavar="ADDRESS", group=_GROUP,
         help="with --replicas: auto (the Ray that runs on this machine, default), HOST:PORT of a "
         "head node, or local (a Ray that lasts as long as the job)"),
)  # fmt: skip


def check_replicas(values: Mapping[str, Any]) -> None:
    """Raises UsageError for options that do not go together."""
    if values["replicas"] is None:
        if values["ray_address"] is not None:
            raise UsageError("--ray-address: allowed with --replicas")
        return
    for key in _ALONE:
        if values[key] is not None:
            flag = key.replace("_", "-")
            raise UsageError(f"--{flag}: allowed without --replicas: it is of one engine")
    if isinstance(values["expert_usage"], Path):
        raise UsageError("--expert-usage: got a file, allowed auto or off with --replicas")
    if values["device"] not in (AUTO, CPU, CUDA):
        raise UsageError(
            f"--device: got {values['device']}, allowed {AUTO}, {CPU} or {CUDA} with --replicas:"
            " the cluster says which replica has which device"
        )


def run_replicas(
    values: Mapping[str, Any],
    options: "JobOptions",
    engine: tuple[EngineOptions, Located],
    progress: "JobProgress",
    signals: StopSignals,
) -> tuple["Summary", list[str], dict[str, Any]]:
    """How the job ended; lines of what each replica did, and fields of the same. `engine`: its
    options as given and with folders."""
    from windlass.ray.job import ReplicaWish, run_on_replicas

    number = None if values["replicas"] == AUTO else values["replicas"]
    wish = ReplicaWish(number, values["ray_address"] or AUTO, *engine)
    summary, parts = run_on_replicas(
        options, wish, progress=progress, stopping=signals, has_opened=signals.defer
    )
    fields = [
        {
            "name": part.name,
            "rows": part.rows,
            "elapsed_time": part.seconds,
            "total_input_tokens": part.stats.input_tokens,
            "total_output_tokens": part.stats.generated_tokens,
            "bytes_read": part.stats.bytes_read,
            "expert_requests": part.stats.expert_requests,
            "expert_hits": part.stats.expert_hits,
            "peak_rss_bytes": part.stats.peak_rss_bytes,
            "is_gone": part.is_gone,
        }
        for part in parts
    ]
    return summary, [part.line() for part in parts], {"replicas": fields}
