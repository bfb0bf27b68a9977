"""Keys and values that are in the host's memory, and the two places on a device that they come to,
a layer of a few sequences at a time. Knows memory, not who comes when."""

from collections.abc import Sequence
from math import prod

import torch

from windlass.device.base import Device, DeviceMemory
from windlass.device.host_memory import HostAllocator
from windlass.kvcache.kv_cache import CacheShape, KvCache, PagedShape


class Reached(HostAllocator):
    """Makes tensors where copies of a device reach them: in memory that `host` allocates."""

    def __init__(self, host: Device) -> None:
        self._host = host

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        num_bytes = dtype.itemsize * prod(shape)
        return self._host.allocate(num_bytes).data[:num_bytes].zero_().view(dtype).view(shape)


class Half:
    """One of the two places: pages of each kind of layer. `nowhere`: a page that is always zeros.
    `memory.last_use`: the end of the last work on it."""

    def __init__(
        self, kinds: Sequence[CacheShape], device: Device, dtype: torch.dtype, *, num_pages: int,
        page_tokens: int,
    ) -> None:  # fmt: skip
        self.kv = KvCache(
            kinds, device, dtype=dtype, num_pages=num_pages + 1, page_tokens=page_tokens
        )  # fmt: skip
        self.num_pages = self.nowhere = num_pages
        self.memory = DeviceMemory(device, self.kv.whole)


class StreamedKv:
    """Pages `ram` of the host, and halves of a device that hold `num_pages` each."""

    def __init__(
        self, shapes: Sequence[CacheShape | None], ram: KvCache, host: Device, device: Device, *,
        num_pages: int,
    ) -> None:  # fmt: skip
        self.ram = ram
        self.memory = DeviceMemory(host, ram.whole)
        kinds = paged_kinds(shapes)
        self.kinds = {
            layer: kinds.index(shape)
            for layer, shape in enumerate(shapes)
            if isinstance(shape, PagedShape)
        }
        self.halves = tuple(
            Half(kinds, device, ram.dtype, num_pages=num_pages, page_tokens=ram.page_tokens)
            for _ in range(2)
        )


def paged_kinds(shapes: Sequence[CacheShape | None]) -> list[PagedShape]:
    """The different ones of attention layers: each has pages of its own in a half."""
    return list(dict.fromkeys(shape for shape in shapes if isinstance(shape, PagedShape)))


def staged_bytes_per_token(shapes: Sequence[CacheShape | None], dtype: torch.dtype) -> int:
    """Bytes of one position in a half."""
    return sum(shape.bytes_per_token(dtype) for shape in paged_kinds(shapes))
