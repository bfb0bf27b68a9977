"""Counters of a running engine, as one frozen record for progress lines and summaries."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Totals since the engine was built, except `running` and `waiting` (sequences now)."""

    passes: int
    prompt_tokens: int  # that were computed
    generated_tokens: int
    bytes_read: int  # from disk
    expert_requests: int  # experts a pass needed
    expert_hits: int  # of these, already in memory when asked for
    wait_s: float  # compute waited for weights
    pass_s: float  # spent in passes
    peak_rss_bytes: int  # of the process
    running: int
    waiting: int
    num_preemptions: int = 0  # sequences that gave their pages back, to be computed again
    prefix_cache_queries: int = 0  # prompt tokens that other sequences might have computed
    prefix_cache_hits: int = 0  # of these, tokens that they had computed

    @property
    def input_tokens(self) -> int:
        """Prompt tokens, computed or found."""
        return self.prompt_tokens + self.prefix_cache_hits
