"""What a machine with a GPU would reach: disk -> host -> device in closed form, as a steady state
of mixed passes. This version does not run on one; the numbers say what to expect of the hardware.

The cost models of MoE-Gen (arXiv 2503.09716), MoE-Lightning (2411.11217) and MoE-Lens (2504.09345)
together: each pass streams what is not resident over the link, experts run once over all rows, a
share of decode attention runs on the host, everything overlaps. Seconds and bytes.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from windlass.hardware.profile import Curve, HardwareProfile
from windlass.ids import Part
from windlass.planner.budget import Sizes
from windlass.planner.reckon import kv_layers
from windlass.planner.roofline import active_experts
from windlass.spec.cost import (
    attention_flops,
    attention_matrices,
    expert_matrices,
    shared_matrices,
)
from windlass.spec.model import ModelSpec, Moe
from windlass.units import GIB, format_bytes
from windlass.workload import Workload

_DEVICE_SHARE = 0.9  # of its memory that may be planned with
_STATES = GIB  # intermediate states on the device
_DISK_STEPS = 40  # shares of the weights on disk that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """A model of layers that are alike. Bytes as stored, FLOPs of one row in one layer."""

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: float
    dense_bytes: float  # attention and shared expert
    kv_bytes: float  # of a position
    ends_bytes: float  # embedding and head: always on the device
    expert_flops: float
    dense_flops: float
    position_flops: float  # of attention, for each position seen

    @property
    def layer_bytes(self) -> float:
        return self.dense_bytes + self.num_experts * self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Memory that may be used, and what moves and computes how fast; `disk` None: none is used."""

    device_bytes: float
    host_bytes: float
    link: float
    flops: Curve  # over rows of an expert
    device_memory: float
    host_attention: float  # bytes/s of keys and values
    disk: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """`resident` and `on_disk`: shares of the layers' weights on the device and on disk alone;
    `host_share`: of decode attention. `busy`: seconds of a pass by lane."""

    sequences: int
    rows: float  # of a pass: all sequences, and prompts of those that replace finished ones
    resident: float
    on_disk: float
    host_share: float
    pass_s: float
    output_tokens_s: float
    busy: dict[str, float]

    @property
    def binds(self) -> str:
        return max(self.busy, key=lambda lane: self.busy[lane])


def plan_device(
    layers: Layers, rates: Rates, prompt: float, output: float, *, mixed: bool = True, most: int = 0
) -> DevicePlan | None:
    """The plan of most generated tokens/s, for prompts and answers of mean lengths; None where the
    device is too small for the parts that must lie there, or the host for one sequence. `mixed`:
    prompts are computed in passes that also decode. `most`: sequences that there are, if positive.
    """
    weights = layers.num_layers * layers.layer_bytes
    fixed = layers.ends_bytes + 4 * layers.expert_bytes + 2 * layers.dense_bytes + _STATES
    if rates.device_bytes < fixed:
        return None
    resident = min(1.0, (rates.device_bytes - fixed) / weights)
    shares = [i / _DISK_STEPS * (1 - resident) for i in range(_DISK_STEPS + 1)]
    found = [
        _with_share(layers, rates, (prompt, output), resident, share, mixed=mixed, most=most)
        for share in (shares if rates.disk else [0.0])
    ]
    plans = [one for one in found if one is not None]
    return max(plans, key=lambda one: one.output_tokens_s) if plans else None


def _with_share(
    layers: Layers, rates: Rates, lengths: tuple[float, float], resident: float, on_disk: float,
    *, mixed: bool, most: int,
) -> DevicePlan | None:  # fmt: skip
    prompt, output = lengths
    count, weights = layers.num_layers, layers.num_layers * layers.layer_bytes
    # finished sequences are replaced at once: half of the answers is there on average
    held = prompt + (output / 2 if mixed else output)
    room = rates.host_bytes - (1 - resident - on_disk) * weights
    sequences = int(room / (layers.kv_bytes * count * held))
    sequences = min(sequences, most) if most else sequences
    if sequences < 1:
        return None
    rows = sequences * (1 + prompt / output if mixed else 1.0)
    context = prompt + output / 2
    seen = sequences * context * layers.kv_bytes  # of a layer
    active = active_experts(layers.num_experts, layers.top_k, rows)
    streamed = (1 - resident) * (layers.dense_bytes + active * layers.expert_bytes)
    host_share = min(1.0, (streamed + seen) / (seen * (1 + rates.link / rates.host_attention)))
    flops = rates.flops.at(rows * layers.top_k / layers.num_experts)
    work = rows * (layers.dense_flops + layers.top_k * layers.expert_flops)
    read = layers.dense_bytes + active * layers.expert_bytes
    attention = max(sequences * layers.position_flops * context / flops, seen / rates.device_memory)
    busy = {
        "down": (streamed + (1 - host_share) * seen) / rates.link,
        "host": host_share * seen / rates.host_attention,
        "device": max(work / flops, read / rates.device_memory) + (1 - host_share) * attention,
        "disk": on_disk * layers.layer_bytes / rates.disk if rates.disk else 0.0,
    }
    pass_s = count * max(busy.values())
    return DevicePlan(
        sequences=sequences,
        rows=rows,
        resident=resident,
        on_disk=on_disk,
        host_share=host_share,
        pass_s=pass_s,
        output_tokens_s=sequences / pass_s,
        busy={lane: count * seconds for lane, seconds in busy.items()},
    )


def layers_of(spec: ModelSpec, sizes: Sizes) -> Layers:
    """The model with its layers taken for alike: those with experts, in the mean."""
    moe = [i for i, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe)]
    layer = moe[0]
    ffn = spec.blocks[layer].ffn
    assert isinstance(ffn, Moe), "chosen as one"
    parts, slots = sizes.num_parts, sizes.slot_bytes
    ends = sum(parts.get(p, 0) * slots.get(p, 0) for p in (Part.EMBED, Part.HEAD))
    dense = attention_matrices(spec, layer) + shared_matrices(spec, layer)
    return Layers(
        num_layers=len(spec.blocks),
        num_experts=ffn.num_experts,
        top_k=ffn.top_k,
        expert_bytes=slots[Part.EXPERT],
        dense_bytes=slots[Part.BLOCK],
        kv_bytes=max(1.0, sizes.bytes_per_token / max(1, kv_layers(spec))),
        ends_bytes=ends,
        expert_flops=2 * expert_matrices(spec, layer),
        dense_flops=2 * dense,
        position_flops=attention_flops(spec.blocks[layer].attention, 1),
    )


def rates_of(
    profile: HardwareProfile, kind: str, host_memory: int, device_memory: int | None
) -> Rates:
    """Of a machine with a device. `device_memory`: that may be used, None for most of it."""
    device, down = profile.device, profile.down
    assert device is not None and down is not None, "asked of a machine without a device"
    return Rates(
        device_bytes=device_memory or _DEVICE_SHARE * device.memory_bytes,
        host_bytes=host_memory,
        link=down.rate.best,
        flops=device.experts.get(kind, device.experts["bfloat16"]),
        device_memory=device.memory_rate,
        host_attention=profile.host.decode_attention,
        disk=profile.disk.best,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """The plan, and by how much one more GiB of host and of device memory would speed it up."""

    name: str
    plan: DevicePlan | None  # None: a memory is too small
    holds: dict[str, int]  # bytes of the device by what they are
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
        holds = ", ".join(f"{what} {format_bytes(size)}" for what, size in self.holds.items())
        busy = ", ".join(f"{n} {100 * s / found.pass_s:.0f} %" for n, s in found.busy.items() if s)
        return [
            f"{head}: {found.sequences} sequences and {found.rows:.0f} rows per pass;"
            f" {100 * found.on_disk:.0f} % of the weights on disk alone,"
            f" {100 * found.host_share:.0f} % of decode attention on the host",
            f"  device: {format_bytes(sum(self.holds.values()))} of {format_bytes(self.memory)}:"
            f" {holds}",
            f"  {found.pass_s:.3g} s per pass, {found.output_tokens_s:.4g} tokens generated/s with"
            f" prompts computed beside them; binds: {found.binds}; busy: {busy}",
            f"  one more GiB: of host memory {100 * self.host_gain:+.1f} %, of device memory"
            f" {100 * self.device_gain:+.1f} %",
        ]


def report_device(
    spec: ModelSpec,
    sizes: Sizes,
    profile: HardwareProfile,
    work: Workload,
    host_memory: int,
    device_memory: int | None,
) -> DeviceReport:
    """What the device of `profile` would bring to the job."""
    assert profile.device is not None, "asked of a machine without a device"
    kind = sizes.weight_kinds.get(Part.EXPERT, "bfloat16")
    layers, rates = layers_of(spec, sizes), rates_of(profile, kind, host_memory, device_memory)

    def best(rates: Rates) -> DevicePlan | None:
        lengths = work.mean_prompt_tokens, work.mean_output_tokens
        return plan_device(layers, rates, *lengths, most=work.num_sequences)

    def gain(more: DevicePlan | None) -> float:
        if found is None or more is None:
            return 0.0
        return max(0.0, more.output_tokens_s / found.output_tokens_s - 1)

    found = best(rates)
    weights = layers.num_layers * layers.layer_bytes
    holds = {
        "embedding and head": round(layers.ends_bytes),
        "resident weights": round(weights * (found.resident if found else 0.0)),
        "buffers of weights": round(4 * layers.expert_bytes + 2 * layers.dense_bytes),
        "states": _STATES,
    }
    return DeviceReport(
        name=profile.device.name,
        plan=found,
        holds=holds if found else {},
        memory=round(rates.device_bytes),
        host_gain=gain(best(replace(rates, host_bytes=rates.host_bytes + GIB))),
        device_gain=gain(best(replace(rates, device_bytes=rates.device_bytes + GIB))),
    )
