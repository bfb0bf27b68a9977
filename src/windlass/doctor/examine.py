"""One examination of this machine: what is measured in which order, and what is kept of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from windlass.device.cuda_rates import find_cuda
from windlass.device.processors import default_threads
from windlass.doctor.bench_model import KINDS, checkpoint_model, random_model
from windlass.doctor.device_rates import (
    Accelerator,
    DeviceRates,
    HostAttention,
    measure_device,
)
from windlass.doctor.disk import DiskRates, measure_disk, scratch_checkpoint
from windlass.doctor.environment import Environment, read_environment
from windlass.doctor.kernel_rates import (
    Findings,
    decode_attention,
    measure_attention,
    measure_memory,
    measure_products,
    memory_rate,
)
from windlass.doctor.overhead import measure_overhead, small_budget
from windlass.doctor.profile_store import cache_key, load_report, save_report
from windlass.doctor.tables import Report, disk_name
from windlass.doctor.timing import Load
from windlass.hardware.profile import HardwareProfile, Processor
from windlass.kernels.interface import Kernels
from windlass.kernels.select import choose_kernels, device_backend, host_backend
from windlass.kernels.select_device import choose_device_kernels
from windlass.options import AUTO, CPU, EngineOptions, MoeBackend
from windlass.units import counted, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined. `model`: a checkpoint whose disk, shapes and formats are measured; None for
    usual shapes, all formats and a file in `cache`, which also keeps reports. `device`: "cpu" where
    no GPU is looked for, else which. None in `threads`:
    all that this process may use."""

    cache: Path
    model: Path | None = None
    device: str = AUTO
    threads: int | None = None
    moe_backend: MoeBackend = "auto"
    dtype: str = "auto"
    load_mode: Literal["auto", "dio", "buffered"] = "auto"


Tell = Callable[[str], None]


def examine(subject: Subject, *, fresh: bool = False, tell: Tell = lambda text: None) -> Report:
    """The report on this machine: the one kept from before, or measured now (where `fresh`, always)
    and kept. `tell` hears what is being measured."""
    with torch.inference_mode(), _prepared(subject) as place:
        kept = None if fresh else _kept(subject, place)
        if kept is not None:
            return kept
        report = _Examination(subject, place.environment, place.kernels, tell).run(place.gpu)
        save_report(subject.cache, place.key, report)
        return report


def kept_report(subject: Subject) -> Report | None:
    """The report kept from before, if it is still good; measures nothing."""
    with _prepared(subject) as place:
        return _kept(subject, place)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a report is of, before anything is measured."""

    environment: Environment
    kernels: Kernels
    gpu: Accelerator | None
    key: dict[str, object]


def _kept(subject: Subject, place: _Place) -> Report | None:
    """What was measured before, with the memory that there is now: it may be limited otherwise."""
    kept, now = load_report(subject.cache, place.key), place.environment
    if kept is None:
        return None
    host = replace(kept.profile.host, memory_bytes=now.memory_bytes)
    return replace(
        kept,
        environment=replace(kept.environment, memory_bytes=now.memory_bytes, limits=now.limits),
        profile=replace(kept.profile, host=host),
    )


@contextmanager
def _prepared(subject: Subject) -> Iterator[_Place]:
    """Kernels chosen and the machine looked at; torch's threads are restored at the end."""
    machine_threads = torch.get_num_threads()
    threads = subject.threads or default_threads()
    try:
        gpu = find_cuda(subject.device)
        backend = subject.moe_backend if gpu is None else host_backend(subject.moe_backend)
        kernels = choose_kernels(
            backend, threads=threads, bf16_activations=subject.dtype == "bfloat16"
        )
        environment = read_environment(
            subject.model or subject.cache,
            kernels,
            threads=threads,
            gpu=None if gpu is None else gpu.name,
        )
        key = {
            **cache_key(environment, subject.model),
            "dtype": subject.dtype,
            "load_mode": subject.load_mode,
        }
        yield _Place(environment, kernels, gpu, key)
    finally:
        torch.set_num_threads(machine_threads)


class _Examination:
    def __init__(
        self, subject: Subject, environment: Environment, kernels: Kernels, tell: Tell
    ) -> None:
        self._subject = subject
        self._environment = environment
        self._kernels = kernels
        self._tell = tell
        self._findings = Findings()
        self._notes: list[str] = []
        self._attention: HostAttention | None = None  # as the host has it

    def run(self, accelerator: Accelerator | None) -> Report:
        load, begin = Load(), time.perf_counter()
        disk = self._disk()
        host = self._host()
        device = None
        if accelerator is not None:
            self._tell("measuring the GPU and its links")
            device = measure_device(
                accelerator, kernels=self._device_kernels(accelerator), attention=self._attention
            )
            self._findings.spread |= device.spread
        return Report(
            environment=self._environment,
            profile=self._profile(disk, host, device),
            disk_rates=disk.rates,
            disk_mode=disk.mode,
            others=load.cores(),
            seconds=time.perf_counter() - begin,
            notes=tuple(self._notes),
        )

    def _device_kernels(self, accelerator: Accelerator) -> Kernels:
        """What a run computes with there, so that rates of experts are its own."""
        return choose_device_kernels(
            device_backend(self._subject.moe_backend),
            accelerator.device,
            capability=accelerator.capability,
            bf16_activations=self._subject.dtype == "bfloat16",
        )

    def _disk(self) -> DiskRates:
        self._tell("measuring the disk")
        model, cache = self._subject.model, self._subject.cache
        with scratch_checkpoint(cache) if model is None else nullcontext(model) as folder:
            rates = measure_disk(folder, mode=self._subject.load_mode)
        if rates.is_repeated:
            self._notes.append(
                f"the {format_bytes(rates.read_bytes)} to read were read more than once: caches of"
                " the disk itself may show"
            )
        for (size, depth), spread in rates.spread.items():
            self._findings.spread[disk_name(size, depth)] = spread
        return rates

    def _host(self) -> Processor:
        threads = self._environment.threads
        self._tell("measuring the overhead of calls")
        overhead = measure_overhead(
            EngineOptions(
                device=CPU,
                threads=threads,
                host_memory=small_budget(),
                moe_backend="cpu" if self._kernels.name == "cpu" else "torch",
                dtype=self._subject.dtype,
            )
        )
        self._tell("measuring memory and attention")
        memory = measure_memory(self._kernels)
        model, kinds = self._subject.model, iter(KINDS)
        measured = random_model(next(kinds)) if model is None else checkpoint_model(model)
        try:
            decode, prefill = measure_attention(measured, self._kernels, self._findings)
            self._attention = HostAttention(*decode_attention(measured, self._kernels))
            while True:
                measure_products(measured, self._kernels, self._findings)
                kind = next(kinds, None) if model is None else None
                if kind is None:
                    break
                self._tell(f"measuring products of {kind} weights")
                measured = random_model(kind)
        finally:
            measured.source.close()
        if self._findings.is_hurried:
            self._notes.append("a slow or busy machine: some products were measured once only")
        self._findings.spread |= {"memory": memory.spread, "call": overhead.call.spread}
        return Processor(
            name=self._environment.cpu,
            memory_bytes=self._environment.memory_bytes,
            memory_rate=memory_rate(memory),
            experts=self._findings.experts,
            dense=self._findings.dense,
            decode_attention=decode,
            prefill_attention=prefill,
            row_rate=overhead.row_rate,
            call_s=overhead.call.median_s,
            expert_s=overhead.expert_s,
            captures=self._kernels.capture(str) is not None,
        )

    def _profile(
        self, disk: DiskRates, host: Processor, device: DeviceRates | None
    ) -> HardwareProfile:
        if device is not None:
            host = replace(host, attention_beside_copies=device.attention_beside_copies)
        return HardwareProfile(
            name=f"{self._environment.cpu}, {counted(self._environment.threads, 'thread')}",
            captured=datetime.now(UTC).isoformat(timespec="seconds"),
            software=self._environment.software,
            threads=self._environment.threads,
            source="measured",
            disk=disk.curve,
            disk_in_flight=disk.in_flight,
            disk_path=self._environment.disk.path,
            host=host,
            device=None if device is None else device.processor,
            down=None if device is None else device.down,
            up=None if device is None else device.up,
            spread=self._findings.spread,
        )
