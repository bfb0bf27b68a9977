"""What is expected of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from windlass.hardware.profile import Curve, HardwareProfile, Processor
from windlass.models.spec import ModelSpec
from windlass.perf.estimate import Estimate, estimate
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import Seen
from windlass.perf.sizes import Sizes
from windlass.plan import Plan
from windlass.schedule.batch import Segment
from windlass.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a run was planned for."""

    spec: ModelSpec
    sizes: Sizes
    plan: Plan
    profile: HardwareProfile
    workload: Workload


def predict(problem: Problem) -> Estimate:
    """What is expected of the problem; sequences longer than the plan allows count as cut."""
    own = _as_planned(problem)
    return estimate(own.spec, own.sizes, own.plan, own.profile, own.workload)


def _as_planned(problem: Problem) -> Problem:
    """With the workload as its plan takes it: sequences cut, prompts shared or not."""
    plan = problem.plan
    work = problem.workload.sharing(plan.prefix_caching).shortened(plan.max_model_len)
    return replace(problem, workload=work)


def run_of(segments: Sequence[Segment]) -> PassRun:
    """The rows of a pass and the positions that they see, as `compose` has them."""
    seen = Seen(0, 0.0, 0, 0.0)
    for segment in segments:
        count = segment.num_rows
        positions = count * segment.first_position + count * (count + 1) / 2
        own = (0, 0.0, count, positions) if segment.is_prompt else (count, positions, 0, 0.0)
        seen += Seen(*own)
    return PassRun(1, seen, sum(segment.wants_logits for segment in segments))


def scaled(profile: HardwareProfile, *, disk: float, host: float) -> HardwareProfile:
    """The machine with so much higher rates of its disk and its processor."""
    return replace(
        profile, disk=_scaled_curve(profile.disk, disk), host=_scaled_host(profile.host, host)
    )


def _scaled_host(host: Processor, factor: float) -> Processor:
    return replace(
        host,
        memory_rate=factor * host.memory_rate,
        experts={kind: _scaled_curve(curve, factor) for kind, curve in host.experts.items()},
        dense={kind: _scaled_curve(curve, factor) for kind, curve in host.dense.items()},
        decode_attention=factor * host.decode_attention,
        prefill_attention=factor * host.prefill_attention,
        row_rate=factor * host.row_rate,
        call_s=host.call_s / factor,
        expert_s=host.expert_s / factor,
    )


def _scaled_curve(curve: Curve, factor: float) -> Curve:
    return Curve(tuple((size, factor * rate) for size, rate in curve.points))
