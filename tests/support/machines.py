"""Hardware profiles for tests: round numbers, no measurement."""

from windlass.hardware.profile import Curve, HardwareProfile, LinkRates, Processor

KINDS = ("bfloat16", "float16", "float32", "fp8", "mxfp4", "int8", "int4", "gptq", "awq")


def curve(*points: tuple[float, float]) -> Curve:
    return Curve(points)


def processor(name: str = "cpu", *, flops: float = 1e11, memory_bytes: int = 16 << 30) -> Processor:
    products = {kind: curve((1, flops / 32), (64, flops), (256, flops)) for kind in KINDS}
    return Processor(
        name=name,
        memory_bytes=memory_bytes,
        memory_rate=4e10,
        experts=products,
        dense=products,
        decode_attention=2e10,
        prefill_attention=flops / 2,
        row_rate=1e10,
        call_s=1e-4,
        expert_s=1e-5,
    )


def machine(*, with_device: bool = False) -> HardwareProfile:
    """A CPU of 100 GFLOP/s, 40 GB/s of memory, a disk of 1 GB/s; perhaps a GPU of 10 TFLOP/s."""
    link = LinkRates(rate=curve((1 << 16, 5e9), (1 << 24, 2e10)), pageable=curve((1 << 24, 5e9)))
    device = processor("gpu", flops=1e13, memory_bytes=24 << 30) if with_device else None
    return HardwareProfile(
        name="test",
        captured="2026-01-01T00:00:00+00:00",
        software="windlass 0",
        threads=2,
        source="measured",
        disk=curve((1 << 20, 5e8), (4 << 20, 1e9)),
        disk_in_flight=4,
        disk_path="/",
        host=processor(),
        device=device,
        down=link if with_device else None,
        up=link if with_device else None,
        spread={"disk": 0.1},
    )
