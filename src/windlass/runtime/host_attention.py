"""Attention of sequences whose home is the host, while a device does everything else.

Queries, keys and values of a micro-batch go up into pinned memory; a thread of its own, the worker,
writes them to pages of the host and attends, one micro-batch after the other, as they were asked
for; what it finds goes back down. Each waits for nothing but what it needs:

    compute   project -> record                                wait -> output projection
    up                   wait, copy -> record                   ^
    worker                              synchronise, attend     |
    back                                             copy -> record

A place in pinned memory (`_Stage`) is used again when the job that had it is over; what goes up
into it waits until what was found there has left. There are few of them: who asks for more waits.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import NamedTuple, Protocol, TypeVar

import torch

from windlass.decoder.attention import Projected, kv_shape, value_width
from windlass.device.base import Allocator
from windlass.device.streams import Event
from windlass.kernels.interface import AttentionOptions, AttentionWork, Kernels
from windlass.kvcache.kv_cache import KvCache
from windlass.models.spec import Gqa, Mla, ModelSpec
from windlass.plan import Plan
from windlass.schedule.batch import MicroBatch
from windlass.trace import Tracer

_STAGING_BYTES = 256 << 20  # of all stages; two there are in any case, so that none waits for one
_Result_co = TypeVar("_Result_co", covariant=True)
_Result = TypeVar("_Result")


class Pending(Protocol[_Result_co]):
    """Work that a worker was given; `concurrent.futures.Future` is one."""

    def result(self) -> _Result_co:
        """What it gave, waiting for it. Raises what it raised."""
        ...

    def exception(self) -> BaseException | None:
        """What it raised, waiting for it."""
        ...


class Worker(Protocol):
    """One thread that does what it is given, in that order; a `ThreadPoolExecutor` of one is."""

    def submit(self, work: Callable[[], _Result], /) -> Pending[_Result]: ...


class OnHost(NamedTuple):
    """Attention that the host computes. `out_THv`, of the device, has the result when the event of
    `copied` has come."""

    out_THv: torch.Tensor
    gate_THv: torch.Tensor | None
    copied: Pending[Event]


class Staging(NamedTuple):
    """Pinned memory for what goes up and comes back: `num_stages` micro-batches at once, each with
    `floats` at most."""

    num_stages: int
    floats: int

    @classmethod
    def of(cls, spec: ModelSpec, plan: Plan) -> "Staging":
        """For as many micro-batches as a pass may have, or few large ones."""
        attentions = [block.attention for block in spec.blocks]
        widest = max((_row_floats(a) for a in attentions if isinstance(a, Gqa | Mla)), default=0)
        floats = plan.micro_batch_tokens * widest
        # each home has a last one that is not full
        most = -(-plan.pass_rows // plan.micro_batch_tokens) + 1
        room = _STAGING_BYTES // max(1, 4 * floats)
        return cls(min(most, max(2, room)), floats)

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_stages * self.floats


def _row_floats(attention: Gqa | Mla) -> int:
    """Of a row's queries, key, value and result."""
    shape = kv_shape(attention)
    assert shape is not None, "softmax attention keeps keys"
    kv_heads, key_dim, value_dim = shape
    queries = attention.num_heads * (key_dim + value_width(attention))
    return queries + kv_heads * (key_dim + value_dim)


@dataclass(slots=True, eq=False)
class _Stage:
    """A place in pinned memory for queries, keys, values and results of one micro-batch."""

    buffer: torch.Tensor | None = None  # made when it is first wanted
    job: Pending[Event] | None = None  # that had it last

    def views(self, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        """Tensors of `shapes` side by side."""
        assert self.buffer is not None
        sizes = [prod(shape) for shape in shapes]
        parts = torch.split(self.buffer[: sum(sizes)], sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Places(NamedTuple):
    """Where a micro-batch's rows are in the host's pages: (T,) int64 each."""

    rows: MicroBatch
    pages: torch.Tensor
    offsets: torch.Tensor


class _Job(NamedTuple):
    """What the worker is given. `given` lies on the device, and is kept until it has left."""

    layer: int
    given: tuple[torch.Tensor, ...]
    arrived: Event
    staged: list[torch.Tensor]  # queries, keys, values where they are kept, results
    places: _Places
    work: AttentionWork
    options: AttentionOptions
    out_THv: torch.Tensor


class HostAttention:
    """Asked by the thread that computes; `kernels` and `kv`, those of the host, are the worker's
    while it has work."""

    def __init__(
        self,
        kernels: Kernels,
        kv: KvCache,
        memory: Allocator,
        worker: Worker,
        staging: Staging,
        tracer: Tracer,
    ) -> None:
        """`memory`: of the device. `tracer`: is told what the worker does."""
        self._tracer = tracer
        self._kernels = kernels
        self._kv = kv
        self._memory = memory
        self._worker = worker
        self._stage_floats = staging.floats
        self._stages = [_Stage() for _ in range(staging.num_stages)]
        self._sinks: dict[int, torch.Tensor] = {}  # by layer
        self._places: dict[int, _Places] = {}  # of the last micro-batch that began at a row

    def begin(
        self,
        layer: int,
        got: Projected,
        options: AttentionOptions,
        rows: MicroBatch,
        work: AttentionWork,
    ) -> OnHost:
        """Sends what was `got` of `rows` to the worker."""
        streams = self._memory.streams
        stage = self._free_stage()
        kept = islice((got.key_TKd, got.value_TKv), len(self._kv.stored(layer)))
        given = (got.q_THd.contiguous(), *(rows_TKd.contiguous() for rows_TKd in kept))
        num_rows, num_heads, _ = got.q_THd.shape
        out_THv = self._memory.empty(num_rows, num_heads, options.value_dim)
        staged = stage.views([one.shape for one in (*given, out_THv)])
        streams.up.wait(streams.compute.record())
        with streams.on(streams.up):
            for there, one in zip(staged, given, strict=False):
                there.copy_(one, non_blocking=True)
        arrived = streams.up.record()
        if options.sinks_H is not None:
            options = replace(options, sinks_H=self._sinks_on_host(layer, options.sinks_H))
        places = self._places.get(rows.first_token)
        if places is None or places.rows is not rows:
            places = self._places[rows.first_token] = _places_of(rows, self._kv.page_tokens)
        job = _Job(layer, given, arrived, staged, places, work, options, out_THv)
        stage.job = self._worker.submit(lambda: self._compute(job))
        return OnHost(out_THv, got.gate_THv, stage.job)

    def result(self, begun: OnHost) -> torch.Tensor:
        """What the queries found, by head: (T, H, v), for `compute` to read. Raises what the worker
        has raised."""
        streams = self._memory.streams
        streams.compute.wait(begun.copied.result())
        return begun.out_THv

    def drain(self) -> None:
        """Returns when the worker has nothing to do any more, whatever came of it: after a pass
        that has failed pages may be given to others."""
        self._worker.submit(lambda: None).result()
        for stage in self._stages:
            if stage.job is not None and stage.job.exception() is not None:
                stage.job = None  # nothing has left from here

    def _free_stage(self) -> _Stage:
        """That which was taken longest ago, when its job is over."""
        stage = self._stages.pop(0)
        self._stages.append(stage)
        if stage.job is not None:
            self._memory.streams.up.wait(stage.job.result())  # its result may still be on its way
        if stage.buffer is None:
            like = torch.empty(self._stage_floats, device="meta")
            stage.buffer = self._memory.streams.pinned(like)
        return stage

    def _sinks_on_host(self, layer: int, sinks_H: torch.Tensor) -> torch.Tensor:
        if layer not in self._sinks:
            (self._sinks[layer],) = self._memory.streams.on_host(sinks_H)
        return self._sinks[layer]

    @torch.inference_mode()
    def _compute(self, job: _Job) -> Event:
        """By the worker: the event of the result on the device."""
        streams = self._memory.streams
        q_THd, *kept, result_THv = job.staged
        job.arrived.synchronize()
        begin = time.perf_counter()
        for store, rows_TKd in zip(self._kv.stored(job.layer), kept, strict=True):
            self._kernels.write_rows(store, job.places.pages, job.places.offsets, rows_TKd)
        keys, values = self._kv.paged(job.layer)
        found_THv = self._kernels.attention(q_THd, keys, values, job.work, job.options)
        result_THv.copy_(found_THv)
        if self._tracer.writes:
            end, rows = time.perf_counter(), q_THd.shape[0]
            lane = "host attention"
            self._tracer.record("attention", lane, begin, end, layer=job.layer, rows=rows)
        with streams.on(streams.back):
            job.out_THv.copy_(result_THv, non_blocking=True)
        return streams.back.record()


def _places_of(rows: MicroBatch, page_tokens: int) -> _Places:
    found = [
        (segment.pages[position // page_tokens], position % page_tokens)
        for segment in rows.segments
        for position in range(segment.first_position, segment.first_position + segment.num_tokens)
    ]
    pages_T, offsets_T = torch.tensor(found, dtype=torch.int64).T.contiguous()
    return _Places(rows, pages_T, offsets_T)
