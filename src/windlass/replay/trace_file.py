"""A routing trace on disk: what routers decided, pass by pass. Knows numpy and no engine.

One line of JSON, the header; then records, each with its kind, checksum and length. In a trace with
inputs one says what the routers are. A pass is one record for its rows, one for each layer with
experts and one for its end. Records are written as they come and never changed, so that a pass
takes no memory and a file that a kill has cut can be read up to its last whole pass.

Shapes: T rows of a pass, A experts of a row, E experts of a layer, D hidden. Rows of E or D numbers
are float16, each row divided by a float32 beside it, which is 1 unless the row is too large.
"""

import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.errors import UsageError

VERSION = 1
_MAGIC = "windlass_routing_trace"
_MOST_HEADER_BYTES = 1 << 20
_FRAME = struct.Struct("<4sIQ")  # kind, checksum of the content, its length
_ROUTERS, _ROWS, _LAYER, _END = b"gate", b"rows", b"layr", b"done"
_PASS = struct.Struct("<QI")  # number, rows
_LARGEST_HALF = 60_000.0

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """A layer with experts. `routing`: how they are chosen, the name of its class in
    `models/spec.py`."""

    layer: int
    num_experts: int
    top_k: int
    routing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What all passes of a trace share. `stamp`: of the checkpoint. `inputs`: passes have states
    of their rows, and the file what the routers are."""

    model: str
    stamp: str
    num_layers: int
    hidden_size: int
    layers: tuple[TracedLayer, ...]
    inputs: bool = False


class Router(NamedTuple):
    """A layer's router as a linear map of the residual stream over its root mean square: all else
    of the norm is folded in. `bias_E` is in the scores, `select_bias_E` in the choice alone; 0
    where there is none."""

    weight_ED: Floats
    bias_E: Floats
    select_bias_E: Floats


class TracedRouting(NamedTuple):
    """The rows of a pass at one router. Scores as `Kernels.route` defines them. `residual_TD`: the
    residual stream before the router's norm; None in a trace without inputs."""

    ids_TA: NDArray[np.integer[Any]]  # uint16 where it was read; best first
    scores_TE: Floats
    residual_TD: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TracedPass:
    """One pass. `sequences_T` are the engine's numbers of sequences, unique within a trace; a
    preempted sequence comes again with the same positions. `layers` in the header's order. States
    are None in a trace without inputs."""

    number: int
    sequences_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    is_prompt_T: NDArray[np.bool_]
    layers: tuple[TracedRouting, ...] = ()
    embedded_TD: Floats | None = None  # before the first layer
    final_TD: Floats | None = None  # after the last layer, before the final norm


class TraceWriter:
    """Writes a new file. UsageError if it cannot be made; later a full disk is an OSError, and what
    was written before stays readable."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self.header = header
        document = {_MAGIC: VERSION, **asdict(header)}
        with ExitStack() as opened:
            try:
                # a record is one write: what was computed survives the process
                self._file = opened.enter_context(path.open("wb", buffering=0))
                self._write(json.dumps(document).encode() + b"\n")
            except OSError as error:
                raise UsageError(f"routing-trace: got {str(path)!r}: {error.strerror}") from error
            opened.pop_all()

    def add_routers(self, routers: Sequence[Router]) -> None:
        """Of all layers with experts; once."""
        assert len(routers) == len(self.header.layers) and self.header.inputs, "one for each layer"
        parts = [one.astype("<f4").tobytes() for router in routers for one in router]
        self._record(_ROUTERS, parts)

    def add(self, one: TracedPass) -> None:
        """Writes a whole pass."""
        self.begin(one)
        for routing in one.layers:
            self.add_layer(routing)
        self.end(one.final_TD)

    def begin(self, one: TracedPass) -> None:
        """Writes what is known of a pass that begins; the one before, if it has no end, is none."""
        vectors = (
            one.sequences_T.astype("<u4"), one.positions_T.astype("<u4"),
            one.is_prompt_T.astype(np.uint8),
        )  # fmt: skip
        parts = [_PASS.pack(one.number, len(one.sequences_T)), *(v.tobytes() for v in vectors)]
        self._record(_ROWS, [*parts, *self._states(one.embedded_TD)])

    def add_layer(self, routing: TracedRouting) -> None:
        """Writes the next layer with experts."""
        ids = routing.ids_TA.astype("<u2").tobytes()
        states = self._states(routing.residual_TD)
        self._record(_LAYER, [ids, *_halves(routing.scores_TE), *states])

    def end(self, final_TD: Floats | None) -> None:
        """Writes the end of the pass."""
        self._record(_END, self._states(final_TD))

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _states(self, rows_TD: Floats | None) -> list[bytes]:
        assert (rows_TD is not None) == self.header.inputs, "a trace has all inputs or none"
        return [] if rows_TD is None else _halves(rows_TD)

    def _record(self, kind: bytes, parts: list[bytes]) -> None:
        content = b"".join(parts)
        self._write(_FRAME.pack(kind, zlib.crc32(content), len(content)) + content)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # a raw file may take less than it is given
            view = view[self._file.write(view) :]


class Trace:
    """A trace of a file, read pass by pass. UsageError for a file that is none, of another version
    or damaged. `cut_bytes`: what follows the last whole record, where the writer was killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                line = file.readline(_MOST_HEADER_BYTES)
                self.header = self._read_header(line)
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        self.routers: tuple[Router, ...] = ()
        self._passes: list[list[int]] = []  # where the records of whole passes are
        self.cut_bytes = len(self._data) - self._index(len(line))

    def __len__(self) -> int:
        """Whole passes."""
        return len(self._passes)

    def __iter__(self) -> Iterator[TracedPass]:
        return map(self._read_pass, self._passes)

    @property
    def num_rows(self) -> int:
        """Of all passes."""
        return sum(_PASS.unpack_from(self._data, at + _FRAME.size)[1] for at, *_ in self._passes)

    def _index(self, at: int) -> int:
        """Finds the records from `at` on; where the last whole one ends."""
        records: list[int] = []  # of the pass under way
        while at + _FRAME.size <= len(self._data):
            kind, _, length = _FRAME.unpack_from(self._data, at)
            if kind not in (_ROUTERS, _ROWS, _LAYER, _END):
                raise UsageError(
                    f"{self.path}: damaged at byte {at}: not a record of a routing trace"
                )
            if at + _FRAME.size + length > len(self._data):
                break
            if kind == _ROUTERS:
                self.routers = self._read_routers(at)
            elif kind == _ROWS:
                records = [at]
            else:
                records.append(at)
            if kind == _END:
                self._passes.append(records)
                records = []
            at += _FRAME.size + length
        return at

    def _read_header(self, line: bytes) -> TraceHeader:
        try:
            document = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            document = None
        if not isinstance(document, dict) or _MAGIC not in document:
            raise UsageError(
                f"{self.path}: not a routing trace, allowed a file that --routing-trace wrote"
            )
        if (version := document.pop(_MAGIC)) != VERSION:
            raise UsageError(
                f"{self.path}: a routing trace of version {version!r}, allowed {VERSION}"
            )
        try:
            layers = tuple(TracedLayer(**layer) for layer in document.pop("layers"))
            return TraceHeader(layers=layers, **document)
        except (KeyError, TypeError) as error:
            raise UsageError(f"{self.path}: damaged: header of a routing trace: {error}") from None

    def _content(self, at: int) -> "_Taker":
        _, checksum, length = _FRAME.unpack_from(self._data, at)
        content = memoryview(self._data)[at + _FRAME.size : at + _FRAME.size + length]
        if zlib.crc32(content) != checksum:
            raise UsageError(f"{self.path}: damaged at byte {at}: its checksum differs")
        return _Taker(content)

    def _read_routers(self, at: int) -> tuple[Router, ...]:
        content, routers = self._content(at), []
        for layer in self.header.layers:
            shapes = ((layer.num_experts, self.header.hidden_size), *((layer.num_experts,),) * 2)
            routers.append(Router(*(content.take("<f4", *shape) for shape in shapes)))
        return tuple(routers)

    def _read_pass(self, records: list[int]) -> TracedPass:
        first, *layers, end = map(self._content, records)
        number, rows = _PASS.unpack(first.take("u1", _PASS.size))
        sequences_T, positions_T = (first.take("<u4", rows).astype(np.int64) for _ in range(2))
        is_prompt_T = first.take("u1", rows).astype(np.bool_)
        found = []
        for one, layer in zip(layers, self.header.layers, strict=True):
            ids_TA = one.take("<u2", rows, layer.top_k)
            scores_TE = one.halves(rows, layer.num_experts)
            found.append(TracedRouting(ids_TA, scores_TE, self._states(one, rows)))
        return TracedPass(
            number=number,
            sequences_T=sequences_T,
            positions_T=positions_T,
            is_prompt_T=is_prompt_T,
            layers=tuple(found),
            embedded_TD=self._states(first, rows),
            final_TD=self._states(end, rows),
        )

    def _states(self, content: "_Taker", rows: int) -> Floats | None:
        return content.halves(rows, self.header.hidden_size) if self.header.inputs else None


class _Taker:
    """Takes one array after the other from bytes."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0

    def take(self, dtype: str, *shape: int) -> Any:
        found = np.frombuffer(self._content, dtype, math.prod(shape), self._at).reshape(shape)
        self._at += found.nbytes
        return found

    def halves(self, rows: int, width: int) -> Floats:
        scale_T, half_TN = self.take("<f4", rows), self.take("<f2", rows, width)
        found: Floats = half_TN.astype(np.float32)
        return found if (scale_T == 1).all() else found * scale_T[:, None]


def _halves(rows_TN: Floats) -> list[bytes]:
    """A number for each row, and the rows divided by it."""
    largest_T = np.abs(rows_TN).max(axis=1, initial=0.0)
    scale_T = np.maximum(largest_T / _LARGEST_HALF, 1.0).astype("<f4")
    small_TN = rows_TN if (scale_T == 1).all() else rows_TN / scale_T[:, None]
    return [scale_T.tobytes(), small_TN.astype("<f2").tobytes()]
