"""Counters of a running engine, as one frozen record for progress lines and summaries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from windlass.ids import DEVICE, DISK, HOST, Part
from windlass.phases import PhaseStats
from windlass.weights.stats import StoreStats


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """Guessed tokens that passes computed, and those of them that were right. `passes_without`:
    passes that could have guessed and did not. `note`: why, as things stand."""

    proposed: int
    accepted: int
    passes: int
    passes_without: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Totals since the engine was built, except `running` and `waiting` (sequences now, those of
    batches among them)."""

    passes: int
    prompt_tokens: int  # that were computed
    generated_tokens: int
    weights: StoreStats  # what was read, found and prefetched
    pass_s: float  # spent in passes
    peak_rss_bytes: int  # of the process
    peak_device_bytes: int = 0  # taken of a device's memory at once, by anybody; 0 without one
    running: int
    waiting: int
    running_batch: int = 0
    waiting_batch: int = 0
    kv_cache_usage: float = 0.0  # share of the cache's pages that sequences hold now
    num_preemptions: int = 0  # sequences that gave their pages back, to be computed again
    burst_passes: int = 0  # in which one sequence decoded while others waited
    bursts_have_lost: bool = False  # all together had brought more tokens per second
    prefix_cache_queries: int = 0  # prompt tokens that other sequences might have computed
    prefix_cache_hits: int = 0  # of these, tokens that they had computed
    speculation: str = ""  # whether reading ahead by forecasts pays, in words
    forecast_sources: str = ""  # which are on and off, in words; empty where all are on
    drafts: DraftStats | None = None  # None where nothing is guessed
    phases: Mapping[str, PhaseStats] = field(default_factory=dict)  # those that occurred

    @property
    def bytes_read(self) -> int:
        """From disk."""
        return self.weights.bytes_read

    @property
    def wait_s(self) -> float:
        """Seconds that computation waited for weights."""
        return self.weights.wait_s

    @property
    def expert_requests(self) -> int:
        """Experts that passes needed."""
        return self.weights.requests.get(Part.EXPERT, 0)

    @property
    def expert_hits(self) -> int:
        """Of these, experts that were in memory when they were asked for."""
        return self.weights.hits.get(Part.EXPERT, 0)

    @property
    def expert_shares(self) -> dict[str, float]:
        """Where the experts were that passes needed, as shares of them by tier; empty where none
        was needed."""
        asked = self.expert_requests
        return {tier: found / asked for tier, found in self.expert_places.items()} if asked else {}

    @property
    def expert_places(self) -> dict[str, int]:
        """The same as numbers of them, that of the tier that passes take them from first."""
        hits, missed = self.expert_hits, self.expert_requests - self.expert_hits
        if self.weights.hits_below is None:
            return {HOST: hits, DISK: missed}
        host = self.weights.hits_below.get(Part.EXPERT, 0)
        return {DEVICE: hits, HOST: host, DISK: missed - host}

    @property
    def prefill_s(self) -> float:
        """Seconds of passes for prompt rows, their share of mixed passes included."""
        return sum(phase.prompt_s for phase in self.phases.values())

    @property
    def decode_s(self) -> float:
        """The same for generated rows."""
        return sum(phase.seconds - phase.prompt_s for phase in self.phases.values())

    @property
    def decode_tokens(self) -> int:
        """Generated tokens but the first of each sequence, which its prompt's last row gives."""
        return self.generated_tokens - sum(phase.first_tokens for phase in self.phases.values())

    @property
    def total(self) -> PhaseStats:
        """All phases together."""
        return sum(self.phases.values(), PhaseStats())

    def phases_json(self) -> dict[str, Any]:
        """By phase, and all together."""
        found = {name: phase.to_json() for name, phase in self.phases.items()}
        return {**found, "total": self.total.to_json()}

    @property
    def input_tokens(self) -> int:
        """Prompt tokens, computed or found."""
        return self.prompt_tokens + self.prefix_cache_hits
