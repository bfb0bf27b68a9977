"""Engines of one size on a GPU, opened by options and plans, and jobs that they run."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpu.sizes import Size
from windlass.build.expected import EngineExpectation
from windlass.build.open import open_engine
from windlass.engine.engine import Engine
from windlass.engine.engine_stats import EngineStats
from windlass.engine.request import Request
from windlass.errors import BudgetError
from windlass.hardware.profile import HardwareProfile
from windlass.ids import HOST, Route
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.perf.sizes import Problem
from windlass.phases import PhaseStats, since
from windlass.plan import Plan
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for
from windlass.workload import Job, Workload

_SEED = 11
_DOWN = Route(HOST, "device")
Tokens = dict[str, tuple[int, ...]]
Requests = list[Request]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where engines are opened. `host_memory`: bytes. `profile`: of this machine."""

    folder: Path
    device: str
    dtype: str
    host_memory: int
    profile: HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A job that ran with weights in memory. `link_bytes`: to the device. `peak_bytes`: of the
    device, since the engine was opened."""

    tokens: Tokens
    phases: dict[str, PhaseStats]
    link_bytes: int
    link_rate: float
    peak_bytes: int
    plan: Plan
    predicted: dict[str, Any] | None = field(repr=False)

    def seconds(self, *, prompts: bool) -> float:
        every = self.phases.values()
        return sum(p.prompt_s if prompts else p.seconds - p.prompt_s for p in every)

    @property
    def decode_rate(self) -> float:
        """Tokens by second, each sequence's first apart."""
        tokens = sum(phase.output_tokens - phase.first_tokens for phase in self.phases.values())
        return tokens / self.seconds(prompts=False)

    @property
    def numbers(self) -> dict[str, Any]:
        """What is reported of each run. `link_share`: of the passes' time, at the link's rate."""
        total = sum(self.phases.values(), PhaseStats())
        prompts = self.seconds(prompts=True)
        above = self.plan.above
        assert above is not None, "a plan without the device"
        return {
            "decode_tokens_per_s": self.decode_rate,
            "prompt_tokens_per_s": total.prompt_tokens / prompts if prompts else 0.0,
            "max_num_seqs": self.plan.max_num_seqs,
            "micro_batch_tokens": self.plan.micro_batch_tokens,
            "passes": total.passes,
            "seconds": total.seconds,
            "link_gb": self.link_bytes / 1e9,
            "link_share": self.link_bytes / self.link_rate / total.seconds,
            "wait_share": total.wait_s / total.seconds,
            "peak_gib": self.peak_bytes / 2**30,
            "budget_gib": above.budget_bytes / 2**30,
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
        }

    @property
    def keeps_budget(self) -> bool:
        return self.plan.above is not None and self.peak_bytes <= self.plan.above.budget_bytes


class _Known:
    """A `JobSource` of lengths that are known."""

    def __init__(self, work: Workload) -> None:
        self._work = work

    def job(self, *args: object) -> Job:
        return Job(self._work, is_bounded=True)

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        return 0


class Runs:
    """Opens engines of a size, and plans for them."""

    def __init__(self, size: Size, place: Place) -> None:
        self.size, self.place = size, place
        self.problem: Problem | None = None  # that of the first plan

    def options(self, **changes: Any) -> EngineOptions:
        place, size = self.place, self.size
        values: dict[str, Any] = {
            "model": str(size.folder(place.folder)), "load_format": "dummy", "dtype": place.dtype,
            "device": place.device, "device_memory": size.device_memory,
            "host_memory": place.host_memory, "enable_prefix_caching": False,
            "generation_config": "vllm",
            "moe_expert_cache_size": size.layer_slots and str(size.layer_slots),
        }  # fmt: skip
        return EngineOptions(**{**values, **changes})

    def workload(self, count: int | None = None) -> Workload:
        size = self.size
        lengths = size.prompt_tokens, size.output_tokens
        return Workload.from_lengths(*lengths, count or size.sequences)

    def planned(self) -> Engine:
        """As the planner has it, for the job of the size."""
        size = self.size
        engine = open_engine(
            self.options(max_model_len=size.prompt_tokens + size.output_tokens, burst_tokens=0),
            source=_Known(self.workload()), profile=self.place.profile,
        )  # fmt: skip
        expectation = engine._expectation
        assert isinstance(expectation, EngineExpectation), "an engine that expects nothing"
        self.problem = expectation._chosen.problem
        return engine

    def replayed(self, plan: Plan, **changes: Any) -> Engine:
        return self.open(self.options(plan=plan, moe_expert_cache_size=None, **changes))

    def open(self, options: EngineOptions) -> Engine:
        """By its rates, for whatever comes."""
        return open_engine(options, profile=self.place.profile)

    def plan(self, like: Plan, *, device_memory: int | None = None, **changes: Any) -> Plan:
        """By plain rules, with the rows and sequences of `like`, one group, all attention on the
        device, prompts before decoding, but for `changes`; fewer sequences where not all fit."""
        problem = self.problem
        assert problem is not None and problem.sizes.device is not None, "nothing was planned yet"
        device = problem.sizes.device
        device = replace(
            device,
            budget_bytes=device_memory or device.budget_bytes,
            process_bytes=device.process_bytes + self.size.spare,
        )
        weighs = problem.sizes.process_bytes + self.size.spare
        sizes = replace(problem.sizes, device=device, process_bytes=weighs)
        values: dict[str, Any] = {
            "max_model_len": like.max_model_len,
            "max_num_batched_tokens": like.max_num_batched_tokens, "groups": 1,
            "host_attention": 0.0, "kv_offloading_share": 0.0,
            "schedule": "module-based", "mixed_prefill_tokens": 0,
            "burst_tokens": 0, "prefix_caching": False,
            "expert_slots": self.size.layer_slots and self.size.layer_slots * self.size.layers,
        }  # fmt: skip
        seqs = like.max_num_seqs
        while True:
            wanted = PlanConstraints(max_num_seqs=seqs, **{**values, **changes})
            try:
                return plan_for(problem.spec, sizes, self.place.host_memory, wanted)
            except BudgetError:  # `like` may keep some of them on the host
                if (seqs := seqs // 2) < like.max_num_seqs // 4 or not seqs:
                    raise

    def requests(self, count: int | None = None, *, output_tokens: int | None = None) -> Requests:
        """The first of the job, the same whatever their number."""
        size = self.size
        draw = torch.Generator().manual_seed(_SEED)
        limit = min(int(size.config["vocab_size"]), 32000)
        ids = torch.randint(3, limit, (size.sequences, size.prompt_tokens), generator=draw)
        made = []
        for i, prompt in enumerate(ids[: count or size.sequences].tolist()):
            params = SamplingParams(
                max_tokens=output_tokens or size.output_tokens, temperature=0.0, ignore_eos=True
            )
            made.append(Request(f"r{i}", tuple(prompt), params, f"r{i}"))
        return made

    def run(self, engine: Engine, requests: Requests, work: Workload | None = None) -> Ran:
        """The job, after a small one that brings weights into memory. `work`: to be compared with
        what was predicted."""
        run_all(engine, [replace(one, request_id=f"warm {one.request_id}") for one in requests[:8]])
        before = engine.stats()
        tokens = run_all(engine, requests)
        stats = engine.stats()
        phases = since(before.phases, stats.phases)
        check = engine.compare(phases, work, is_warm=True) if work else None
        down = self.place.profile.down
        assert down is not None, "a profile without a link"
        return Ran(
            tokens=tokens,
            phases=phases,
            link_bytes=_sent(stats) - _sent(before),
            link_rate=down.rate.best,
            peak_bytes=stats.peak_device_bytes,
            plan=engine.plan,
            predicted=check.to_json() if check else None,
        )


def _sent(stats: EngineStats) -> int:
    """Bytes to the device."""
    return stats.weights.link_bytes.get(_DOWN, 0)


def run_all(engine: Engine, requests: Iterable[Request]) -> Tokens:
    """Tokens by request."""
    for one in requests:
        engine.add(one)
    found: Tokens = {}
    while engine.has_work:
        for output in engine.step().finished:
            found[output.request_id] = tuple(output.outputs[0].token_ids)
    return found
