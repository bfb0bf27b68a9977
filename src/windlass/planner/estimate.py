"""How long a job takes under a plan: load, prefill, mixed passes, decode and tail. Pure arithmetic
over descriptions: passes are composed as the engine would, and timed by the schedule on a clock."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from windlass.errors import UsageError
from windlass.hardware.profile import HardwareProfile
from windlass.plan import Plan
from windlass.planner.budget import Sizes
from windlass.spec.model import ModelSpec
from windlass.workload import Workload

LANES = ("disk", "down", "up", "host", "device")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Passes of one kind. `busy`: seconds that each lane works; `bound`: the least seconds that each
    resource needs (bytes over rate, FLOPs over rate); `binds`: the one that needs most."""

    seconds: float
    passes: int
    prompt_tokens: int
    output_tokens: int
    busy: Mapping[str, float]
    bound: Mapping[str, float]
    binds: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A whole job. Seconds, and tokens per second.

    Phases: "load" (what the first pass takes longer because no weights are there yet), "prefill"
    (passes of prompt rows alone), "mixed" (of prompt and generated rows), "decode" (of generated
    rows alone); kinds that do not occur are absent. `prefill_s` is that of prefill and of the mixed
    passes' share of prompt rows, `decode_s` the rest; with `load_s` they add up to `total_s`.
    """

    prefill_s: float
    decode_s: float
    load_s: float
    total_s: float
    prefill_tokens_s: float
    decode_tokens_s: float
    total_tokens_s: float  # prompt and output, over the whole job
    busy: Mapping[str, float]
    bound: Mapping[str, float]
    binds: str
    phases: Mapping[str, Phase]

    @property
    def share_of_bound(self) -> float:
        """How near the job is to what the resource that binds each phase allows."""
        least = sum(max(phase.bound.values()) for phase in self.phases.values())
        return least / self.total_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Estimate":
        """Reads `to_json` back. UsageError where it is not one."""
        try:
            phases = {name: Phase(**phase) for name, phase in document["phases"].items()}
            return cls(**{**document, "phases": phases})
        except (TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"estimate: not as written by to_json: {error}") from error


def estimate(
    spec: ModelSpec, sizes: Sizes, plan: Plan, profile: HardwareProfile, workload: Workload
) -> Estimate:
    """The job `workload` under `plan` on the machine `profile`."""
    raise NotImplementedError
