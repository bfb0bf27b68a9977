"""How many replicas each node gets, and what of its machine each of them may take."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from windlass.errors import UsageError
from windlass.options import CPU, CUDA, EngineOptions
from windlass.ray.cluster import Node
from windlass.ray.messages import Place


def num_places(node: Node, options: EngineOptions) -> int:
    """Replicas that a node has room for without dividing anything but memory: one for each device,
    or one."""
    if options.device == CPU or (node.gpus == 0 and options.device != CUDA):
        return 1
    return node.gpus


def spread(
    nodes: Sequence[Node], number: int | None, options: EngineOptions, kept: Mapping[str, int]
) -> dict[str, int]:
    """Replicas by the id of their node, `number` in all; None for as many as there are places.
    `kept`: what nodes have already, which stays. UsageError where devices do not suffice."""
    found = {node.id: kept[node.id] for node in nodes if node.id in kept}
    places = {node.id: num_places(node, options) for node in nodes}
    if number is None:
        return {**places, **found}
    missing = number - sum(found.values())
    while missing > 0:
        free = [node for node in nodes if found.get(node.id, 0) < places[node.id]]
        if not free and not kept:  # at the beginning processors are shared, devices are not
            free = [node for node in nodes if not _uses_devices(node, options)]
        if not free:
            break
        node = min(free, key=lambda one: found.get(one.id, 0) / max(1, places[one.id]))
        found[node.id] = found.get(node.id, 0) + 1
        missing -= 1
    if missing > 0 and not kept and nodes:
        raise UsageError(
            f"replicas: got {number}, allowed up to {number - missing}: one for each device"
        )
    return found


def takes(node: Node, count: int, options: EngineOptions) -> tuple[float, int]:
    """Processors and devices of `node` that each of `count` replicas takes."""
    return node.cpus / count, 1 if _uses_devices(node, options) else 0


def shared_options(
    options: EngineOptions, place: Place, sharers: int, *, has_device: bool
) -> EngineOptions:
    """Those of one of `sharers` replicas on a machine: of its memory each gets an equal part, and
    of its processors, where threads are not given. `place`: as it was before any was open."""
    if options.device != CPU:
        options = replace(
            options,
            device=CUDA if has_device else CPU,
            device_memory=options.device_memory if has_device else None,
        )
    if sharers == 1:
        return options
    return replace(
        options,
        host_memory=(options.host_memory or place.budget_bytes) // sharers,
        threads=options.threads or max(1, place.threads // sharers),
    )


def _uses_devices(node: Node, options: EngineOptions) -> bool:
    return options.device != CPU and node.gpus > 0
