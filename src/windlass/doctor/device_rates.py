"""How fast a GPU and the links to it are, through torch: Windlass has no kernels of its own there
yet, so only plain types are measured. Tested with a device that computes on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Protocol

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from windlass.doctor.timing import Timing, measure
from windlass.hardware.profile import Curve, LinkRates, Processor
from windlass.units import KIB, MIB

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Accelerator(Protocol):
    """A device beside the host."""

    name: str
    memory_bytes: int
    device: torch.device

    def copier(self, num_bytes: int, *, down: bool, pinned: bool) -> Callable[[], None]:
        """Starts a copy to (`down`) or from the device each time it is called."""
        ...

    def synchronize(self) -> None:
        """Returns when everything started has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What is measured: bytes of copies, rows, widths of an expert, sequences and positions."""

    copies: tuple[int, ...] = (64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    hidden: int = 2048
    intermediate: int = 768
    cold_bytes: int = 256 * MIB  # of weights used in turn, beyond the device's cache
    large_bytes: int = 1024 * MIB
    heads: tuple[int, int, int] = (32, 4, 128)  # query heads, key/value heads, width
    sequences: int = 128
    context: int = 512
    prompt: int = 2048


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """All that a profile says of a device."""

    processor: Processor
    down: LinkRates
    up: LinkRates
    spread: dict[str, float]


def measure_device(accelerator: Accelerator, shapes: Shapes = Shapes()) -> DeviceRates:
    """Links both ways at once with pinned memory, one at a time with pageable memory; products,
    attention and memory as torch has them."""
    bench = _Bench(accelerator, shapes)
    down, up = bench.links()
    return DeviceRates(bench.processor(), down, up, bench.spread)


class _Bench:
    def __init__(self, accelerator: Accelerator, shapes: Shapes) -> None:
        self._on = accelerator
        self._shapes = shapes
        self.spread: dict[str, float] = {}

    def _time(self, name: str, calls: Sequence[Callable[[], object]], *, batch: int = 8) -> Timing:
        """Seconds of one round of `calls`, `batch` rounds between two synchronisations."""

        def rounds() -> None:
            for _ in range(batch):
                for call in calls:
                    call()
            self._on.synchronize()

        timing = measure(rounds, limit_s=0.2)
        self.spread[name] = timing.spread
        return Timing(tuple(seconds / batch for seconds in timing.samples))

    # --- links ------------------------------------------------------------------------------------

    def links(self) -> tuple[LinkRates, LinkRates]:
        both: list[tuple[float, float]] = []
        pageable: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for size in self._shapes.copies:
            copiers = [self._on.copier(size, down=down, pinned=True) for down in (True, False)]
            both.append((size, size / self._time(f"link, {size} bytes", copiers).median_s))
            for down, points in pageable.items():
                name = f"link {'down' if down else 'up'}, pageable, {size} bytes"
                copier = self._on.copier(size, down=down, pinned=False)
                points.append((size, size / self._time(name, [copier]).median_s))
        rate = Curve(tuple(both))
        return (
            LinkRates(rate=rate, pageable=Curve(tuple(pageable[True]))),
            LinkRates(rate=rate, pageable=Curve(tuple(pageable[False]))),
        )

    # --- the device -------------------------------------------------------------------------------

    def processor(self) -> Processor:
        experts, dense = {}, {}
        for kind, dtype in _TYPES.items():
            experts[kind] = self._experts(kind, dtype)
            dense[kind] = self._dense(kind, dtype)
        large = torch.ones(self._shapes.large_bytes // 4, device=self._on.device)
        memory = self._time("device memory", [large.sum])
        del large
        tiny = torch.ones(8, 8, device=self._on.device)
        call = self._time("device call", [partial(linear, tiny, tiny)], batch=64)
        return Processor(
            name=self._on.name,
            memory_bytes=self._on.memory_bytes,
            memory_rate=self._shapes.large_bytes / memory.median_s,
            experts=experts,
            dense=dense,
            decode_attention=self._decode(),
            prefill_attention=self._prefill(),
            row_rate=self._shapes.large_bytes / memory.median_s,
            call_s=call.median_s,
            expert_s=0.0,
        )

    def _random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=self._on.device).to(dtype)

    def _experts(self, kind: str, dtype: torch.dtype) -> Curve:
        hidden, inner = self._shapes.hidden, self._shapes.intermediate
        num_bytes = 3 * hidden * inner * dtype.itemsize
        weights = [
            (self._random(2 * inner, hidden, dtype=dtype), self._random(hidden, inner, dtype=dtype))
            for _ in range(max(1, self._shapes.cold_bytes // num_bytes))
        ]
        turn = cycle(weights)

        def call(x_ND: torch.Tensor) -> torch.Tensor:
            gate_up, down = next(turn)
            gate, up = linear(x_ND, gate_up).chunk(2, dim=-1)
            return linear(silu(gate) * up, down)

        return self._curve(f"device experts {kind}", call, 6 * hidden * inner, dtype)

    def _dense(self, kind: str, dtype: torch.dtype) -> Curve:
        hidden = self._shapes.hidden
        count = max(1, self._shapes.cold_bytes // (hidden * hidden * dtype.itemsize))
        turn = cycle([self._random(hidden, hidden, dtype=dtype) for _ in range(count)])
        return self._curve(
            f"device dense {kind}", lambda x_ND: linear(x_ND, next(turn)), 2 * hidden**2, dtype
        )

    def _curve(
        self,
        name: str,
        call: Callable[[torch.Tensor], torch.Tensor],
        flops: int,
        dtype: torch.dtype,
    ) -> Curve:
        """FLOP/s of `call` over rows; `flops`: of one row."""
        points = []
        for rows in self._shapes.rows:
            x_ND = self._random(rows, self._shapes.hidden, dtype=dtype)
            timing = self._time(f"{name}, {rows} rows", [partial(call, x_ND)])
            points.append((rows, flops * rows / timing.median_s))
        return Curve(tuple(points))

    def _decode(self) -> float:
        """Bytes/s of keys and values of all sequences, one new row each."""
        heads, kv, dim = self._shapes.heads
        shape = self._shapes.sequences, kv, self._shapes.context, dim
        keys, values = (self._random(*shape, dtype=torch.bfloat16) for _ in range(2))
        q = self._random(self._shapes.sequences, heads, 1, dim, dtype=torch.bfloat16)
        attend = partial(scaled_dot_product_attention, q, keys, values, enable_gqa=True)
        timing = self._time("device decode attention", [attend])
        return 2 * keys.numel() * keys.itemsize / timing.median_s

    def _prefill(self) -> float:
        """FLOP/s of one prompt, of what the causal mask leaves."""
        heads, kv, dim = self._shapes.heads
        prompt = self._shapes.prompt
        q = self._random(1, heads, prompt, dim, dtype=torch.bfloat16)
        keys, values = (self._random(1, kv, prompt, dim, dtype=torch.bfloat16) for _ in range(2))
        attend = partial(
            scaled_dot_product_attention, q, keys, values, is_causal=True, enable_gqa=True
        )
        timing = self._time("device prefill attention", [attend])
        return 4 * heads * dim * prompt * (prompt + 1) / 2 / timing.median_s
