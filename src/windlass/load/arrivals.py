"""When requests are sent. The loop is open: they do not wait for answers, unless a number of those
under way is said."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from windlass.load.answers import Answer, Ask, Endpoint


@dataclass(frozen=True, slots=True)
class Pace:
    """`rate`: requests a second, inf for all at once. `burstiness`: 1 for a Poisson process, less
    for bursts, more for even distances (a gamma distribution's shape). `most`: under way at once,
    None for no bound."""

    rate: float = float("inf")
    burstiness: float = 1.0
    most: int | None = None
    seed: int = 0


def delays(count: int, pace: Pace) -> list[float]:
    """Seconds from the beginning at which each of `count` requests is sent; drawn, then stretched
    so that the last is sent at `count / rate`."""
    if pace.rate == float("inf"):
        return [0.0] * count
    draw = np.random.default_rng(pace.seed)
    each = draw.gamma(pace.burstiness, 1 / (pace.rate * pace.burstiness), count)
    times = np.cumsum(each)
    found: list[float] = (times * (count / pace.rate / times[-1])).tolist()
    return found


async def send(endpoint: Endpoint, asks: Sequence[Ask], pace: Pace) -> tuple[list[Answer], float]:
    """All answers, in the order of `asks`, and the seconds that they took together."""
    begin = time.perf_counter()
    places = asyncio.Semaphore(pace.most or max(1, len(asks)))

    async def one(wanted: Ask) -> Answer:
        async with places:
            return await endpoint.stream(wanted)

    tasks = []
    for wanted, delay in zip(asks, delays(len(asks), pace), strict=True):
        wait = begin + delay - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(wanted)))
    answers = await asyncio.gather(*tasks)
    return list(answers), time.perf_counter() - begin
