"""What a machine with a GPU would reach: disk -> host -> device, in the closed forms of
perf/frozen_gpu_tiers.py. This version does not run on one; the plan says what to expect of the
hardware and how to use it. Frozen: nothing is added here, and it goes the day the device has costs
on the clock.

Enumerated: weights on disk alone, KV cache on host or device, the host's share of attention,
groups in flight, sequences per call of attention, expert slots, prompts mixed into passes that
decode or computed before. What is left of the device holds weights. Objective: time of the job.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from windlass.hardware.profile import HardwareProfile
from windlass.ids import Part
from windlass.models.spec import Gqa, Mla, ModelSpec, Moe
from windlass.perf.estimate import steady_seconds
from windlass.perf.flops import (
    attention_flops,
    attention_matrices,
    expert_matrices,
    head_flops_per_token,
    shared_matrices,
)
from windlass.perf.frozen_gpu_tiers import (
    GpuRates,
    LayerShape,
    Share,
    balanced_host_share,
    layer_seconds,
    work,
)
from windlass.perf.pass_cost import kv_layers
from windlass.perf.sizes import Problem, Sizes
from windlass.units import GIB, MIB, format_bytes
from windlass.workload import Workload

_DEVICE_SHARE = 0.9  # of its memory that may be planned with
_STATES = GIB  # intermediate states on the device: of a call of attention, of experts, logits
_HIDDEN_COPIES = 3  # of a pass's hidden states
_KV_BUFFERS = 2  # of keys and values on their way, each for a call of attention
_DISK_STEPS = 20  # shares of the weights on disk that are tried
_GROUPS = (1, 2)
_MICRO = (64, 256)  # sequences per call of attention
_SLOTS = (2, 16)  # experts on their way
_PAGES = (16 * MIB, 64 * MIB)  # of copies of weights
_PREFILL_ROWS = (8192, 65536)  # of passes that compute prompts alone


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuModel:
    """A model of layers that are alike."""

    shape: LayerShape
    num_layers: int
    ends_bytes: float  # embedding and head: always on the device
    head_flops: float

    @property
    def weights(self) -> float:
        """Bytes of all layers."""
        return self.num_layers * self.shape.all_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that may be used. `has_disk`: whether weights may stay on disk."""

    device: float
    host: float
    has_disk: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """`resident` and `on_disk`: shares of the layers' weights on the device and on disk alone;
    `host_share`: of decode attention; `kv_on_device`: of keys and values. Bytes are within the
    memory that was given. `busy`: seconds of a decode or mixed pass by lane."""

    sequences: int
    rows: float  # of a pass that decodes
    prefill_rows: float  # of a pass that fills: prompts alone
    is_mixed: bool  # prompts of those that replace finished sequences go with decoding rows
    resident: float
    on_disk: float
    host_share: float
    kv_on_device: float
    groups: int
    micro_batch: int
    expert_slots: int
    page_bytes: int
    device_bytes: float
    host_bytes: float
    pass_s: float
    output_tokens_s: float
    total_s: float
    busy: dict[str, float]

    @property
    def bottleneck(self) -> str:
        return max(self.busy, key=lambda lane: self.busy[lane])


def plan_device(
    model: GpuModel, rates: GpuRates, memory: Memory, job: Workload, *, page_bytes: int = _PAGES[-1]
) -> DevicePlan | None:
    """The plan that ends the job soonest; None where a memory is too small."""
    planner = _Planner(model, rates, memory, job, page_bytes)
    return min(planner.plans(), key=lambda one: one.total_s, default=None)


class _Planner:
    def __init__(
        self, model: GpuModel, rates: GpuRates, memory: Memory, job: Workload, page_bytes: int
    ) -> None:
        self._model = model
        self._rates = rates
        self._memory = memory
        self._job = job
        self._page = page_bytes

    def plans(self) -> Iterator[DevicePlan]:
        """The best host share of every other choice that fits."""
        steps = range(_DISK_STEPS + 1) if self._memory.has_disk else range(1)
        for slots in _SLOTS:
            for micro in _MICRO:
                for step in steps:
                    for kv_on_device in (0.0, 1.0):
                        for mixed in (True, False):
                            share = self._fitting(slots, micro, step, kv_on_device, mixed=mixed)
                            if share is not None:
                                yield self._best(share, mixed=mixed)

    def _fitting(
        self, slots: int, micro: int, step: int, kv_on_device: float, *, mixed: bool
    ) -> Share | None:
        """As many sequences as the memories hold, and then as many weights on the device."""
        shape, layers = self._model.shape, self._model.num_layers
        job, on_disk = self._job, step / _DISK_STEPS
        output = job.mean_output_tokens
        held = job.mean_prompt_tokens + (output / 2 if mixed else output)
        each = layers * shape.kv * held
        fixed = self._fixed(slots, micro)
        alive, prompts, hidden = 0, 0.0, 0.0
        for _ in range(2):  # first without hidden states, then beside those of as many as that
            room = self._memory.device - fixed - hidden
            if not kv_on_device:
                held_there = self._resident(fixed, hidden)
                room = self._memory.host - self._host_weights(on_disk, held_there) - 2 * self._page
            alive = min(job.num_sequences, int(room / each)) if each else job.num_sequences
            if alive < 1:
                return None
            prompts = 0.0
            if mixed:
                prompts = alive * (job.mean_prompt_tokens - job.mean_shared_tokens) / output
            hidden = _HIDDEN_COPIES * (alive + prompts) * shape.hidden
        resident = self._resident(fixed, kv_on_device * alive * each + hidden)
        host = self._host_weights(on_disk, resident) + (1 - kv_on_device) * alive * each
        if resident < 0 or host + 2 * self._page > self._memory.host:
            return None
        return Share(
            sequences=alive, prefill=prompts, context=job.mean_prompt_tokens + output / 2,
            prompt_context=(job.mean_prompt_tokens + job.mean_shared_tokens) / 2,
            resident=resident,
            on_disk=min(on_disk, 1 - resident), kv_on_device=kv_on_device, micro=micro,
            expert_slots=slots,
        )  # fmt: skip

    def _fixed(self, slots: int, micro: int) -> float:
        """Bytes of the device beside resident weights, keys and values and hidden states."""
        shape = self._model.shape
        staging = _KV_BUFFERS * micro * self._job.longest * shape.kv
        buffers = slots * shape.expert + 2 * (shape.attention + shape.shared)
        return self._model.ends_bytes + buffers + staging + _STATES

    def _resident(self, fixed: float, other: float) -> float:
        """Share of the weights that what is left holds; negative where there is too little."""
        left = self._memory.device - fixed - other
        return min(1.0, left / self._model.weights)

    def _host_weights(self, on_disk: float, resident: float) -> float:
        return max(0.0, 1 - on_disk - max(0.0, resident)) * self._model.weights

    def _best(self, share: Share, *, mixed: bool) -> DevicePlan:
        """The best host share and number of groups. With keys and values on the device, the host
        has none to look at."""
        shape, plans = self._model.shape, []
        for own in (replace(share, groups=groups) for groups in _GROUPS):
            omegas = [i / 10 for i in range(11)] + [balanced_host_share(shape, self._rates, own)]
            found = [
                replace(own, host_attention=omega)
                for omega in ([0.0] if share.kv_on_device else omegas)
            ]
            best = min(found, key=lambda one: layer_seconds(shape, self._rates, one))
            plans.append(self._plan(best, mixed=mixed))
        return min(plans, key=lambda one: one.total_s)

    def _plan(self, share: Share, *, mixed: bool) -> DevicePlan:
        pass_s = self._seconds(share)
        totals = {
            rows: steady_seconds(
                self._job, int(share.sequences), rows,
                lambda decode, prefill: self._seconds(
                    replace(share, sequences=decode, prefill=prefill, parks_hidden=not decode)
                ),
            )
            for rows in ({share.rows, *_PREFILL_ROWS} if mixed else _PREFILL_ROWS)
        }  # fmt: skip
        rows = min(totals, key=lambda one: totals[one])
        shape, layers = self._model.shape, self._model.num_layers
        asked = work(shape, self._rates, share)
        kv = self._memory_of_kv(share)
        fixed = self._fixed(int(share.expert_slots), int(share.micro))
        device = fixed + share.resident * self._model.weights + share.kv_on_device * kv
        host = self._host_weights(share.on_disk, share.resident) + 2 * self._page
        return DevicePlan(
            sequences=int(share.sequences), rows=share.rows, prefill_rows=rows, is_mixed=mixed,
            resident=share.resident, on_disk=share.on_disk, host_share=share.host_attention,
            kv_on_device=share.kv_on_device, groups=share.groups, micro_batch=int(share.micro),
            expert_slots=int(share.expert_slots), page_bytes=self._page,
            device_bytes=device + _HIDDEN_COPIES * share.rows * shape.hidden,
            host_bytes=host + (1 - share.kv_on_device) * kv, pass_s=pass_s,
            output_tokens_s=share.sequences / pass_s, total_s=totals[rows],
            busy={
                "down": layers * asked.down, "up": layers * asked.up, "disk": layers * asked.disk,
                "host": layers * asked.host_attention,
                "device": layers * (asked.attention + asked.experts),
            },
        )  # fmt: skip

    def _memory_of_kv(self, share: Share) -> float:
        output = self._job.mean_output_tokens
        held = self._job.mean_prompt_tokens + (output / 2 if share.prefill else output)
        return share.sequences * self._model.num_layers * self._model.shape.kv * held

    def _seconds(self, share: Share) -> float:
        """One pass: its layers, the first page of each drain, the head."""
        if share.rows <= 0:
            return 0.0
        layer = layer_seconds(self._model.shape, self._rates, share)
        head = self._model.head_flops * max(1.0, share.sequences) / self._rates.dense(share.rows)
        fill = self._page / self._rates.down if share.resident < 1 else 0.0
        return self._model.num_layers * layer + head + fill


def model_of(spec: ModelSpec, sizes: Sizes) -> GpuModel:
    """The model with its layers taken for alike: those with experts."""
    layer = next(i for i, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe))
    block = spec.blocks[layer]
    assert isinstance(block.ffn, Moe), "chosen as one"
    parts, slots = sizes.num_parts, sizes.slot_bytes
    own, shared = attention_matrices(spec, layer), shared_matrices(spec, layer)
    dense = slots[Part.BLOCK]
    attention = block.attention
    width = attention.num_heads * attention.head_dim if isinstance(attention, Gqa) else 0
    if isinstance(attention, Mla):
        width = attention.num_heads * (attention.kv_lora_rank + attention.rope.dim)
    shape = LayerShape(
        attention=dense * own / (own + shared), shared=dense * shared / (own + shared),
        expert=slots[Part.EXPERT], num_experts=block.ffn.num_experts, top_k=block.ffn.top_k,
        kv=sizes.bytes_per_token / max(1, kv_layers(spec)), query=2 * 2 * width,
        hidden=2 * spec.hidden_size, attention_flops=2 * own, shared_flops=2 * shared,
        expert_flops=2 * expert_matrices(spec, layer), score_flops=attention_flops(attention, 1),
    )  # fmt: skip
    ends = sum(parts.get(p, 0) * slots.get(p, 0) for p in (Part.EMBED, Part.HEAD))
    return GpuModel(
        shape=shape, num_layers=len(spec.blocks), ends_bytes=ends,
        head_flops=head_flops_per_token(spec),
    )  # fmt: skip


def rates_of(profile: HardwareProfile, kind: str, page_bytes: int) -> GpuRates:
    """Of a machine with a device, for weights of `kind` in copies of `page_bytes`."""
    device, down, up = profile.device, profile.down, profile.up
    assert device is not None and down is not None and up is not None, "no device"
    return GpuRates(
        down=down.rate.at(page_bytes), up=up.rate.best, disk=profile.disk.best,
        device_memory=device.memory_rate, host_memory=profile.host.memory_rate,
        host_attention=profile.host.decode_attention,
        expert=device.experts.get(kind, device.experts["bfloat16"]).at,
        dense=device.dense.get(kind, device.dense["bfloat16"]).at,
        attention=device.prefill_attention, call_s=device.call_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """The plan, and by how much one more GiB of host and of device memory would speed it up."""

    name: str
    plan: DevicePlan | None  # None: a memory is too small
    memory: int
    host_gain: float
    device_gain: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        head = f"with {self.name} (closed form; this version does not run on it yet)"
        found = self.plan
        if found is None:
            return [f"{head}: its memory, or the host's, is too small"]
        busy = ", ".join(f"{n} {100 * s / found.pass_s:.0f} %" for n, s in found.busy.items() if s)
        place = "device" if found.kv_on_device else "host"
        mixed = "mixed into" if found.is_mixed else "computed before"
        return [
            f"{head}: {found.sequences} sequences and {found.rows:.0f} tokens per pass, prompts"
            f" {mixed} passes that decode; KV cache on the {place},"
            f" {100 * found.host_share:.0f} % of decode attention on the host in"
            f" {found.groups} group{'s' if found.groups > 1 else ''}, calls of"
            f" {found.micro_batch} sequences",
            f"  device: {format_bytes(found.device_bytes)} of {format_bytes(self.memory)}:"
            f" {100 * found.resident:.0f} % of the weights, {found.expert_slots} experts on their"
            f" way in copies of {format_bytes(found.page_bytes)}; {100 * found.on_disk:.0f} % of"
            " the weights on disk alone",
            f"  {found.pass_s:.3g} s per pass, {found.output_tokens_s:.4g} tokens generated/s;"
            f" bottleneck: {found.bottleneck}; busy: {busy}",
            f"  one more GiB: of host memory {100 * self.host_gain:+.1f} %, of device memory"
            f" {100 * self.device_gain:+.1f} %",
        ]


def report_device(
    problem: Problem,
    job: Workload,
    host_memory: int,
    device_memory: int | None,
) -> DeviceReport:
    """What the machine's device would bring to the job."""
    sizes, profile = problem.sizes, problem.profile
    assert profile.device is not None, "asked of a machine without a device"
    kind, model = sizes.weight_kinds.get(Part.EXPERT, "bfloat16"), model_of(problem.spec, sizes)
    device = device_memory or int(_DEVICE_SHARE * profile.device.memory_bytes)
    memory = Memory(device=device, host=host_memory - sizes.process_bytes)

    def best(memory: Memory, pages: tuple[int, ...]) -> DevicePlan | None:
        plans = [
            plan_device(model, rates_of(profile, kind, page), memory, job, page_bytes=page)
            for page in pages
        ]
        return min((one for one in plans if one), key=lambda one: one.total_s, default=None)

    def gain(more: Memory) -> float:
        richer = None if found is None else best(more, (found.page_bytes,))
        return 0.0 if richer is None or found is None else found.total_s / richer.total_s - 1

    found = best(memory, _PAGES)
    return DeviceReport(
        name=profile.device.name,
        plan=found,
        memory=device,
        host_gain=max(0.0, gain(replace(memory, host=memory.host + GIB))),
        device_gain=max(0.0, gain(replace(memory, device=memory.device + GIB))),
    )
