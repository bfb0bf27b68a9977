"""What a driver and its replicas tell each other: plain records that are pickled. No torch, no
ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from windlass.batch.journal import JournalState
from windlass.engine.engine_stats import EngineStats
from windlass.engine.grammars import grammars_bytes
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.protocol.answers import AUTO
from windlass.protocol.openai import ChatTokenizer
from windlass.workload import Job


@dataclass(frozen=True, slots=True)
class KnownWork:
    """What a replica plans for, counted by whoever has the rows. `longest_row_bytes`: what the
    largest takes while it is read and made into tokens."""

    lengths: Job | None
    longest_row_bytes: int = 0
    wants_grammars: bool = False

    def job(self, tokenizer: ChatTokenizer, params: SamplingParams, longest: int) -> Job | None:
        """Lengths, of sequences that a context of `longest` tokens can hold."""
        if self.lengths is None:
            return None
        return self.lengths._replace(workload=self.lengths.workload.shortened(longest))

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        """What rows take beside the engine."""
        more = grammars_bytes(vocab_size) if self.wants_grammars else 0
        return self.longest_row_bytes + more


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """How a replica opens its engine and makes answers. `options`: the model is a folder of its own
    node or a name on the hub. `created`: seconds since 1970, of every answer. `work` None: nothing
    is known of the rows."""

    options: EngineOptions
    served_names: tuple[str, ...]
    created: int
    name: str = "row"  # begins the ids of requests
    max_retries: int = 2
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    work: KnownWork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a replica is, before it opens anything. `budget_bytes`: memory that an engine would
    take that had the node for itself; `threads`: as many compute there."""

    host: str
    pid: int
    version: str
    budget_bytes: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """Of an open replica. `checkpoint`: what tells it from others (`hub.locate.identity_of`).
    `fingerprint`: what would change results, kernels among it. `arithmetic`: instruction sets and
    device, in words. `plan_line`: the first of its plan, for people."""

    host: str
    pid: int
    checkpoint: str
    tokenizer: str | None
    fingerprint: Mapping[str, Any]
    arithmetic: str
    max_model_len: int
    capacity: int  # sequences at once
    window: int  # of sequences, that keeps it busy
    plan_line: str

    def words(self) -> str:
        """One line of what it is."""
        kernels = f"{self.fingerprint['kernels']} ({self.arithmetic})"
        plan = self.plan_line.removeprefix("plan: ")
        return f"process {self.pid}, kernels {kernels}, {self.capacity} sequences; {plan}"


@dataclass(frozen=True, slots=True)
class EndedRow:
    """A row's result, as the journal of a job has it. `index`: of the row that was given."""

    index: int
    state: JournalState
    line: bytes


class Report(NamedTuple):
    """What became of a replica's rows since the last one."""

    ended: tuple[EndedRow, ...]
    stats: EngineStats
