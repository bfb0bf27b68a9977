"""Fakes of the protocols at the seams. A fake is stricter than the real thing, never kinder."""

import random
import threading
from collections.abc import Mapping, Sequence

import torch

from windlass.checkpoint.placement import PLACE_BYTES
from windlass.device.base import ALIGN_BYTES, Copy, DeviceMemory, Done, FileRange
from windlass.device.host_memory import HostAllocator
from windlass.errors import CheckpointError
from windlass.ids import HOST, Part, WeightKey
from windlass.models.names import Layout, Piece, TensorInfo
from windlass.units import round_up

POISON = 0xFF  # NaN in every floating type, so that a use before arrival shows in any result


class FakeDevice(HostAllocator):
    """`Device` whose copies arrive late and out of order. Memory is poisoned when it is allocated
    and again when a copy into it is submitted; uninitialised tensors are poison too.

    By default a thread completes a random pending copy every `delay_s` or so; with `manual`,
    nothing arrives until the test calls `complete`.
    """

    def __init__(
        self,
        *,
        name: str = HOST,
        seed: int = 0,
        num_lanes: int = 4,
        delay_s: float = 0.0002,
        manual: bool = False,
    ) -> None:
        self.name = name
        self._random = random.Random(seed)
        self._num_lanes = num_lanes
        self._delay_s = delay_s
        self._changed = threading.Condition()
        self._pending: list[tuple[Copy, Done]] = []
        self._under_way = 0
        self._closed = False
        self._allocated_bytes = 0
        self.submitted: list[Copy] = []
        self._thread = threading.Thread(target=self._serve, name="fake device", daemon=True)
        self._is_manual = manual
        if not manual:
            self._thread.start()

    @property
    def num_lanes(self) -> int:
        return self._num_lanes

    @property
    def allocated_bytes(self) -> int:
        return self._allocated_bytes

    @property
    def busy_s(self) -> float:
        return 0.0

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = super().empty(*shape, dtype=dtype)
        made.view(-1).view(torch.uint8).fill_(POISON)
        return made

    def allocate(self, num_bytes: int) -> DeviceMemory:
        size = round_up(num_bytes, ALIGN_BYTES)
        self._allocated_bytes += size
        whole = torch.full((size + ALIGN_BYTES,), POISON, dtype=torch.uint8)
        start = -whole.data_ptr() % ALIGN_BYTES
        # A storage of its own: offsets inside it are offsets from an aligned address.
        data = torch.frombuffer(whole.numpy().data[start : start + num_bytes], dtype=torch.uint8)
        return DeviceMemory(self, data)

    def submit(self, copy: Copy, done: Done) -> None:
        with self._changed:
            assert not self._closed, "submitted to a closed device"
            source, into = copy.source, copy.destination
            assert into.device is self, f"{copy.label}: into memory of another device"
            assert into.num_bytes == copy.num_bytes, f"{copy.label}: {into.num_bytes} bytes"
            if isinstance(source, FileRange):
                assert into.data.data_ptr() % ALIGN_BYTES == 0, "unaligned memory"
                assert into.num_bytes % ALIGN_BYTES == 0
                assert source.offset % ALIGN_BYTES == 0
            else:
                assert into.data.data_ptr() % PLACE_BYTES == 0, "unaligned memory"
                assert not _overlap(source, into), f"{copy.label} reads what it writes"
            for other, _ in self._pending:
                clash = _overlap(other.destination, into)
                assert not clash, f"{other.label} and {copy.label} clash"
            into.data.fill_(POISON)
            self.submitted.append(copy)
            self._pending.append((copy, done))
            self._under_way += 1
            self._changed.notify_all()

    @property
    def pending(self) -> list[str]:
        """Labels of copies that have not arrived, in the order of submission."""
        with self._changed:
            return [copy.label for copy, _ in self._pending]

    def complete(self, index: int | None = None, *, error: Exception | None = None) -> str:
        """Lets one pending copy arrive, or fail; the `index`-th, or a random one. Its label."""
        with self._changed:
            chosen = self._random.randrange(len(self._pending)) if index is None else index
            copy, done = self._pending[chosen]
        failure = error
        if failure is None:
            try:
                _make(copy)
            except CheckpointError as caught:
                failure = caught
        with self._changed:
            self._pending.remove((copy, done))
        done(failure)
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()
        return copy.label

    def complete_all(self) -> None:
        """Lets everything arrive, and what is submitted meanwhile."""
        while self.pending:
            self.complete()

    def synchronize(self) -> None:
        if self._is_manual:
            self.complete_all()
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self._is_manual:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                self._changed.wait(self._random.random() * 2 * self._delay_s)
            self.complete()


def _make(copy: Copy) -> None:
    source, into = copy.source, copy.destination.data
    if isinstance(source, FileRange):
        source.source.read(source.file, source.offset, into.numpy().data)
    else:
        into.copy_(source.data)


def _overlap(a: DeviceMemory, b: DeviceMemory) -> bool:
    first, second = a.data.data_ptr(), b.data.data_ptr()
    return first < second + b.num_bytes and second < first + a.num_bytes


class FakeSource:
    """`WeightSource` in memory: tensors laid end to end in one file called "fake".

    `gap_bytes` of nothing lie before each tensor, so that offsets are as ragged as wanted.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, gap_bytes: int = 0) -> None:
        data = bytearray()
        self._tensors: dict[str, TensorInfo] = {}
        names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
        for name, tensor in tensors.items():
            data.extend(b"\0" * gap_bytes)
            begin = len(data)
            data.extend(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            self._tensors[name] = TensorInfo(
                name, "fake", names[tensor.dtype], tuple(tensor.shape), begin, len(data)
            )
        self._data = bytes(data)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, file: str, offset: int, into: memoryview) -> None:
        assert offset < len(self._data), f"{file}: read beyond the end"
        block = self._data[offset : offset + len(into)]
        into[: len(block)] = block

    def close(self) -> None:
        pass


def expert_tensors(
    num_layers: int, num_experts: int, *, rows: int = 4, columns: int = 8
) -> dict[str, torch.Tensor]:
    """`l.e.gate`, `up`, `down` of every expert, each filled with its own numbers."""
    generator = torch.Generator().manual_seed(num_layers * 1000 + num_experts)
    return {
        f"{layer}.{expert}.{name}": torch.randn(rows, columns, generator=generator).bfloat16()
        for layer in range(num_layers)
        for expert in range(num_experts)
        for name in ("gate", "up", "down")
    }


def expert_layout(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of `expert_tensors`: every expert three whole tensors."""
    parts: dict[WeightKey, list[Piece]] = {}
    for name, tensor in tensors.items():
        layer, expert, piece = name.split(".")
        key = WeightKey(Part.EXPERT, int(layer), int(expert))
        parts.setdefault(key, []).append(Piece(piece, name, 0, tensor.numel(), tuple(tensor.shape)))
    return Layout({key: tuple(pieces) for key, pieces in parts.items()}, ())


def experts(layer: int, indices: Sequence[int]) -> list[WeightKey]:
    """Keys of some experts of a layer."""
    return [WeightKey(Part.EXPERT, layer, index) for index in indices]
