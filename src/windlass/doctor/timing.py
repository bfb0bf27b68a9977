"""Times calls by medians over samples long enough to mean something. Knows nothing of what it
times."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.01  # calls are repeated within a sample up to here: timers and wake-ups vanish
NOISY_SPREAD = 0.2
_BUSY_SHARE = 0.1  # of all cores, taken by other processes
_FEWEST = 3  # the median of 3 survives one disturbed sample


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, in each of the samples."""

    samples: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Slowest minus fastest, as a share of the median."""
        return (max(self.samples) - min(self.samples)) / self.median_s


def measure(
    call: Callable[[], object],
    *,
    samples: int = 5,
    sample_s: float = SAMPLE_S,
    limit_s: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Times `call` after one call that warms up: `samples` times, fewer (but 3) past `limit_s`
    seconds. A sample has as many calls as take `sample_s`."""
    call()
    begin = clock()
    call()
    first = max(clock() - begin, 1e-9)
    calls = max(1, round(sample_s / first))
    seconds = [first] if calls == 1 else []
    start = clock()
    while len(seconds) < _FEWEST or (len(seconds) < samples and clock() - start < limit_s):
        begin = clock()
        for _ in range(calls):
            call()
        seconds.append((clock() - begin) / calls)
    return Timing(tuple(seconds))


class Load:
    """Cores that other processes of this machine keep busy, from its making to `cores`."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._start_s = time.perf_counter()
        self._others_s = self._now()

    def cores(self) -> float:
        elapsed = max(time.perf_counter() - self._start_s, 1e-9)
        return max(0.0, self._now() - self._others_s) / elapsed

    def _now(self) -> float:
        """Seconds that cores have worked for others since the machine started."""
        first = (self._proc / "stat").read_text().split("\n")[0]
        user, nice, system, _, _, interrupts, soft = map(int, first.split()[1:8])
        everyone = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return everyone - own.user - own.system


def noise_line(spread: dict[str, float], others: float, cores: int) -> str | None:
    """What is to be said of a machine that was not quiet; None where it was. `others`: cores busy
    with other processes, of `cores`."""
    noisy = {name: share for name, share in spread.items() if share > NOISY_SPREAD}
    said = []
    if noisy:
        worst = max(noisy, key=lambda name: noisy[name])
        said.append(
            f"{len(noisy)} of {len(spread)} measurements spread by more than"
            f" {100 * NOISY_SPREAD:.0f} % (worst: {worst}, {100 * noisy[worst]:.0f} %)"
        )
    if others > _BUSY_SHARE * cores:
        said.append(f"other processes kept {others:.1f} of {cores} cores busy")
    return f"noisy machine: {'; '.join(said)}: medians are shown" if said else None
