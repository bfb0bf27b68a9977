"""What a module's call costs beside its work: Python, leases, routing, waking threads. Measured on
the whole engine with a model whose arithmetic takes next to nothing."""

import statistics
import time
from collections.abc import Callable

from windlass.build import open_engine
from windlass.device.host import resident_bytes
from windlass.doctor.timing import Timing
from windlass.engine.sequence import Request
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.units import MIB

_TOKENS = 48
_GROUP = 8  # passes of a sample
_WARM = 8  # passes that still read weights
_ROOM = 256 * MIB  # the shipped model fits twice


def measure_overhead(
    options: EngineOptions, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Seconds of a module's call (attention, or the experts, of a layer; the head) in decode passes
    of one sequence. `options`: with the shipped model, kernels as they are to be measured."""
    params = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    with open_engine(options) as engine:
        engine.add(Request("measure", (1, 2, 3, 4), params, "measure"))
        seconds = []
        while engine.has_work:
            begin = clock()
            engine.step()
            seconds.append(clock() - begin)
        modules = 2 * engine.plan.num_blocks + engine.plan.num_head_chunks
    passes = [one / modules for one in seconds[_WARM:]]
    groups = [passes[i : i + _GROUP] for i in range(0, len(passes), _GROUP)]
    return Timing(tuple(map(statistics.median, groups)))


def small_budget() -> int:
    """A budget for `measure_overhead`."""
    return resident_bytes() + _ROOM
