"""Machines that one does not have: a TOML file of a few numbers, from which a profile's curves are
derived. Files beside this one ship with the package; every number in them says where it comes from.

Rates at n rows follow the roofline of a processor and its own memory (MoE-Lightning, arXiv
2411.11217, Eq. 8): min(FLOP/s, n * 2 FLOP per weight / bytes per weight * bytes/s).
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.hardware.assumed import ROW_SHARE
from windlass.hardware.profile import Curve, HardwareProfile, LinkRates, Processor

FOLDER = Path(__file__).parent / "presets"
_ALSO = {"4090": "rtx4090"}  # what a preset is called besides
# Stored, scales included: groups of 128 (fp8: 128 x 128, mxfp4: 32)
BYTES_PER_WEIGHT = {
    "bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "fp8": 1.0, "mxfp4": 0.53, "int8": 1.02,
    "int4": 0.52, "gptq": 0.52, "awq": 0.52,
}  # fmt: skip
_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
_SIZES = tuple(1 << power for power in range(16, 29, 2))  # 64 KiB to 256 MiB

_NUMBER, _TEXT = (int, float), (str,)
_KEYS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "": {"name": _TEXT, "source": _TEXT},
    "disk": {"rate": _NUMBER, "latency": _NUMBER, "in_flight": (int,)},
    "processor": {
        "name": _TEXT, "memory": (int,), "memory_rate": _NUMBER, "flops": _NUMBER,
        "flops32": _NUMBER, "decode_attention": _NUMBER, "prefill_attention": _NUMBER,
        "call": _NUMBER,
    },
    "host": {"threads": (int,)},
    "link": {"rate": _NUMBER, "pageable": _NUMBER, "latency": _NUMBER},
}  # fmt: skip


def preset_names() -> list[str]:
    """What ships."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_machine(name: str) -> HardwareProfile:
    """A preset by name, or a file: .toml as presets are, .json as `windlass doctor --json` prints
    (or the profile in it). UsageError where it is neither, or not well formed."""
    preset = _ALSO.get(name.lower(), name.lower())
    path = FOLDER / f"{preset}.toml"
    if preset not in preset_names():
        path = Path(name).expanduser()
        if path.suffix not in (".toml", ".json") or not path.is_file():
            raise UsageError(
                f"machine: got {name!r}, allowed {', '.join(preset_names())}, or a file .toml or"
                " .json"
            )
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"machine {path}: cannot be read: {error}") from error
    if path.suffix == ".toml":
        return profile_of(document, what=f"machine {path.name}")
    if isinstance(document, dict) and isinstance(document.get("profile"), dict):
        document = document["profile"]
    return HardwareProfile.from_json(document, what=f"machine {path.name}")


def in_fp32(profile: HardwareProfile) -> HardwareProfile:
    """A preset whose device multiplies rows of fp32, as it does unless it is told to round them:
    no faster than fp32, whatever weights are stored in."""
    device = profile.device
    if device is None:
        return profile
    best = device.dense["float32"].best
    curves = (
        {
            kind: Curve(tuple((rows, min(best, rate)) for rows, rate in curve.points))
            for kind, curve in own.items()
        }
        for own in (device.experts, device.dense)
    )
    experts, dense = curves
    attention = min(device.prefill_attention, best / 2)
    wide = replace(device, experts=experts, dense=dense, prefill_attention=attention)
    return replace(profile, device=wide)


def profile_of(document: Mapping[str, Any], *, what: str) -> HardwareProfile:
    """The profile that a preset's numbers give."""
    tables = {key for key, value in document.items() if isinstance(value, dict)}
    allowed = {"disk", "host", "device", "link"}
    if unknown := sorted(tables - allowed):
        raise UsageError(f"{what}: unknown table: {unknown[0]}, allowed {', '.join(allowed)}")
    top = _values({k: v for k, v in document.items() if k not in tables}, _KEYS[""], what)
    disk = _values(document.get("disk"), _KEYS["disk"], f"{what}: disk")
    own = _values(document.get("host"), {**_KEYS["processor"], **_KEYS["host"]}, f"{what}: host")
    device = down = up = None
    if "device" in document:
        values = _values(document["device"], _KEYS["processor"], f"{what}: device")
        device = _processor(values)
        links = document.get("link")
        links = links if isinstance(links, dict) else {}
        if unknown := sorted(set(links) - {"down", "up"}):
            raise UsageError(f"{what}: link: unknown key: {unknown[0]}, allowed down, up")
        down, up = (
            _link(_values(links.get(name), _KEYS["link"], f"{what}: link.{name}"))
            for name in ("down", "up")
        )
    return HardwareProfile(
        name=top["name"],
        captured="",
        software="",
        threads=own["threads"],
        source=top["source"],
        disk=_disk(disk),
        disk_in_flight=disk["in_flight"],
        disk_path="",
        host=_processor(own),
        device=device,
        down=down,
        up=up,
    )


def _values(table: Any, known: Mapping[str, tuple[type, ...]], what: str) -> dict[str, Any]:
    """All of `known`, and nothing else, each of its type and positive."""
    if not isinstance(table, Mapping):
        raise UsageError(f"{what} is missing")
    if unknown := sorted(set(table) - set(known)):
        raise UsageError(f"{what}: unknown key: {unknown[0]}, allowed {', '.join(sorted(known))}")
    for name, types in known.items():
        value = table.get(name)
        if isinstance(value, bool) or not isinstance(value, types):
            words = "text" if str in types else "a number" if float in types else "a whole number"
            raise UsageError(f"{what}: {name}: got {value!r}, allowed {words}")
        if str not in types and not 0 < float(table[name]) < float("inf"):
            raise UsageError(f"{what}: {name}: got {value!r}, allowed a positive number")
    return dict(table)


def _processor(values: Mapping[str, Any]) -> Processor:
    curves = {
        kind: _product_curve(
            num_bytes,
            values["flops32"] if kind == "float32" else values["flops"],
            values["memory_rate"],
        )
        for kind, num_bytes in BYTES_PER_WEIGHT.items()
    }
    return Processor(
        name=values["name"],
        memory_bytes=values["memory"],
        memory_rate=values["memory_rate"],
        experts=curves,
        dense=curves,
        decode_attention=values["decode_attention"],
        prefill_attention=values["prefill_attention"],
        row_rate=ROW_SHARE * values["memory_rate"],
        call_s=values["call"],
        expert_s=values["call"] / 4,
    )


def _product_curve(bytes_per_weight: float, flops: float, memory_rate: float) -> Curve:
    return Curve(
        tuple((rows, min(flops, 2 * rows / bytes_per_weight * memory_rate)) for rows in _ROWS)
    )


def _disk(values: Mapping[str, Any]) -> Curve:
    """Several reads share the rate; each waits its latency first."""
    depth, rate, latency = values["in_flight"], values["rate"], values["latency"]
    return Curve(tuple((n, depth * n / (latency + depth * n / rate)) for n in _SIZES[:5]))


def _link(values: Mapping[str, Any]) -> LinkRates:
    """A copy takes its latency, then its bytes over the rate."""
    pinned, pageable = (
        Curve(tuple((n, n / (values["latency"] + n / values[name])) for n in _SIZES))
        for name in ("rate", "pageable")
    )
    return LinkRates(rate=pinned, pageable=pageable)
