"""The GPU that options name, opened, and what is made for it."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from windlass.build.checkpoint_sizes import device_sizes
from windlass.build.host_budget import too_much
from windlass.checkpoint.folder import CheckpointFolder
from windlass.device.base import Device
from windlass.device.cuda import CudaDevice, CudaHost, Usage, cuda_index, why_none
from windlass.device.cuda_graphs import CudaGraphs
from windlass.errors import BudgetError, UsageError
from windlass.kernels.cuda_graphs import GraphCaptures
from windlass.kernels.interface import Kernels
from windlass.kernels.select import device_backend
from windlass.kernels.select_device import choose_device_kernels
from windlass.options import AUTO, EngineOptions, read_plan
from windlass.perf.sizes import DeviceSizes
from windlass.plan import Plan
from windlass.trace import Tracer
from windlass.units import MIB, format_bytes

_DEFAULT_SHARE = 0.9  # of the memory that is free, where no budget is given
# Of kernels that CUDA loads when they are first used, after all was measured [assumed]
LATER_BYTES = 128 * MIB
_logger = logging.getLogger(__name__)


class Gpu(NamedTuple):
    """A device that computes, and how the rest of an engine is made for it."""

    device: Device
    words: str  # which it is, for people
    make_kernels: Callable[[], Kernels]
    make_host: Callable[[int], Device]  # of so many readers: memory that its copies reach
    weigh: Callable[[], Usage]  # its memory, as it is now
    limit: Callable[[int], None]  # of what it may allocate from now on
    peak: Callable[[], int]  # what was taken of it at once, by anybody


def open_gpu(options: EngineOptions, tracer: Tracer) -> Gpu | None:
    """What `options.device` names; None where the host is to compute. UsageError where a GPU is
    named and cannot be used. With "auto", why a GPU that is there is not used
    is logged."""
    if (
        options.device == AUTO
        and options.plan is not None
        and read_plan(options.plan).above is None
    ):
        return None
    index = cuda_index(options.device)
    if index is None:
        if options.device_memory is not None:
            _logger.warning("device_memory: the CPU computes alone: %s", why_none())
        return None
    place = torch.device("cuda", index)
    try:
        device = CudaDevice(place, tracer=tracer)
    except RuntimeError as error:  # in use by others alone, of another driver, broken
        reason = str(error).partition("\n")[0]
        if options.device != AUTO:
            raise UsageError(f"device: got {options.device!r}, which fails: {reason}") from error
        _logger.warning("device auto: the CPU computes alone: cuda:%d fails: %s", index, reason)
        return None

    def make_kernels() -> Kernels:
        return choose_device_kernels(
            device_backend(options.moe_backend),
            place,
            capability=device.capability,
            bf16_activations=options.dtype == "bfloat16",
            captures=None if options.enforce_eager else GraphCaptures(device, CudaGraphs(place)),
            memory=device,
        )

    def make_host(num_threads: int) -> Device:
        return CudaHost(num_threads, place, tracer=tracer)

    words = f"{device.model} (cuda:{index})"
    return Gpu(
        device, words, make_kernels, make_host, device.usage, device.limit, device.peak_bytes
    )


def sizes_above(
    gpu: Gpu | None, model: CheckpointFolder, options: EngineOptions, kernels: str
) -> DeviceSizes | None:
    """Of the device that computes above the host: of `gpu`, or of one that was given with the plan
    to replay. None without one."""
    if gpu is not None:
        return weighed(gpu, model, options, kernels)
    planned = None if options.plan is None else read_plan(options.plan).above
    if planned is None:
        return None
    budget = planned.budget_bytes
    return device_sizes(model, budget_bytes=budget, process_bytes=0, backend=kernels)


def weighed(gpu: Gpu, model: CheckpointFolder, options: EngineOptions, kernels: str) -> DeviceSizes:
    """What `gpu` weighs, once its first kernels have run. UsageError where it has less than it is
    to give."""
    usage = gpu.weigh()
    budget = options.device_memory
    if budget is None:
        budget = usage.taken + int(_DEFAULT_SHARE * (usage.total - usage.taken))
    if budget > usage.total:
        raise too_much("device_memory", budget, usage.total, f"all that {gpu.words} has")
    return device_sizes(
        model, budget_bytes=budget, process_bytes=usage.taken + LATER_BYTES, backend=kernels
    )


def limit(gpu: Gpu, plan: Plan) -> None:
    """Has `gpu` keep to the budget of its tier: what is not torch's, as the context, counts."""
    assert plan.above is not None, "a device without a tier"
    usage = gpu.weigh()
    room = plan.above.budget_bytes - LATER_BYTES - (usage.taken - usage.of_torch)
    if room <= 0:
        raise BudgetError(
            f"device memory: got {format_bytes(plan.above.budget_bytes)}, of which"
            f" {format_bytes(usage.taken)} is taken already: raise --device-memory"
        )
    gpu.limit(room)


def uses_gpu(options: EngineOptions) -> bool:
    """Whether a GPU that nobody named might compute."""
    return options.device == AUTO and cuda_index(AUTO) is not None
