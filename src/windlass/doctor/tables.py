"""What `windlass doctor` found: the environment, the profile, and the measurements behind it, as
JSON and for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windlass.doctor.environment import Disk, Environment
from windlass.doctor.timing import NOISY_SPREAD, noise_line
from windlass.errors import UsageError
from windlass.hardware.profile import Curve, HardwareProfile, Processor
from windlass.units import counted, format_bytes, format_seconds

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`disk_rates`: bytes/s by (bytes of a read, reads in flight). `others`: cores that other
    processes kept busy meanwhile. `notes`: what limits a measurement, in words."""

    environment: Environment
    profile: HardwareProfile
    disk_rates: Mapping[tuple[int, int], float]
    disk_mode: str
    others: float
    seconds: float  # that measuring took
    notes: tuple[str, ...] = ()

    @property
    def noise(self) -> str | None:
        """One line where the machine was not quiet."""
        cores = self.environment.machine_cores
        return noise_line(dict(self.profile.spread), self.others, cores)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "environment": self.environment.to_json(),
            "profile": self.profile.to_json(),
            "disk_rates": [[*key, rate] for key, rate in self.disk_rates.items()],
            "disk_mode": self.disk_mode,
            "others": self.others,
            "noise": self.noise,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, document: Any) -> "Report":
        """Reads `to_json` back. UsageError where it is not one of this version."""
        try:
            if document["version"] != FORMAT_VERSION:
                raise UsageError(f"report: got version {document['version']}")
            found = dict(document["environment"])
            found["features"], found["limits"] = tuple(found["features"]), tuple(found["limits"])
            environment = Environment(**{**found, "disk": Disk(**found["disk"])})
            return cls(
                environment=environment,
                profile=HardwareProfile.from_json(document["profile"]),
                disk_rates={(size, depth): rate for size, depth, rate in document["disk_rates"]},
                disk_mode=document["disk_mode"],
                others=document["others"],
                seconds=document["seconds"],
                notes=tuple(document["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"report: not as written by windlass doctor: {error}") from error

    def lines(self) -> list[str]:
        """For people: environment, then tables of medians with their spreads."""
        profile = self.profile
        lines = [*_environment_lines(self.environment), "", *self._disk_lines()]
        lines += ["", *_processor_lines(profile.host, profile.spread, "")]
        if profile.device is not None:
            lines += ["", *_processor_lines(profile.device, profile.spread, "device ")]
        lines += _link_lines(profile)
        lines += ["", f"measured in {format_seconds(self.seconds)}, {profile.captured}"]
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, self.noise] if self.noise else lines

    def _disk_lines(self) -> list[str]:
        depths = sorted({depth for _, depth in self.disk_rates})
        sizes = sorted({size for size, _ in self.disk_rates})
        rows = [
            [
                format_bytes(size),
                *(
                    f"{_giga(self.disk_rates[size, depth])}"
                    f" {_spread(self.profile.spread, disk_name(size, depth))}"
                    for depth in depths
                ),
            ]
            for size in sizes
        ]
        how = "direct" if self.disk_mode == "dio" else "buffered: direct I/O is refused here"
        head = (f"disk, GB/s ({how})", *(f"{depth} in flight" for depth in depths))
        return [
            *table(head, rows),
            f"taken: {self.profile.disk_in_flight} reads in flight",
        ]


def disk_name(size: int, depth: int) -> str:
    """Of a measurement, in `HardwareProfile.spread`."""
    return f"disk {size} bytes, {depth} in flight"


def _environment_lines(found: Environment) -> list[str]:
    limits = ", ".join(format_bytes(limit) for limit in found.limits) or "none"
    disk = found.disk
    return [
        f"processor: {found.cpu}; {' '.join(found.features) or 'no known features'};"
        f" cache {found.cache}",
        f"cores: {found.cores} of {found.machine_cores};"
        f" {counted(found.threads, 'thread')} to compute",
        f"memory: {format_bytes(found.memory_bytes)}, {format_bytes(found.available_bytes)}"
        f" available; limits on this process: {limits}",
        f"kernels: {found.kernels}",
        f"software: windlass {found.windlass}, torch {found.torch}, Python {found.python},"
        f" {found.system}",
        f"disk: {disk.path} on {disk.mount} ({disk.file_system}, {disk.device}),"
        f" {format_bytes(disk.free_bytes)} of {format_bytes(disk.total_bytes)} free",
        f"GPU: {found.gpu or 'none'}",
    ]


def _processor_lines(processor: Processor, spread: Mapping[str, float], prefix: str) -> list[str]:
    lines = [f"{processor.name}, {format_bytes(processor.memory_bytes)} of memory"]
    singles = (
        ("memory read, GB/s", processor.memory_rate / 1e9, f"{prefix}memory"),
        ("decode attention, GB/s of KV cache", processor.decode_attention / 1e9,
         f"{prefix}decode attention"),
        ("prefill attention, GFLOP/s", processor.prefill_attention / 1e9,
         f"{prefix}prefill attention"),
        ("norms, rotation, routing, sums, GB/s", processor.row_rate / 1e9, ""),
        ("overhead of a module's call, us", processor.call_s * 1e6, f"{prefix}call"),
        ("  of each expert in it, us", processor.expert_s * 1e6, ""),
    )  # fmt: skip
    rows = [[name, f"{value:.1f} {_spread(spread, key)}"] for name, value, key in singles]
    if (beside := processor.attention_beside_copies) is not None:
        shown = f"{beside / 1e9:.1f} {_spread(spread, 'decode attention beside copies')}"
        rows.insert(2, ["  while both links are busy", shown])
    lines += table(("", ""), rows)[2:]
    for title, name in (("expert networks", "experts"), ("dense products", "dense")):
        curves: Mapping[str, Curve] = getattr(processor, name)
        sizes = [round(size) for size, _ in next(iter(curves.values())).points]
        cells = [
            [
                kind,
                *(
                    f"{curve.at(rows) / 1e9:.0f}"
                    f" {_spread(spread, f'{prefix}{name} {kind}, {rows} rows')}"
                    for rows in sizes
                ),
            ]
            for kind, curve in curves.items()
        ]
        head = (f"{title}, GFLOP/s by rows", *(str(rows) for rows in sizes))
        lines += ["", *table(head, cells)]
    return lines


def _link_lines(profile: HardwareProfile) -> list[str]:
    if profile.down is None or profile.up is None:
        return []
    sizes = [size for size, _ in profile.down.rate.points]
    rows = []
    for name, link in (("host to device", profile.down), ("device to host", profile.up)):
        curves = ("pinned", link.rate), ("pinned, alone", link.alone), ("pageable", link.pageable)
        for how, curve in curves:
            if curve is not None:
                rows.append([f"{name}, {how}", *(_giga(curve.at(size)) for size in sizes)])
    return ["", *table(("links, GB/s by copy", *(format_bytes(size) for size in sizes)), rows)]


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.2f}"


def _spread(spread: Mapping[str, float], name: str) -> str:
    """`+-12%`, marked where it is large; empty where it is not known."""
    share = spread.get(name)
    if share is None:
        return ""
    return f"±{50 * share:.0f}%{'!' if share > NOISY_SPREAD else ' '}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned right, the first one left."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
    return [lines[0], "-" * sum(widths, 2 * (len(widths) - 1)), *lines[1:]]
