"""Attention by the device that computes, of sequences whose keys and values are in the host's
memory. Pages of a layer come to one of two places, for some sequences at a time (a round), while
the other is used, and what the rows add goes back:

    down      copy                        copy of the round behind ...
    host          wait, ask for kernels
    compute            write rows, attend -> record
    up                                       wait, copy back -> record: before the next use

Copies come by the queue of weights, behind what is demanded and before what is only hinted at. A
round that reads what an earlier one of its pass writes has that copied when it is its turn, behind
what went back. A pass that has ended leaves nothing on its way: its results went up behind all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, repeat
from typing import NamedTuple

import torch

from windlass.decoder.attention import Projected
from windlass.device.base import Copies, Copy, DeviceMemory
from windlass.device.lane import steps
from windlass.device.streams import OVER, Event
from windlass.ids import Home, Route
from windlass.kernels.interface import AttentionOptions, AttentionWork, Kernels, WorkTables
from windlass.kvcache.staging import Half, StreamedKv
from windlass.models.spec import ModelSpec
from windlass.runtime.attention_metadata import Numbers, work_of
from windlass.runtime.kv_rounds import Ahead, Run, Staged, Wait, rounds_of, windows_of
from windlass.schedule.batch import Batch, MicroBatch
from windlass.weights.io_queue import Priority, Ticket, TicketState
from windlass.weights.transfer import TransferQueue

_LABEL = "keys"  # of copies, in the trace


class Way(NamedTuple):
    """How copies come from the host's memory, which was registered in steps of so many bytes."""

    queue: TransferQueue
    route: Route
    step_bytes: int | None


class _Wanted(NamedTuple):
    """Of a round, for layers with one kind of window."""

    work: AttentionWork
    early: list[Run]
    late: list[Run]  # that earlier rounds of the pass write


class _Round(NamedTuple):
    """On the device, of the rows that it has: (R,) int64 each; and `fresh`, pages to be cleared."""

    first_row: int
    num_rows: int
    slots: torch.Tensor
    offsets: torch.Tensor
    fresh: torch.Tensor
    wanted: Mapping[int | None, _Wanted]
    back: list[Run]


class KvStream:
    """Asked by the thread that computes, in the order in which micro-batches attend: layer by
    layer, each in the order of the pass."""

    def __init__(self, spec: ModelSpec, kernels: Kernels, kv: StreamedKv, way: Way) -> None:
        self._kernels = kernels
        self._kv = kv
        self._way = way
        self._memory = kv.halves[0].memory.device
        self._windows = windows_of(spec)
        self._rounds: dict[int, list[_Round]] = {}  # by the first row of their micro-batch
        self._ahead = Ahead()
        self._num_taken = 0
        self._open: set[Ticket[Copy]] = set()
        self._sent_back: Event = OVER  # the last, behind all before it

    def begin(self, batch: Batch, layers: Sequence[int]) -> None:
        """A pass begins, through `layers` of the model; the first keys and values come."""
        micros = [one for one in batch.micro_batches if one.home is Home.STREAMED]
        self._rounds = self._rounds_of(micros)
        every = [
            (layer, one)
            for layer in layers
            if layer in self._kv.kinds
            for micro in micros
            for one in self._rounds[micro.first_token]
        ]
        self._num_taken = 0
        self._ahead.begin([partial(self._come, *own, n) for n, own in enumerate(every)])

    def attend(
        self, layer: int, got: Projected, options: AttentionOptions, rows: MicroBatch
    ) -> torch.Tensor:
        """What the queries of `rows` find, by head, once keys and values are written: (T, H, v).
        Waits for those that come."""
        found = []
        for one in self._rounds[rows.first_token]:
            half = self._kv.halves[self._num_taken % 2]
            self._num_taken += 1
            self._ahead.take()
            late = one.wanted[self._windows[layer]].late
            if late:
                half.memory.last_use = self._sent_back
                self._wait(self._copy(layer, half, late, Priority.DEMAND))
            found.append(self._compute(layer, half, one, got, options))
            self._send_back(layer, half, one.back)
        return found[0] if len(found) == 1 else torch.cat(found)

    def drain(self) -> None:
        """After a pass that has failed: returns when nothing moves to or from its pages."""
        self._ahead.begin(())
        with self._way.queue.changed:
            for ticket in self._open:
                self._way.queue.cancel(ticket)
        self._open.clear()
        self._memory.synchronize()
        streams = self._memory.streams
        streams.up.wait(streams.compute.record())  # kernels of a round that was not sent back
        self._sent_back = streams.up.record()
        self._sent_back.synchronize()
        for half in self._kv.halves:
            half.memory.last_use = self._sent_back

    # --- a round ----------------------------------------------------------------------------------

    def _come(self, layer: int, one: _Round, number: int) -> Wait:
        early = one.wanted[self._windows[layer]].early
        if not early:
            return lambda: None
        ticket = self._copy(layer, self._kv.halves[number % 2], early, Priority.SOON)
        return lambda: self._wait(ticket)

    def _copy(
        self, layer: int, half: Half, runs: Sequence[Run], priority: Priority
    ) -> Ticket[Copy]:
        queue, route, _ = self._way
        blocks = _blocks(self._copies(layer, half, runs), queue.block_bytes(route))
        with queue.changed:
            ticket = queue.submit(blocks, priority=priority, on_done=lambda: None)
        self._open.add(ticket)
        return ticket

    def _wait(self, ticket: Ticket[Copy]) -> None:
        queue = self._way.queue
        with queue.changed:
            queue.promote(ticket, Priority.DEMAND)
            queue.wait(lambda: ticket.state is TicketState.DONE)
        self._open.remove(ticket)

    def _compute(
        self, layer: int, half: Half, one: _Round, got: Projected, options: AttentionOptions
    ) -> torch.Tensor:
        kind, kv = self._kv.kinds[layer], half.kv
        rows = slice(one.first_row, one.first_row + one.num_rows)
        streams = self._memory.streams
        streams.compute.wait(half.memory.last_use)  # where nothing has come, which waits for it
        if len(one.fresh):
            kv.clear(kind, one.fresh)
        for store, x_TKd in zip(kv.stored(kind), (got.key_TKd, got.value_TKv), strict=False):
            self._kernels.write_rows(store, one.slots, one.offsets, x_TKd[rows])
        work = one.wanted[self._windows[layer]].work
        return self._kernels.attention(got.q_THd[rows], *kv.paged(kind), work, options)

    def _send_back(self, layer: int, half: Half, runs: Sequence[Run]) -> None:
        streams = self._memory.streams
        streams.up.wait(streams.compute.record())
        with streams.on(streams.up):
            for one in self._copies(layer, half, runs):
                assert isinstance(one.source, DeviceMemory)
                for there, here in steps(one.source, one.destination, self._way.step_bytes):
                    there.data.copy_(here.data, non_blocking=True)
        half.memory.last_use = self._sent_back = streams.up.record()

    def _copies(self, layer: int, half: Half, runs: Sequence[Run]) -> Iterator[Copy]:
        """Of those pages of a layer, from the host."""
        places = zip(self._kv.ram.places(layer), half.kv.places(self._kv.kinds[layer]), strict=True)
        for (source, size), (into, _) in places:
            for page, slot, number in runs:
                yield Copy(
                    self._kv.memory.part(source + page * size, number * size),
                    half.memory.part(into + slot * size, number * size),
                    _LABEL,
                )

    # --- a pass -----------------------------------------------------------------------------------

    def _rounds_of(self, micros: Sequence[MicroBatch]) -> dict[int, list[_Round]]:
        page_tokens, half = self._kv.ram.page_tokens, self._kv.halves[0]
        numbers, written = Numbers(), set[int]()
        made: dict[int, list[_Planned]] = {}
        for micro in micros:
            own = made[micro.first_token] = []
            for one in rounds_of(micro, page_tokens, half.num_pages):
                staged = Staged(one, page_tokens, half.nowhere)
                work = work_of(one.segments)
                wanted = {}
                for window in dict.fromkeys(self._windows.values()):
                    table = staged.table(window)
                    longest = max(map(len, table))
                    padded = (slots + (half.nowhere,) * (longest - len(slots)) for slots in table)
                    wanted[window] = (
                        _Wanted(replace(work, pages=tuple(table)), *staged.wanted(window, written)),
                        numbers.add(chain.from_iterable(padded)),
                    )
                places = [numbers.add(some) for some in (*staged.places(), staged.fresh)]
                rows = (
                    numbers.add(chain.from_iterable(map(repeat, count(), work.num_rows))),
                    numbers.add(
                        s.first_position + 1 + i for s in one.segments for i in range(s.num_tokens)
                    ),
                )
                own.append(_Planned(one.first_row, one.num_rows, places, rows, wanted, staged))
                written |= staged.written
        sent = numbers.sent(self._memory)
        return {at: [one.on_device(sent) for one in own] for at, own in made.items()}


class _Planned(NamedTuple):
    """A round whose numbers are still to be sent; which of them are which."""

    first_row: int
    num_rows: int
    places: list[int]
    rows: tuple[int, int]
    wanted: dict[int | None, tuple[_Wanted, int]]
    staged: Staged

    def on_device(self, sent: Sequence[torch.Tensor]) -> _Round:
        sequences, lengths = (sent[which] for which in self.rows)
        wanted = {}
        for window, (own, which) in self.wanted.items():
            pages_SP = sent[which].view(len(own.work.pages), -1)
            tables = WorkTables(pages_SP, sequences, lengths)
            wanted[window] = own._replace(work=replace(own.work, tables=tables))
        slots, offsets, fresh = (sent[which] for which in self.places)
        return _Round(
            self.first_row, self.num_rows, slots, offsets, fresh, wanted, self.staged.back()
        )


def _blocks(copies: Iterator[Copy], most: int) -> list[Copy]:
    """The copies in as few blocks of at most `most` bytes as their order allows."""
    blocks: list[Copy] = []
    small: list[Copy] = []
    room = most
    for copy in copies:
        if copy.num_bytes > room and small:
            blocks.append(Copies(small))
            small, room = [], most
        if copy.num_bytes > most:
            blocks.append(copy)  # the queue cuts it
            continue
        small.append(copy)
        room -= copy.num_bytes
    return [*blocks, Copies(small)] if small else blocks
