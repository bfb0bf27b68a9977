"""How much memory of the host a run may have."""

from windlass.device.process_memory import (
    available_bytes,
    machine_bytes,
    memory_limits,
    resident_bytes,
)
from windlass.errors import UsageError
from windlass.units import MIB, format_bytes

_DEFAULT_SHARE = 0.8  # of the memory that is available, where no budget is given
# Left free below the limit of a memory cgroup: page tables and buffers of the kernel count too
_LIMIT_MARGIN = 32 * MIB


def default_budget() -> int:
    """Memory for the whole process where the user names none: below every limit on it."""
    return _budget(_DEFAULT_SHARE)


def largest_budget() -> int:
    """All memory that this process could have."""
    return _budget(1.0)


def check_budget(host_memory: int | None) -> None:
    """UsageError where it is more than this machine, or a cgroup's limit, has."""
    machine = machine_bytes()
    most = min([machine, *(group.limit for group in memory_limits())])
    if host_memory is not None and host_memory > most:
        whose = "all that this machine has"
        if most < machine:
            whose = f"the limit of its memory cgroup, of the machine's {format_bytes(machine)}"
        raise too_much("host_memory", host_memory, most, whose)


def too_much(name: str, wanted: int, most: int, whose: str) -> UsageError:
    """More is to be taken of a memory than there is: `most` bytes, `whose` in words."""
    return UsageError(
        f"{name}: got {format_bytes(wanted)}, allowed up to {most // MIB}MiB: {whose}"
    )


def _budget(share: float) -> int:
    budget = resident_bytes() + int(share * available_bytes())
    return min([budget, *(group.limit - _LIMIT_MARGIN for group in memory_limits())])
