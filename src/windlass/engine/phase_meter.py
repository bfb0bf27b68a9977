"""Counts what passes take, by phase. Cheap enough to be always on: a few additions per step."""

from collections.abc import Mapping
from typing import NamedTuple

from windlass.phases import MODULES, PHASES, PhaseStats
from windlass.schedule.batch import Segment

# spans of runtime/host.py by module; sampling and the rows of the embedding are in none
_SPANS = {
    "attention": ("attention",),
    "experts": ("experts",),
    "dense": ("route", "shared", "combine", "dense"),
    "head": ("head",),
}


class Readings(NamedTuple):
    """Totals since the engine was built. Seconds, but for `bytes_read`."""

    bytes_read: int
    disk_s: float
    wait_s: float
    spans: Mapping[str, float]  # by name

    def module(self, name: str) -> float:
        return sum(self.spans.get(span, 0.0) for span in _SPANS[name])


class PhaseMeter:
    """Charges what has changed since the last step to the phase of this one; reads that went on
    between two steps count as the later one's."""

    def __init__(self) -> None:
        self._last = (0, 0.0, 0.0, dict.fromkeys(MODULES, 0.0))
        self.phases: dict[str, PhaseStats] = {}

    def add(
        self,
        segments: tuple[Segment, ...],
        now: Readings,
        *,
        passes: int,
        output_tokens: int,
        seconds: float,
    ) -> PhaseStats:
        """A step over `segments` has ended; what it took. Its seconds are divided by rows: all rows
        share the weights that are read, and cost the same products but for attention and head."""
        prompt = sum(segment.num_tokens for segment in segments if segment.is_prompt)
        rows = sum(segment.num_tokens for segment in segments)
        modules = {name: now.module(name) for name in MODULES}
        bytes_read, disk_s, wait_s, before = self._last
        self._last = (now.bytes_read, now.disk_s, now.wait_s, modules)
        took = PhaseStats(
            seconds=seconds,
            prompt_s=seconds * prompt / rows,
            passes=passes,
            prompt_tokens=prompt,
            output_tokens=output_tokens,
            first_tokens=sum(s.is_prompt and s.wants_logits for s in segments),
            bytes_read=now.bytes_read - bytes_read,
            disk_s=now.disk_s - disk_s,
            wait_s=now.wait_s - wait_s,
            modules={name: seconds - before[name] for name, seconds in modules.items()},
        )
        name = phase_of(prompt, rows)
        self.phases[name] = self.phases.get(name, PhaseStats()) + took
        return took


def phase_of(prompt_rows: int, rows: int) -> str:
    """Which of PHASES a pass belongs to."""
    prefill, mixed, decode = PHASES
    return decode if not prompt_rows else prefill if prompt_rows == rows else mixed
