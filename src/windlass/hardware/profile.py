"""What a machine can do, in numbers: rates over sizes, memory, links. Measured by windlass.doctor
or written down in a preset; the planner knows a machine by this alone."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from windlass.errors import UsageError

FORMAT_VERSION = 2
ASSUMED = "assumed"  # the `source` of rates that nobody has measured


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate over a size: points (size, rate), sizes ascending, all positive."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        values = [value for point in self.points for value in point]
        if not self.points or any(not math.isfinite(v) or v <= 0 for v in values):
            raise UsageError(f"curve: got {self.points}, allowed pairs of positive finite numbers")
        if any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
            raise UsageError(f"curve: got sizes {sizes}, allowed ascending ones")

    def at(self, size: float) -> float:
        """The rate at `size`: linear in log2 of the size between points, constant outside."""
        (low, rate), (high, last) = self.points[0], self.points[-1]
        if size <= low:
            return rate
        if size >= high:
            return last
        for (low, rate), (high, last) in zip(self.points, self.points[1:], strict=False):
            if size <= high:
                share = math.log2(size / low) / math.log2(high / low)
                return rate + share * (last - rate)
        raise AssertionError("sizes ascend")

    @property
    def best(self) -> float:
        """The highest rate."""
        return max(rate for _, rate in self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computes, and its memory. Rates are those of all its threads together. The keys of
    `experts` and `dense` are kinds of weights: "bfloat16", "float16", "float32", "fp8", "mxfp4",
    "int8", "int4", "gptq", "awq"; their curves are FLOP/s over rows (of one expert; of a pass)."""

    name: str
    memory_bytes: int
    memory_rate: float  # bytes/s read
    experts: Mapping[str, Curve]  # whole expert networks, weights in this memory
    dense: Mapping[str, Curve]  # dense products
    decode_attention: float  # bytes/s of KV cache, one new token per sequence
    prefill_attention: float  # FLOP/s: 4 * heads * dim per query and position seen
    row_rate: float  # bytes/s of what is done row by row: norms, rotation, routing, sums
    call_s: float  # seconds that a module's call costs beside its work
    expert_s: float  # the same of each expert of a call
    captures: bool = True  # few tokens of resident layers do without these two: runtime/capture.py
    attention_beside_copies: float | None = None  # `decode_attention` while links carry weights

    def __post_init__(self) -> None:
        _check_positive(
            self, "memory_bytes", "memory_rate", "decode_attention", "prefill_attention", "row_rate"
        )
        _check_not_negative(self, "call_s", "expert_s")
        if self.attention_beside_copies is not None:
            _check_positive(self, "attention_beside_copies")
        for name in ("experts", "dense"):
            if not getattr(self, name):
                raise UsageError(f"profile: {name} of {self.name}: got none, allowed 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """One direction between host and device: bytes/s over the bytes of one copy."""

    rate: Curve  # from or to pinned memory, all copy engines busy
    pageable: Curve | None = None
    alone: Curve | None = None  # pinned, while nothing goes the other way

    @property
    def weights(self) -> Curve:
        """As large copies of one direction find it: little goes the other way beside them."""
        return self.alone or self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine. `captured`: when, ISO 8601; `software`: what it was measured with; `source`:
    "measured", or where a preset's numbers come from. `spread`: (slowest - fastest) / median of
    each measurement, by name; empty for presets."""

    name: str
    captured: str
    software: str
    threads: int
    source: str
    disk: Curve  # bytes/s over bytes of one read, cold, direct, `disk_in_flight` at a time
    disk_in_flight: int
    disk_path: str
    host: Processor
    device: Processor | None = None  # a GPU; None: the host computes
    down: LinkRates | None = None  # host to device
    up: LinkRates | None = None  # device to host
    spread: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_positive(self, "threads", "disk_in_flight")
        links = self.down is not None, self.up is not None
        if links != (self.device is not None,) * 2:
            raise UsageError("profile: a device comes with links down and up, a link with a device")

    @property
    def is_assumed(self) -> bool:
        """Whether nobody has measured it: see hardware/assumed.py."""
        return self.source == ASSUMED

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        return {
            "version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "disk": _points(self.disk),
            "host": _processor_json(self.host),
            "device": None if self.device is None else _processor_json(self.device),
            "down": None if self.down is None else _link_json(self.down),
            "up": None if self.up is None else _link_json(self.up),
            "spread": dict(self.spread),
        }

    @classmethod
    def from_json(cls, document: object, *, what: str = "profile") -> "HardwareProfile":
        """Strict: every key known and present, every value of its type. UsageError names `what`."""
        fields = _Fields(document, what, {*_PLAIN, "version", *_NESTED}, optional=_OPTIONAL)
        version = fields.value("version", int)
        if version != FORMAT_VERSION:
            raise UsageError(f"{what}: version: got {version}, allowed {FORMAT_VERSION}")
        device, down, up = (fields.document.get(name) for name in ("device", "down", "up"))
        return cls(
            **{name: fields.value(name, kind) for name, kind in _PLAIN.items()},
            disk=fields.curve("disk"),
            host=_processor(fields.document["host"], f"{what}: host"),
            device=None if device is None else _processor(device, f"{what}: device"),
            down=None if down is None else _link(down, f"{what}: down"),
            up=None if up is None else _link(up, f"{what}: up"),
            spread=_numbers(fields.document.get("spread", {}), f"{what}: spread"),
        )

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=1) + "\n"


_PLAIN: dict[str, type] = {
    "name": str, "captured": str, "software": str, "threads": int, "source": str,
    "disk_in_flight": int, "disk_path": str,
}  # fmt: skip
_OPTIONAL = {"device", "down", "up", "spread"}
_CAPTURES = {"captures", "repeats"}  # the second is what it was called
_BESIDE = "attention_beside_copies"
_NESTED = {"disk", "host", *_OPTIONAL}
_PROCESSOR: dict[str, type] = {
    "name": str, "memory_bytes": int, "memory_rate": float, "decode_attention": float,
    "prefill_attention": float, "row_rate": float, "call_s": float, "expert_s": float,
}  # fmt: skip


class _Fields:
    """A JSON object whose keys are checked."""

    def __init__(
        self, document: object, what: str, known: set[str], *, optional: Iterable[str] = ()
    ) -> None:
        if not isinstance(document, dict):
            raise UsageError(f"{what}: got a {type(document).__name__}, allowed an object")
        if unknown := sorted(set(map(str, document)) - known):
            raise UsageError(
                f"{what}: unknown key: {unknown[0]}, allowed {', '.join(sorted(known))}"
            )
        if missing := sorted(known - set(optional) - set(document)):
            raise UsageError(f"{what}: {missing[0]} is missing")
        self.document: dict[str, Any] = document
        self._what = what

    def value(self, name: str, kind: type) -> Any:
        value = self.document[name]
        allowed = (int, float) if kind is float else (kind,)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed):
            raise UsageError(f"{self._what}: {name}: got {value!r}, allowed a {kind.__name__}")
        return kind(value)

    def curve(self, name: str) -> Curve:
        return _curve(self.document[name], f"{self._what}: {name}")


def _curve(document: object, what: str) -> Curve:
    try:
        points = tuple((float(size), float(rate)) for size, rate in document)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise UsageError(f"{what}: got {document!r}, allowed pairs [size, rate]") from None
    try:
        return Curve(points)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None


def _curves(document: object, what: str) -> dict[str, Curve]:
    if not isinstance(document, dict):
        raise UsageError(f"{what}: got {document!r}, allowed a curve for each kind of weights")
    return {str(kind): _curve(points, f"{what}: {kind}") for kind, points in document.items()}


def _numbers(document: object, what: str) -> dict[str, float]:
    if not isinstance(document, dict) or not all(
        isinstance(value, int | float) for value in document.values()
    ):
        raise UsageError(f"{what}: got {document!r}, allowed numbers by name")
    return {str(name): float(value) for name, value in document.items()}


def _processor(document: object, what: str) -> Processor:
    optional = {*_CAPTURES, _BESIDE}
    fields = _Fields(
        document, what, {*_PROCESSOR, "experts", "dense", *optional}, optional=optional
    )
    has_beside = fields.document.get(_BESIDE) is not None
    return Processor(
        **{name: fields.value(name, kind) for name, kind in _PROCESSOR.items()},
        experts=_curves(fields.document["experts"], f"{what}: experts"),
        dense=_curves(fields.document["dense"], f"{what}: dense"),
        captures=all(fields.value(name, bool) for name in _CAPTURES if name in fields.document),
        attention_beside_copies=fields.value(_BESIDE, float) if has_beside else None,
    )


def _link(document: object, what: str) -> LinkRates:
    others = ("pageable", "alone")
    fields = _Fields(document, what, {"rate", *others}, optional=others)
    found = {name: fields.document.get(name) for name in others}
    return LinkRates(
        rate=fields.curve("rate"),
        **{name: None if one is None else fields.curve(name) for name, one in found.items()},
    )


def _processor_json(processor: Processor) -> dict[str, Any]:
    return {
        **{name: getattr(processor, name) for name in _PROCESSOR},
        "experts": {kind: _points(curve) for kind, curve in processor.experts.items()},
        "dense": {kind: _points(curve) for kind, curve in processor.dense.items()},
        "captures": processor.captures,
        **(
            {}
            if processor.attention_beside_copies is None
            else {_BESIDE: processor.attention_beside_copies}
        ),
    }


def _link_json(link: LinkRates) -> dict[str, Any]:
    others = {"pageable": link.pageable, "alone": link.alone}
    return {
        "rate": _points(link.rate),
        **{name: None if one is None else _points(one) for name, one in others.items()},
    }


def _points(curve: Curve) -> list[list[float]]:
    return [list(point) for point in curve.points]


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not math.isfinite(value) or value <= 0:
            raise UsageError(f"profile: {name}: got {value}, allowed a positive number")


def _check_not_negative(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"profile: {name}: got {value}, allowed 0 or more")
