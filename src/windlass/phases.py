"""What passes of one kind took, counted. A pure record: the engine fills it, the planner compares
it with what it had predicted."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

PHASES = ("prefill", "mixed", "decode")
MODULES = ("attention", "experts", "dense", "head")  # what the host computes; the rest is `other_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStats:
    """Passes of prompt rows alone ("prefill"), of generated rows alone ("decode"), or of both
    ("mixed"). Seconds of lanes overlap: `seconds` is less than their sum where work is hidden.
    `modules`: seconds inside each of MODULES."""

    seconds: float = 0.0
    prompt_s: float = 0.0  # of these, for prompt rows: their share of the rows, pass by pass
    passes: int = 0
    prompt_tokens: int = 0  # computed
    output_tokens: int = 0
    first_tokens: int = 0  # of these, those that came of a prompt's last row
    bytes_read: int = 0  # from disk
    disk_s: float = 0.0  # at least one read was under way
    wait_s: float = 0.0  # computation waited for weights
    modules: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(MODULES, 0.0))

    @property
    def host_s(self) -> float:
        """Seconds of computation."""
        return sum(self.modules.values())

    @property
    def other_s(self) -> float:
        """Neither computing nor waiting: Python, sampling, embedding rows."""
        return max(0.0, self.seconds - self.host_s - self.wait_s)

    @property
    def busy(self) -> dict[str, float]:
        """Seconds by lane, as the planner names them: the host is busy while it does not wait."""
        return {"disk": self.disk_s, "host": max(0.0, self.seconds - self.wait_s)}

    def __add__(self, more: "PhaseStats") -> "PhaseStats":
        return self._with(more, 1)

    def __sub__(self, earlier: "PhaseStats") -> "PhaseStats":
        return self._with(earlier, -1)

    def _with(self, more: "PhaseStats", times: int) -> "PhaseStats":
        plain = {
            one.name: getattr(self, one.name) + times * getattr(more, one.name)
            for one in fields(self)
            if one.name != "modules"
        }
        modules = {name: self.modules[name] + times * more.modules[name] for name in MODULES}
        return replace(self, **plain, modules=modules)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "host_s": self.host_s, "other_s": self.other_s}


def since(before: Mapping[str, PhaseStats], now: Mapping[str, PhaseStats]) -> dict[str, PhaseStats]:
    """What passes have brought to each phase; phases without a pass are left out."""
    grown = {name: total - before.get(name, PhaseStats()) for name, total in now.items()}
    return {name: own for name, own in grown.items() if own.passes}
