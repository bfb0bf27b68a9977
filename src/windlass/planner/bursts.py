"""Whether the sequences of a plan decode together or in bursts, one after the other: where reads
take far longer than computing, a few of them keep less of each other than each would of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from windlass.ids import Part
from windlass.models.spec import Moe
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import Seen
from windlass.perf.pass_cost import PassCost, held_shares, layer_kinds, missing_bytes
from windlass.perf.reuse import missed_in_burst, missed_together
from windlass.perf.sizes import Problem
from windlass.plan import Plan
from windlass.weights.io_queue import BLOCK_BYTES
from windlass.workload import Workload

_SHORT, _LONG = 16, 32  # tokens: shorter ones lose more than lockstep, longer ones gain little
MOST_SEQS = 8  # beyond lies nothing that was measured, and a long wait
_LINK_BINDS = 3.0  # seconds of reading over seconds of computing, from which on bursts are taken
_WORTH = 1.05  # times as many tokens per second
_CONTEXT = 512  # positions that a generated row sees, where no job says it


@dataclass(frozen=True, slots=True)
class Figures:
    """What speaks for bursts of `tokens` of a sequence, and against. `link`: seconds that a pass of
    one sequence reads, over those that it computes; `gain`: tokens per second over those of
    `num_sequences` in lockstep. `max_seqs`: sequences up to which they are worth it; 0: they are
    not."""

    tokens: int
    max_seqs: int
    num_sequences: int
    link: float
    gain: float

    def line(self, plan: Plan) -> str:
        """For people; how `plan` has decided."""
        choice = "in bursts" if plan.burst_tokens else "all sequences together"
        return (
            f"decode: {choice}: a pass of one sequence reads for {self.link:.2g} times as long as"
            f" it computes; by the reuse of trained models bursts of {self.tokens} tokens give"
            f" {self.gain:.2f} times the tokens/s of {self.num_sequences} sequences together"
            " (predicted times know no reuse)"
        )


def find_bursts(problem: Problem, plan: Plan, work: Workload | None) -> Figures | None:
    """Figures for the sequences of `work` that run at once, else for as many as gain most. None
    where bursts make no difference (one sequence, or all experts resident), and beside a device, of
    whose reuse nothing is known."""
    held = held_shares(plan, problem.sizes)
    most = plan.max_num_seqs if work is None else min(plan.max_num_seqs, work.num_sequences)
    if (
        plan.above is not None
        or most < 2
        or held.get(Part.EXPERT, 1.0) == 1
        or plan.schedule == "model-based"
    ):
        return None
    context = _CONTEXT if work is None else work.mean_prompt_tokens + work.mean_output_tokens / 2
    costs = _Costs(problem, held, context)
    alone = {tokens: costs.in_burst(tokens) for tokens in (_SHORT, _LONG, plan.burst_tokens or 1)}
    tokens = _SHORT if alone[_SHORT] <= _WORTH * alone[_LONG] else _LONG
    tokens = plan.burst_tokens or tokens
    numbers = {*range(2, min(most, MOST_SEQS) + 1), *([most] if work is not None else [])}
    gains = {n: costs.together(n) / alone[tokens] for n in numbers}
    shown = most if work is not None else max(gains, key=lambda n: gains[n])
    worth = [n for n, gain in gains.items() if gain >= _WORTH and n <= MOST_SEQS]
    is_worth = costs.link > _LINK_BINDS and (most in worth if work is not None else bool(worth))
    return Figures(tokens, max(worth) if is_worth else 0, shown, costs.link, gains[shown])


def with_bursts(problem: Problem, plan: Plan, work: Workload | None) -> Plan:
    """The plan as the figures have it."""
    found = find_bursts(problem, plan, work)
    if found is None or not found.max_seqs:
        return plan
    return replace(plan, burst_tokens=found.tokens, burst_max_seqs=found.max_seqs)


class _Costs:
    """Seconds of a token. Few rows wait for what they read, so that reading and computing add
    up."""

    def __init__(self, problem: Problem, held: Mapping[Part, float], context: float) -> None:
        self._pass_cost = PassCost(problem)
        self._held = held
        self._context = context
        self._disk = problem.profile.disk.at(BLOCK_BYTES)
        self._expert_bytes = problem.sizes.slot_bytes[Part.EXPERT]
        self._moes = [
            (ffn, count)
            for layer, count in layer_kinds(problem.spec)
            if isinstance(ffn := problem.spec.blocks[layer].ffn, Moe)
        ]
        self.link = self._read_s(1) / self._host_s(1)

    def together(self, rows: int) -> float:
        """In lockstep."""
        return (self._host_s(rows) + self._read_s(rows)) / rows

    def in_burst(self, tokens: int) -> float:
        missed = sum(n * missed_in_burst(moe, self._share, tokens) for moe, n in self._moes)
        return self._host_s(1) + self._other_s(1) + missed * self._expert_bytes / self._disk

    @property
    def _share(self) -> float:
        return self._held[Part.EXPERT]

    def _host_s(self, rows: int) -> float:
        seen = Seen(rows, rows * self._context, 0, 0.0)
        return self._pass_cost.of(PassRun(1, seen, rows), self._held).busy["host"]

    def _read_s(self, rows: int) -> float:
        missed = sum(n * missed_together(moe, self._share, rows) for moe, n in self._moes)
        return self._other_s(rows) + missed * self._expert_bytes / self._disk

    def _other_s(self, rows: int) -> float:
        """Reading what every pass needs."""
        wanted = {**self._pass_cost.wanted_bytes(rows), Part.EXPERT: 0.0}
        return missing_bytes(wanted, self._held, has_logits=True) / self._disk
