"""How many threads compute where the user does not say: processors this process may run on, and
those that a quota of processor time leaves of them."""

from pathlib import Path

import torch

from windlass.device.cgroups import PROC, groups_of, lines_of, number_of

_RUNNABLE = torch.get_num_threads()  # before any engine of this process set its own


def default_threads(proc: Path = PROC) -> int:
    """One for each processor; under a quota as many as it pays for, to the nearest: half a thread
    too many waits now and then, half a thread too few would always be missing."""
    quota = cpu_quota(proc)
    return _RUNNABLE if quota is None else max(1, min(_RUNNABLE, int(quota + 0.5)))


def quota_note(proc: Path = PROC) -> str | None:
    """A line where a quota leaves fewer threads than there are processors."""
    quota, threads = cpu_quota(proc), default_threads(proc)
    if quota is None or threads == _RUNNABLE:
        return None
    return (
        f"threads: {threads}, as the quota of processor time is {quota:.3g} of {_RUNNABLE}"
        " processors (--threads sets another number)"
    )


def cpu_quota(proc: Path = PROC) -> float | None:
    """Processors' worth of time that this process and its neighbours may take: the least of its
    groups and all above; None without a limit."""
    found = []
    for folder, is_v1 in groups_of("cpu", proc):
        if is_v1:
            quota = number_of(folder / "cpu.cfs_quota_us")
            period = number_of(folder / "cpu.cfs_period_us")
        else:
            words = " ".join(lines_of(folder / "cpu.max")).split()
            quota, period = map(int, words) if words and words[0] != "max" else (None, None)
        if quota is not None and period and quota > 0:
            found.append(quota / period)
    return min(found, default=None)
