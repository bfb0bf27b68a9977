"""What the results of batch rows depend on, as far as a command line knows it: a job goes on under
the same alone."""

from collections.abc import Mapping
from typing import Any

from windlass.hub.locate import identity_of
from windlass.options import EngineOptions, resolve_model

# everything else may change between two runs of one job
_IDENTITY = ("dtype", "kv_cache_dtype", "load_format", "generation_config", "seed",
             "tool_call_parser", "reasoning_parser")  # fmt: skip


def job_identity(values: Mapping[str, Any], engine: EngineOptions, name: str) -> dict[str, Any]:
    """`name`: the model's, in results."""
    return {
        **{key: values[key] for key in _IDENTITY},
        "checkpoint": identity_of(resolve_model(engine.model)),
        "tokenizer": identity_of(resolve_model(engine.tokenizer)) if engine.tokenizer else None,
        "served_model_name": name,
    }
