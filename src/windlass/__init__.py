"""Windlass: Mixture-of-Experts models larger than memory. Names load on first use, so that
`import windlass` stays free of torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from windlass.version import VERSION

if TYPE_CHECKING:
    from windlass.engine.outputs import CompletionOutput, RequestOutput
    from windlass.llm import LLM
    from windlass.params import SamplingParams
    from windlass.structured import StructuredOutputs

__version__ = VERSION
__all__ = [
    "LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputs",
    "__version__",
]  # fmt: skip

_HOMES = {
    "LLM": "windlass.llm",
    "SamplingParams": "windlass.params",
    "StructuredOutputs": "windlass.structured",
    "RequestOutput": "windlass.engine.outputs",
    "CompletionOutput": "windlass.engine.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'windlass' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
