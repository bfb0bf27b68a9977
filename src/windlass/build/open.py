"""The composition root: from options to a running engine. The only place that sees all layers."""

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from windlass.build.checkpoint_sizes import (
    CACHE_DTYPES,
    cache_dtype,
    long_rope_after,
    pass_shape,
    sizes_of,
    useful_threads,
    wanted_of,
)
from windlass.build.device_choice import CpuIsSooner, beside_cpu
from windlass.build.devices import limit, open_gpu, sizes_above, uses_gpu
from windlass.build.expected import EngineExpectation
from windlass.build.foresight import follows_sequences, make_outfit
from windlass.build.homes import choose_host_kernels, host_fingerprint, open_host, open_kv
from windlass.build.host_budget import check_budget, default_budget, largest_budget
from windlass.build.routers import read_routers
from windlass.build.tiers import Tiers, check_tiers, open_weights
from windlass.checkpoint.folder import CheckpointFolder, read_model
from windlass.device.base import Device, room_on_device
from windlass.device.cpu import CpuDevice
from windlass.device.host_memory import LARGE_BYTES, HostAllocator, return_freed_memory
from windlass.device.process_memory import available_bytes, resident_bytes
from windlass.engine.admission import Admission, Decoding
from windlass.engine.bursts import Turns
from windlass.engine.drafting import Drafting
from windlass.engine.engine import Engine, EngineParts, EngineSetup
from windlass.engine.grammars import Grammars
from windlass.engine.layer_drafts import LayerDrafts
from windlass.engine.pace import Pace
from windlass.engine.request_rules import RequestRules
from windlass.engine.tokenizer import Tokenizer
from windlass.engine.tokenizer import load as load_tokenizer
from windlass.errors import BudgetError, UsageError
from windlass.forecast.learned import source_words
from windlass.hardware.assumed import assumed_profile
from windlass.hardware.profile import HardwareProfile
from windlass.kernels.interface import Kernels
from windlass.kernels.select import choose_kernels, host_backend
from windlass.options import (
    AUTO,
    CPU,
    EngineOptions,
    checkpoint_stamp,
    default_params,
    read_plan,
    resolve_model,
)
from windlass.params import SamplingParams
from windlass.perf.sizes import Backend, DeviceSizes, Problem
from windlass.plan import Plan
from windlass.planner.choose import Chosen, choose_plan, plain_plan
from windlass.planner.constraints import PlanConstraints
from windlass.planner.validate import validate_plan
from windlass.prefetch.guard import WindowGuard
from windlass.runtime.host import DraftingHostRuntime, HostRuntime
from windlass.runtime.machine import Machine
from windlass.trace import Tracer
from windlass.units import format_bytes
from windlass.version import VERSION
from windlass.workload import Job

_BURST_STRETCHES = 2  # of passes, that bursts and lockstep are compared over


_logger = logging.getLogger(__name__)


class JobSource(Protocol):
    """What an engine will run, as soon as its tokens can be counted."""

    def job(self, tokenizer: Tokenizer, params: SamplingParams, longest: int) -> Job | None:
        """Lengths of all sequences; None if there is nothing to plan for. `params`: of requests
        that name none. `longest`: tokens of the longest sequence that the model allows."""
        ...

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        """What requests take beside the engine: the largest while it is read and tokenised, and
        grammars of answers. `vocab_size`: of the tokenizer."""
        ...


def open_engine(
    options: EngineOptions,
    *,
    device: Device | None = None,
    above: Device | None = None,
    kernels: Kernels | None = None,
    source: JobSource | None = None,
    profile: HardwareProfile | None = None,
) -> Engine:
    """Everything between options and the first step; nothing is read but headers and tokenizer.

    `device`: where weights and all that passes work on are; the host if None. `above`: where they
    are instead, copied from `device` as they are wanted; the plan that `options` name has a tier of
    that name. Without both, `options` say whether a GPU is above the host; with "auto" the CPU
    computes alone where no plan fits a GPU, or measured rates say that the job ends sooner so, and
    a line of the log says why. The engine closes all of them; so does a failure here.
    `kernels`: what computes; as the options say if None.
    `source`: what to plan for. `profile`: the machine it runs on, to be found before kernels are
    chosen here; one like this is assumed if None.

    Sets how torch and malloc work in this process, and logs what it sets (level INFO).
    """
    check_budget(options.host_memory)
    found = _Given(device, above, kernels, source, profile)
    try:
        return _open(options, found)
    except CpuIsSooner as reason:
        _logger.warning("device auto: %s", reason)
    except BudgetError as error:
        is_given = device is not None or above is not None or options.kv_offloading_share
        if is_given or not uses_gpu(options):
            raise
        _logger.warning("device auto: the CPU computes alone: %s", error)
    return _open(replace(options, device=CPU, device_memory=None), found)


class _Given(NamedTuple):
    """What `open_engine` was given beside options."""

    device: Device | None
    above: Device | None
    kernels: Kernels | None
    source: JobSource | None
    profile: HardwareProfile | None


def _open(options: EngineOptions, found: _Given) -> Engine:
    device, above = found.device, found.above
    return_freed_memory()
    with ExitStack() as opened:
        for own in (device, above):
            if own is not None:
                opened.callback(own.close)
        tracer = Tracer(options.trace)
        opened.callback(tracer.close)
        model = read_model(options, opened)
        threads = options.threads or useful_threads(model)
        gpu = open_gpu(options, tracer) if device is None and above is None else None
        if gpu is not None:
            above = gpu.device
            opened.callback(above.close)
        before = torch.get_num_threads()
        backend = options.moe_backend if gpu is None else host_backend(options.moe_backend)
        of_host = found.kernels or choose_kernels(  # the host's, which may attend beside a device
            backend, threads=threads, bf16_activations=options.dtype == "bfloat16"
        )
        kernels = of_host if gpu is None else gpu.make_kernels()
        _logger.info(
            "set for the whole process: torch computes with %d threads (before: %d), malloc gives"
            " what is freed above %s back to the system",
            torch.get_num_threads(), before, format_bytes(LARGE_BYTES),
        )  # fmt: skip
        memory = above or device or HostAllocator()
        with memory.streams.on(memory.streams.compute):  # the BLAS allocates its buffers
            kernels.linear(memory.zeros(4, 64), memory.zeros(64, 64))
        if options.plan is not None:
            check_tiers(read_plan(options.plan), above)
        sizes = sizes_above(gpu, model, options, kernels.name)
        setup = _setup(options, model, Backend(of_host.name, threads), sizes, found)
        check_tiers(setup.plan, above)
        if gpu is not None:
            limit(gpu, setup.plan)
            setup = replace(setup, notes=(f"plan: computes on {gpu.words}", *setup.notes))
        if device is None:
            readers = setup.plan.read_threads
            device = CpuDevice(readers, tracer=tracer) if gpu is None else gpu.make_host(readers)
            opened.callback(device.close)
        machine = Machine(kernels, above or device, tracer, replays=not options.enforce_eager)
        down = found.profile.down if found.profile is not None else None
        if gpu is None or not setup.plan.host_computes:
            attends = choose_host_kernels(setup.plan, options, threads)
        else:
            attends = of_host
        more = host_fingerprint(setup.plan, attends)
        setup = replace(setup, fingerprint={**setup.fingerprint, **more})
        tiers = Tiers(device, above, down, attends, int if gpu is None else gpu.peak)
        with room_on_device("weights, keys and values"), memory.streams.on(memory.streams.compute):
            return _assemble(setup, options, model, machine, tiers, opened)


def _setup(
    options: EngineOptions,
    model: CheckpointFolder,
    backend: Backend,
    device: DeviceSizes | None,
    found: _Given,
) -> EngineSetup:
    """The plan and all that requests need. `device`: that passes compute on, beside the host."""
    source, profile = found.source, found.profile
    tokenizer_folder = resolve_model(options.tokenizer) if options.tokenizer else model.folder
    tokenizer = load_tokenizer(tokenizer_folder, model_folder=model.folder)
    replayed = read_plan(options.plan) if options.plan else None
    if replayed is not None and options.kv_cache_dtype == "auto":
        options = replace(options, kv_cache_dtype=_known_cache_dtype(replayed))
    params = default_params(model.folder, options)
    longest = options.max_model_len or model.spec.max_positions
    job = source.job(tokenizer, params, longest) if source else None
    serves = source is not None and job is None
    profile = profile or assumed_profile(threads=backend.threads, memory_bytes=available_bytes())
    # after all that the process has grown by
    sizes = replace(sizes_of(model, options, backend), device=device)
    wanted = wanted_of(options, model)
    problem = Problem(model.spec, sizes, profile)
    chosen = _choose(_Choice(problem, wanted, options, replayed, serves), job)
    longest_row = chosen.plan.max_model_len
    beside = source.row_bytes(longest_row, tokenizer.vocab_size) if source else 0
    if beside:  # known only now: texts that no prompt can be so long as are not tokenised
        sizes = replace(sizes, process_bytes=sizes.process_bytes + beside)
        problem = replace(problem, sizes=sizes)
        chosen = _choose(_Choice(problem, wanted, options, replayed, serves), job)
    compared: tuple[str, ...] = ()
    is_open = options.device == AUTO and not options.kv_offloading_share
    if job is not None and is_open and found.above is None:
        alone = replace(problem, sizes=replace(sizes, device=None))
        compared = beside_cpu(chosen, lambda: _choose(_Choice(alone, wanted, options, None), job))
    plan, speculative = chosen.plan, options.speculative_config
    return EngineSetup(
        plan=plan,
        notes=(
            *model.spec.limits(),
            *chosen.lines(),
            *compared,
            *([speculative.line()] if speculative else ()),
        ),
        speculative=speculative,
        tokenizer=tokenizer,
        default_params=params,
        rules=RequestRules(
            max_model_len=plan.max_model_len,
            longest=longest,
            vocab_size=model.spec.vocab_size,
            eos_token_ids=tokenizer.eos_token_ids,
            seed=options.seed,
            prefix_caching=plan.finds_prefixes,
            grammars=Grammars(tokenizer, model.spec.vocab_size),
            shares=plan.shares,
            limited_by=model.spec.limited_by
            if plan.max_model_len == model.spec.max_positions
            else "",
        ),
        fingerprint=_fingerprint(
            model, tokenizer, options, backend.name if device is None else device.backend
        ),
        expectation=EngineExpectation(chosen),
        keeps_bursts=options.burst_tokens is not None,
        is_paced=serves,
        has_job=job is not None,
    )


class _Choice(NamedTuple):
    """What a plan is chosen by."""

    problem: Problem
    wanted: PlanConstraints
    options: EngineOptions
    replayed: Plan | None
    serves: bool = False


def _choose(by: _Choice, job: Job | None) -> Chosen:
    problem, wanted, options, replayed, _ = by
    if replayed is not None:
        most = options.host_memory or largest_budget()
        validate_plan(replayed, problem.spec, problem.sizes, wanted, most)
        return Chosen(problem=problem, plan=replayed, workload=job.workload if job else None)
    budget = options.host_memory or default_budget()
    # bursts rest on rates of the disk, measured ones, and on experts that stay with a sequence
    may_burst = not problem.profile.is_assumed and follows_sequences(options)
    if wanted.burst_tokens is None and not may_burst:
        wanted = replace(wanted, burst_tokens=0)
    # without rates of a GPU that is there nothing can be searched
    is_unknown = problem.sizes.device is not None and problem.profile.device is None
    if job is None or is_unknown:
        return plain_plan(problem, budget, replace(wanted, serves=by.serves))
    before = resident_bytes()

    def growth() -> int:
        return_freed_memory()
        return resident_bytes() - before

    return choose_plan(problem, job, budget, wanted, growth=growth)


def _assemble(
    setup: EngineSetup,
    options: EngineOptions,
    model: CheckpointFolder,
    machine: Machine,
    tiers: Tiers,
    opened: ExitStack,
) -> Engine:
    """The engine, which takes over what `opened` holds. Nothing made here may hold the engine: one
    that is dropped must end by itself."""
    plan, spec, tracer = setup.plan, model.spec, machine.tracer
    shape = pass_shape(spec, model.layout)
    outfit = make_outfit(options, model, plan, str(setup.fingerprint["model"]), opened)
    weights = open_weights(model, plan, tiers, outfit, tracer)
    opened.callback(weights.close)
    if outfit.recorder is not None and outfit.recorder.wants_states:
        outfit.recorder.add_routers(read_routers(spec, weights, machine.memory.streams))
    kv = open_kv(spec, plan, machine.memory, tiers.host)
    machine = open_host(machine, spec, plan, tiers, (kv, weights), opened)
    foresight = outfit.foresight(plan, shape, weights)
    kind = DraftingHostRuntime if spec.drafts else HostRuntime
    runtime = kind(spec, machine, weights, kv.device, foresight)
    drafting = None if setup.speculative is None else Drafting.of(setup.speculative)
    layer_drafts = None
    if isinstance(runtime, DraftingHostRuntime):
        assert drafting is not None, "a layer that drafts is read where it is asked for alone"
        layer_drafts = LayerDrafts(
            runtime, shape, drafting, micro_batch_tokens=plan.micro_batch_tokens,
            takes_likeliest=machine.memory.streams.runs_ahead,
        )  # fmt: skip
    guard = None if setup.keeps_bursts else WindowGuard(window=_BURST_STRETCHES)
    turns = Turns(plan.burst_tokens, plan.burst_max_seqs, guard)
    # a job's prompts are no turns of a chat
    keeps = plan.prefix_caching and not setup.has_job and machine.rows_are_alike
    admission = Admission(
        kv,
        max_num_seqs=plan.max_num_seqs,
        max_rows=plan.max_num_batched_tokens,
        long_rope_after=long_rope_after(spec),
        mixed_prefill_rows=plan.mixed_prefill_tokens,
        decoding=Decoding(turns, drafting, Pace() if setup.is_paced else None, keeps),
    )
    return Engine(
        setup,
        EngineParts(
            runtime=runtime,
            shape=shape,
            weights=weights,
            admission=admission,
            drafting=drafting,
            layer_drafts=layer_drafts,
            device=tiers.host,
            streams=machine.memory.streams,
            tracer=tracer,
            resources=opened.pop_all(),
            speculation=foresight.words,
            abandon=machine.abandon,
            device_peak=tiers.peak,
            forecast_sources=partial(source_words, outfit.forecast),
        ),
    )


def _known_cache_dtype(plan: Plan) -> Any:
    if plan.kv_cache_dtype not in CACHE_DTYPES:
        raise UsageError(
            f"plan: kv_cache_dtype: got {plan.kv_cache_dtype!r}, allowed {', '.join(CACHE_DTYPES)}"
        )
    return plan.kv_cache_dtype


def _fingerprint(
    model: CheckpointFolder, tokenizer: Tokenizer, options: EngineOptions, kernels: str
) -> dict[str, object]:
    """What would change results if it changed. `kernels`: the name of those that compute."""
    return {
        "model": checkpoint_stamp(model.folder),
        "load_format": options.load_format,
        "kernels": kernels,
        "kv_cache_dtype": cache_dtype(model, options),
        "tokenizer": tokenizer.digest,
        "generation_config": options.generation_config,
        "seed": options.seed,
        "max_model_len": options.max_model_len,
        "dtype": "bfloat16" if options.dtype == "bfloat16" else "float32",
        "version": VERSION,
        **({"unread": list(model.notes)} if model.notes else {}),
    }
