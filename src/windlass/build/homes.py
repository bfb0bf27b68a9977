"""Where keys, values, attention and experts are: of the device that computes and, where a plan
gives it a share, of the host."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from windlass.build.checkpoint_sizes import CACHE_DTYPES, cache_shapes
from windlass.build.tiers import Tiers
from windlass.device.base import Allocator
from windlass.ids import Home
from windlass.kernels.interface import Kernels
from windlass.kernels.select import choose_kernels
from windlass.kvcache.kv_cache import KvCache, PagedShape
from windlass.kvcache.kv_tiers import KvTiers
from windlass.models.spec import ModelSpec
from windlass.options import EngineOptions
from windlass.plan import Plan
from windlass.runtime.host_attention import HostAttention, Staging
from windlass.runtime.host_experts import HostExperts
from windlass.runtime.machine import Machine
from windlass.weights.store import WeightStore
from windlass.weights.tier_supply import TierSupply


def open_kv(spec: ModelSpec, plan: Plan, memory: Allocator, host: Allocator) -> KvTiers:
    """Of the device that computes, in `memory`, and of the host, where sequences have their home
    there. All recurrent states are the device's."""
    shapes, pages = cache_shapes(spec), {home: tier.kv_pages for home, tier in plan.homes.items()}
    make = partial(KvCache, dtype=CACHE_DTYPES[plan.kv_cache_dtype], page_tokens=plan.page_tokens)
    device = make(
        shapes, memory, num_pages=pages.get(Home.DEVICE, 0), state_slots=plan.top.state_slots
    )
    if Home.HOST not in pages:
        return KvTiers(device)
    paged = [one if isinstance(one, PagedShape) else None for one in shapes]
    return KvTiers(device, make(paged, host, num_pages=pages[Home.HOST], state_slots=0))


def choose_host_kernels(plan: Plan, options: EngineOptions, threads: int) -> Kernels | None:
    """What the host attends and computes experts with, where the plan has it do so."""
    if not plan.host_computes:
        return None
    is_bf16 = options.dtype == "bfloat16"
    return choose_kernels(options.moe_backend, threads=threads, bf16_activations=is_bf16)


def host_fingerprint(plan: Plan, kernels: Kernels | None) -> dict[str, object]:
    """What of it would change results: which sequences the host attends to, which experts it
    computes, and how."""
    if plan.above is None:
        return {}
    found: dict[str, object] = {"host_attention": plan.host_attention}
    if plan.host_experts:  # journals of before do not speak of it
        found["host_experts"] = plan.host_experts
    return found if kernels is None else {**found, "host_kernels": kernels.name}


def open_host(
    machine: Machine, spec: ModelSpec, plan: Plan, tiers: Tiers, rest: tuple[KvTiers, WeightStore],
    opened: ExitStack,
) -> Machine:  # fmt: skip
    """`machine` with the host's part of attention and of experts, which share a thread of its own,
    where the plan has any."""
    if tiers.host_kernels is None or tiers.above is None:
        return machine
    kv, weights = rest
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
