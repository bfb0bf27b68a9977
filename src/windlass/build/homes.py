"""Where keys, values, attention and experts are: of the device that computes and, where a plan
gives it a share, of the host."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from windlass.build.checkpoint_sizes import CACHE_DTYPES, cache_shapes
from windlass.build.tiers import Tiers
from windlass.device import cuda
from windlass.device.base import Allocator, Device
from windlass.ids import Home
from windlass.kernels.interface import Kernels
from windlass.kernels.select import choose_kernels, host_backend
from windlass.kvcache.kv_cache import KvCache, PagedShape, StateSlots
from windlass.kvcache.kv_tiers import KvTiers
from windlass.kvcache.staging import Reached, StreamedKv, staged_bytes_per_token
from windlass.models.spec import ModelSpec
from windlass.options import EngineOptions
from windlass.plan import Plan
from windlass.runtime.host_attention import HostAttention, Staging
from windlass.runtime.host_experts import HostExperts
from windlass.runtime.kv_rounds import half_pages
from windlass.runtime.kv_stream import KvStream, Way
from windlass.runtime.machine import Machine
from windlass.weights.store import WeightStore
from windlass.weights.tier_supply import TierSupply


def open_kv(spec: ModelSpec, plan: Plan, memory: Allocator, host: Device) -> KvTiers:
    """Of the device that computes, in `memory`, and of the host, where sequences have their home
    there, or their keys and values alone. All recurrent states are the device's."""
    shapes, pages = cache_shapes(spec), plan.pages
    make = partial(KvCache, dtype=CACHE_DTYPES[plan.kv_cache_dtype], page_tokens=plan.page_tokens)
    states = StateSlots(plan.top.state_slots, plan.kept_states)
    device = make(shapes, memory, num_pages=pages.get(Home.DEVICE, 0), states=states)
    paged = [one if isinstance(one, PagedShape) else None for one in shapes]

    def below(home: Home, own: Allocator) -> KvCache | None:
        count = pages.get(home)
        return None if count is None else make(paged, own, num_pages=count)

    return KvTiers(device, below(Home.HOST, host), below(Home.STREAMED, Reached(host)))


def choose_host_kernels(plan: Plan, options: EngineOptions, threads: int) -> Kernels | None:
    """What the host attends and computes experts with, where the plan has it do so."""
    if not plan.host_computes:
        return None
    is_bf16 = options.dtype == "bfloat16"
    backend = host_backend(options.moe_backend)
    return choose_kernels(backend, threads=threads, bf16_activations=is_bf16)


def host_fingerprint(plan: Plan, kernels: Kernels | None) -> dict[str, object]:
    """What of it would change results, beside a device: which sequences the host attends to, which
    experts it computes, and how; how the device computes those of generated rows."""
    if plan.above is None:
        return {}
    found: dict[str, object] = {"host_attention": plan.host_attention}
    if plan.host_experts:  # journals of before do not speak of it
        found["host_experts"] = plan.host_experts
    if plan.generated_experts != "tiles":
        found["generated_experts"] = plan.generated_experts
    return found if kernels is None else {**found, "host_kernels": kernels.name}


def open_host(
    machine: Machine, spec: ModelSpec, plan: Plan, tiers: Tiers, rest: tuple[KvTiers, WeightStore],
    opened: ExitStack,
) -> Machine:  # fmt: skip
    """`machine` with the kernels that the plan wants for generated rows, with the host's part of
    attention and of experts, which share a thread of its own, and with what attends to keys and
    values that the host keeps, where the plan has any."""
    machine = replace(machine, by_row=plan.generated_experts == "rows")
    kv, weights = rest
    if plan.kv_offloading_share and tiers.above is not None:
        stream = _open_stream(machine, spec, plan, tiers, rest)
        machine = replace(machine, stream=stream)
    if tiers.host_kernels is None or tiers.above is None:
        return machine
    kernels, above, tracer = tiers.host_kernels, tiers.above, machine.tracer
    worker = ThreadPoolExecutor(1, "host attention")
    opened.callback(worker.shutdown, cancel_futures=True)
    if plan.host_attention:
        store, staging = kv.of(Home.HOST), Staging.of(spec, plan)
        attention = HostAttention(kernels, store, above, worker, staging, tracer)
        machine = replace(machine, host=attention)
    if plan.host_experts:
        supply = weights.supply
        assert isinstance(supply, TierSupply), "experts of the host without its slots"
        experts = HostExperts(spec, plan, supply.store, (kernels, above, worker), tracer)
        machine = replace(machine, experts=experts, replays=False)
    return machine


def _open_stream(
    machine: Machine, spec: ModelSpec, plan: Plan, tiers: Tiers, rest: tuple[KvTiers, WeightStore]
) -> KvStream:
    kv, weights = rest
    supply, above = weights.supply, tiers.above
    assert isinstance(supply, TierSupply) and above is not None, "a device without a link to it"
    shapes, ram = cache_shapes(spec), kv.of(Home.STREAMED)
    each = staged_bytes_per_token(shapes, ram.dtype)
    pages = half_pages(each, plan.page_tokens, plan.max_model_len)
    streamed = StreamedKv(shapes, ram, tiers.host, above, num_pages=pages)
    way = Way(supply.queue, supply.route, cuda.STEP_BYTES)
    return KvStream(spec, machine.kernels, streamed, way)
