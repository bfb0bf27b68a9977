"""The profile of a machine that nobody has measured: low numbers for its kind, so that a plan made
from them does not promise too much. What a plan rests on is the ratio of disk to arithmetic."""

from windlass.hardware.profile import ASSUMED, Curve, HardwareProfile, Processor

# Per thread, of a desktop or a small virtual machine with AVX2; measured ones: docs/benchmarks.md
_FLOPS = 40e9
_MEMORY_RATE = 8e9
_ROWS = (1, 4, 16, 64, 256)
_BYTES_PER_WEIGHT = {
    "bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "fp8": 1.0, "mxfp4": 0.53, "int8": 1.06,
    "int4": 0.56, "gptq": 0.56, "awq": 0.56,
}  # fmt: skip
_UNPACKED_RATE = 0.4  # of the memory rate that packed formats reach at one row
_MIB = float(1 << 20)
# Of the memory rate: what one norm, rotation or sum after the other reaches (measured: 0.2 to 0.35)
ROW_SHARE = 0.25


def assumed_profile(*, threads: int, memory_bytes: int) -> HardwareProfile:
    """A host of so many threads and bytes, without a device, and a slow solid-state disk."""
    memory_rate = _MEMORY_RATE * min(threads, 8)
    peak = _FLOPS * threads
    curves = {kind: _curve(kind, memory_rate, peak) for kind in _BYTES_PER_WEIGHT}
    host = Processor(
        name="host",
        memory_bytes=memory_bytes,
        memory_rate=memory_rate,
        experts=curves,
        dense=curves,
        decode_attention=memory_rate / 2,
        prefill_attention=peak / 2,
        row_rate=ROW_SHARE * memory_rate,
        call_s=50e-6,
        expert_s=20e-6,
    )
    return HardwareProfile(
        name="assumed",
        captured="",
        software="",
        threads=threads,
        source=ASSUMED,
        disk=Curve(((4096.0, 20e6), (65536.0, 150e6), (_MIB, 400e6), (4 * _MIB, 500e6))),
        disk_in_flight=4,
        disk_path="",
        host=host,
    )


def _curve(kind: str, memory_rate: float, peak: float) -> Curve:
    """Two FLOPs for every weight and row; weights cross memory once, not hidden by arithmetic."""
    size = _BYTES_PER_WEIGHT[kind]
    read = memory_rate if size >= 2 else memory_rate * _UNPACKED_RATE
    rates = ((float(rows), 1 / (1 / peak + size / (2 * rows * read))) for rows in _ROWS)
    return Curve(tuple(rates))
