"""Windlass on a Ray cluster. Names load on first use: ray is an extra, `windlass[ray]`."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Processor": "windlass.ray.processor",
    "WindlassEngineProcessorConfig": "windlass.ray.processor_config",
    "build_processor": "windlass.ray.processor",
}
__all__ = ["Processor", "WindlassEngineProcessorConfig", "build_processor"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'windlass.ray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
