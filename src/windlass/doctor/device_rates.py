"""How fast a GPU and the links to it are: experts by the kernels of the device where they are
given, all else through torch. Of packed weights a rate follows from that of bf16 and their bytes.
Tested with a device that computes on the host."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from windlass.doctor.timing import Timing, measure
from windlass.hardware.preset import BYTES_PER_WEIGHT
from windlass.hardware.profile import Curve, LinkRates, Processor
from windlass.kernels.interface import ExpertGroups, Kernels
from windlass.models.spec import SwiGlu
from windlass.tensors import StoredTensors
from windlass.units import KIB, MIB

_GROUP = 8  # experts of one call of the kernels
_BESIDE_BYTES = 64 * MIB  # of a copy, while the host attends
_BESIDE_SAMPLES = 5
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Accelerator(Protocol):
    """A device beside the host."""

    name: str
    memory_bytes: int
    device: torch.device
    capability: int  # 90 for sm_90

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


class HostAttention(NamedTuple):
    """A call of the host's decode attention, and the bytes of keys and values that it reads."""

    call: Callable[[], object]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """All that a profile says of a device. `attention_beside_copies`: bytes/s of the host's
    attention while both links carry weights; None where it was not asked for."""

    processor: Processor
    down: LinkRates
    up: LinkRates
    spread: dict[str, float]
    attention_beside_copies: float | None = None


def measure_device(
    accelerator: Accelerator,
    shapes: Shapes = Shapes(),
    *,
    kernels: Kernels | None = None,
    attention: HostAttention | None = None,
) -> DeviceRates:
    """Links both ways at once and each alone with pinned memory, one at a time with pageable
    memory; experts by `kernels`, those of the device; products, attention and memory as torch has
    them; the host's `attention` while links are busy."""
    bench = _Bench(accelerator, shapes, kernels)
    down, up = bench.links()
    beside = None if attention is None else bench.beside_copies(attention, down, up)
    return DeviceRates(bench.processor(), down, up, bench.spread, beside)


class _Bench:
    def __init__(self, accelerator: Accelerator, shapes: Shapes, kernels: Kernels | None) -> None:
        self._on = accelerator
        self._shapes = shapes
        self._kernels = kernels
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
        alone: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for size in self._shapes.copies:
            copiers = [self._on.copier(size, down=one, pinned=True) for one in (True, False)]
            both.append((size, size / self._time(f"link, {size} bytes", copiers).median_s))
            for is_down in (True, False):
                for how, points in (("pageable", pageable), ("alone", alone)):
                    name = f"link {'down' if is_down else 'up'}, {how}, {size} bytes"
                    copier = self._on.copier(size, down=is_down, pinned=points is alone)
                    points[is_down].append((size, size / self._time(name, [copier]).median_s))
        down, up = (
            LinkRates(
                rate=Curve(tuple(both)), pageable=Curve(tuple(pageable[is_down])),
                alone=Curve(tuple(alone[is_down])),
            )
            for is_down in (True, False)
        )  # fmt: skip
        return down, up

    def beside_copies(self, attention: HostAttention, down: LinkRates, up: LinkRates) -> float:
        """Bytes/s of the host's attention while both links are busy from its begin to its end."""
        size = min(_BESIDE_BYTES, self._shapes.copies[-1])
        begin = time.perf_counter()
        attention.call()
        alone_s = time.perf_counter() - begin
        # copies last twice as long as attention does alone
        copies = [
            (self._on.copier(size, down=is_down, pinned=True), link.rate.at(size))
            for is_down, link in ((True, down), (False, up))
        ]
        samples = []
        for _ in range(_BESIDE_SAMPLES):
            for copy, rate in copies:
                for _ in range(1 + int(2 * alone_s * rate / size)):
                    copy()
            begin = time.perf_counter()
            attention.call()
            samples.append(time.perf_counter() - begin)
            self._on.synchronize()
        timing = Timing(tuple(samples))
        self.spread["decode attention beside copies"] = timing.spread
        return attention.num_bytes / timing.median_s

    # --- the device -------------------------------------------------------------------------------

    def processor(self) -> Processor:
        experts, dense = {}, {}
        for kind, dtype in _TYPES.items():
            experts[kind] = self._experts(kind, dtype)
            dense[kind] = self._dense(kind, dtype)
        for kind, size in BYTES_PER_WEIGHT.items():
            if kind not in experts:
                experts[kind], dense[kind] = (
                    _narrower(one["bfloat16"], BYTES_PER_WEIGHT["bfloat16"] / size)
                    for one in (experts, dense)
                )
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
        count = max(_GROUP, self._shapes.cold_bytes // num_bytes)
        arena = self._random(count, 3, hidden * inner, dtype=dtype)  # one memory, as slots have it
        if self._kernels is not None:
            return self._grouped(f"device experts {kind}", arena, self._kernels)
        turn = cycle(
            (own[:2].reshape(2 * inner, hidden), own[2].reshape(hidden, inner)) for own in arena
        )

        def call(x_ND: torch.Tensor) -> torch.Tensor:
            gate_up, down = next(turn)
            gate, up = linear(x_ND, gate_up).chunk(2, dim=-1)
            return linear(silu(gate) * up, down)

        return self._curve(f"device experts {kind}", call, 6 * hidden * inner, dtype)

    def _grouped(self, name: str, arena: torch.Tensor, kernels: Kernels) -> Curve:
        """FLOP/s over rows of one expert, of some experts a call; `arena`: (experts, 3, weights of
        a matrix)."""
        hidden, inner = self._shapes.hidden, self._shapes.intermediate
        turn = cycle([_stored(own, hidden, inner) for own in arena])
        points = []
        for rows in self._shapes.rows:
            x_TD = self._random(rows * _GROUP, hidden, dtype=torch.float32)
            out = torch.empty_like(x_TD)
            ids_TA = torch.arange(_GROUP, device=self._on.device).repeat_interleave(rows)
            groups = kernels.group(ids_TA[:, None], _GROUP)

            def call(
                x_TD: torch.Tensor = x_TD, groups: ExpertGroups = groups, out: torch.Tensor = out
            ) -> None:
                kernels.experts(x_TD, dict(enumerate(islice(turn, _GROUP))), groups, SwiGlu(), out)

            timing = self._time(f"{name}, {rows} rows", [call])
            points.append((rows, 6 * hidden * inner * rows * _GROUP / timing.median_s))
        return Curve(tuple(points))

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


def _stored(own: torch.Tensor, hidden: int, inner: int) -> StoredTensors:
    """The expert whose matrices are the rows of `own`, as a slot has it: kernels keep what they
    look up of it."""
    tensors = StoredTensors()
    tensors["gate"], tensors["up"] = own[0].view(inner, hidden), own[1].view(inner, hidden)
    tensors["down"] = own[2].view(hidden, inner)
    return tensors


def _narrower(curve: Curve, times: float) -> Curve:
    """Of weights with so many times fewer bytes: few rows wait for their bytes, many do not."""
    return Curve(tuple((rows, min(curve.best, rate * times)) for rows, rate in curve.points))
