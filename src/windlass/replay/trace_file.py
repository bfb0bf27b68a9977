"""A routing trace on disk: what routers decided, pass by pass. Knows numpy and no engine.

One line of JSON, the header; then records, each with its length and checksum: once the routers (in
traces with inputs), then one record for each pass. Records are appended and never changed, so a
file that a kill has cut can be read up to its last whole pass.

Shapes: T rows of a pass, A experts of a row, E experts of a layer, D hidden. Rows of an E or D are
stored as float16 and, where they are too large for it, one float32 by which they are divided.
"""

import json
import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.errors import UsageError

VERSION = 1
_MAGIC = "windlass_routing_trace"
_MOST_HEADER_BYTES = 1 << 20
_FRAME = struct.Struct("<4sIQ")  # kind, checksum of the content, its length
_PASS = struct.Struct("<QI")  # number, rows
_ROUTERS, _ROWS = b"gate", b"pass"
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
    """What all passes of a trace share. `stamp`: of the checkpoint. `inputs`: passes have what
    routers read, and the file what routers are."""

    model: str
    stamp: str
    num_layers: int
    hidden_size: int
    layers: tuple[TracedLayer, ...]
    inputs: bool = False


class Router(NamedTuple):
    """A layer's router as a linear map of the normed residual stream: its norm's weight is folded
    into its own. `bias_E` is in the scores, `select_bias_E` in the choice alone; 0 where there is
    none."""

    weight_ED: Floats
    bias_E: Floats
    select_bias_E: Floats


class TracedRouting(NamedTuple):
    """The rows of a pass at one router. Scores as `Kernels.route` defines them. `residual_TD`: the
    residual stream before the router's norm; None in a trace without inputs."""

    ids_TA: NDArray[np.uint16]  # best first
    scores_TE: Floats
    residual_TD: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TracedPass:
    """One pass. `sequences_T` are the engine's numbers of sequences, unique within a trace; a
    preempted sequence comes again with the same positions. `layers` in the header's order."""

    number: int
    sequences_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    is_prompt_T: NDArray[np.bool_]
    layers: tuple[TracedRouting, ...]
    embedded_TD: Floats | None = None  # before the first layer
    final_TD: Floats | None = None  # after the last layer, before the final norm


class TraceWriter:
    """Appends passes to a new file. UsageError if it cannot be made; `append` raises OSError, and
    what was appended before stays readable."""

    def __init__(self, path: Path, header: TraceHeader, routers: Sequence[Router] = ()) -> None:
        assert bool(routers) == header.inputs, "a trace has routers if it has inputs"
        document = {_MAGIC: VERSION, **asdict(header)}
        try:
            # every pass is one write: what has been computed survives the process
            self._file = path.open("wb", buffering=0)
            self._file.write(json.dumps(document).encode() + b"\n")
        except OSError as error:
            raise UsageError(f"routing-trace: got {str(path)!r}: {error.strerror}") from error
        self._header = header
        self.path = path
        if header.inputs:
            parts = [np.asarray(one, np.float32).tobytes() for router in routers for one in router]
            self._record(_ROUTERS, parts)

    def append(self, one: TracedPass) -> None:
        """Writes one pass."""
        parts = [
            _PASS.pack(one.number, len(one.sequences_T)),
            one.sequences_T.astype("<u4").tobytes(),
            one.positions_T.astype("<u4").tobytes(),
            one.is_prompt_T.astype(np.uint8).tobytes(),
        ]
        for routing in one.layers:
            parts.append(routing.ids_TA.astype("<u2").tobytes())
            parts += _halves(routing.scores_TE)
        for rows in (r.residual_TD for r in one.layers) if self._header.inputs else ():
            parts += _halves(rows)
        for rows in (one.embedded_TD, one.final_TD) if self._header.inputs else ():
            parts += _halves(rows)
        self._record(_ROWS, parts)

    def _record(self, kind: bytes, parts: list[bytes]) -> None:
        content = b"".join(parts)
        frame = _FRAME.pack(kind, zlib.crc32(content), len(content))
        _write_all(self._file, frame + content)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


class Trace:
    """A trace of a file, read pass by pass. UsageError for a file that is none, of another version
    or damaged. `cut_bytes`: what follows the last whole pass, where the writer was killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                line = file.readline(_MOST_HEADER_BYTES)
                self.header = self._read_header(line)
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        self._places: list[tuple[int, int]] = []  # where the passes' content lies
        self.routers: tuple[Router, ...] = ()
        at = len(line)
        while at + _FRAME.size <= len(self._data):
            kind, _, length = _FRAME.unpack_from(self._data, at)
            if kind not in (_ROUTERS, _ROWS):
                raise UsageError(f"{path}: damaged at byte {at}: not a record of a routing trace")
            if at + _FRAME.size + length > len(self._data):
                break
            if kind == _ROUTERS:
                self.routers = self._read_routers(at)
            else:
                self._places.append((at, length))
            at += _FRAME.size + length
        self.cut_bytes = len(self._data) - at

    def __len__(self) -> int:
        """Whole passes."""
        return len(self._places)

    def __iter__(self) -> Iterator[TracedPass]:
        return (self._read_pass(at) for at, _ in self._places)

    @property
    def num_rows(self) -> int:
        """Of all passes."""
        return sum(_PASS.unpack_from(self._data, at + _FRAME.size)[1] for at, _ in self._places)

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

    def _content(self, at: int) -> memoryview:
        _, checksum, length = _FRAME.unpack_from(self._data, at)
        content = memoryview(self._data)[at + _FRAME.size : at + _FRAME.size + length]
        if zlib.crc32(content) != checksum:
            raise UsageError(f"{self.path}: damaged at byte {at}: its checksum differs")
        return content

    def _read_routers(self, at: int) -> tuple[Router, ...]:
        taker, routers = _Taker(self._content(at)), []
        for layer in self.header.layers:
            shape = (layer.num_experts, self.header.hidden_size)
            vectors = ((layer.num_experts,),) * 2
            routers.append(Router(*(taker.take("<f4", *size) for size in (shape, *vectors))))
        return tuple(routers)

    def _read_pass(self, at: int) -> TracedPass:
        header, content = self.header, self._content(at)
        number, rows = _PASS.unpack_from(content)
        taker = _Taker(content[_PASS.size :])
        sequences, positions = (taker.take("<u4", rows).astype(np.int64) for _ in range(2))
        is_prompt = taker.take("u1", rows).astype(np.bool_)
        chosen = [
            (taker.take("<u2", rows, layer.top_k), taker.halves(rows, layer.num_experts))
            for layer in header.layers
        ]
        # of each layer, of the embedding and of the end
        states: list[Floats | None] = [None] * (len(chosen) + 2)
        if header.inputs:
            states = [taker.halves(rows, header.hidden_size) for _ in states]
        return TracedPass(
            number=number,
            sequences_T=sequences,
            positions_T=positions,
            is_prompt_T=is_prompt,
            layers=tuple(
                TracedRouting(ids, scores, residual)
                for (ids, scores), residual in zip(chosen, states, strict=False)
            ),
            embedded_TD=states[-2],
            final_TD=states[-1],
        )


class _Taker:
    """Takes one array after the other from bytes."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0

    def take(self, dtype: str, *shape: int) -> Any:
        count = int(np.prod(shape))
        found = np.frombuffer(self._content, dtype, count, self._at).reshape(shape)
        self._at += found.nbytes
        return found

    def halves(self, rows: int, width: int) -> Floats:
        scale_T, half_TN = self.take("<f4", rows), self.take("<f2", rows, width)
        found: Floats = half_TN.astype(np.float32)
        return found if (scale_T == 1).all() else found * scale_T[:, None]


def _halves(rows_TN: Floats | None) -> list[bytes]:
    """A number for each row, and the rows divided by it in float16."""
    assert rows_TN is not None, "a trace with inputs has all of them"
    largest_T = np.abs(rows_TN).max(axis=1, initial=0.0)
    scale_T = np.maximum(largest_T / _LARGEST_HALF, 1.0).astype("<f4")
    halves_TN = (rows_TN if (scale_T == 1).all() else rows_TN / scale_T[:, None]).astype("<f2")
    return [scale_T.tobytes(), halves_TN.tobytes()]


def _write_all(file: BinaryIO, data: bytes) -> None:
    """All of it, or OSError: a raw file may take less than it was given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
