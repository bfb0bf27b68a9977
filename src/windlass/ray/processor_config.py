"""How answers for Ray Data are computed. Knows no ray."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.llm import checked_args
from windlass.options import EngineOptions, model_name
from windlass.protocol.answers import AUTO
from windlass.ray.messages import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WindlassEngineProcessorConfig:
    """`model_source`: "demo", a folder that every node has, or a name on the hub. `engine_kwargs`:
    keywords of `windlass.LLM`.

    `batch_size` rows are handed on at once, and an actor has up to `max_concurrent_batches` under
    way: together they should be more than the sequences of an engine. `concurrency`: replicas, each
    an actor with an engine of its own; a pair lets Ray choose. More than one may come to one node,
    so `engine_kwargs` must have a `host_memory` then.

    `should_continue_on_error`: a row without an answer has the reason in its column
    `__inference_error__`, which all others have empty. Else the first such row raises.

    `id_column`: of the input, names each row: what it draws without a `seed` depends on its name.
    Without it the column `custom_id` does, and else the request itself: equal requests have equal
    answers then. `created`: seconds since 1970 that answers and chat templates tell, None for now.
    The rest is Ray's, for the actors."""

    model_source: str
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    max_concurrent_batches: int = 8
    concurrency: int | tuple[int, int] = 1
    should_continue_on_error: bool = False
    id_column: str | None = None
    created: int | None = None
    served_model_name: str | None = None
    max_retries: int = 2
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: float | None = None
    accelerator_type: str | None = None
    resources: Mapping[str, float] | None = None
    runtime_env: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_concurrent_batches"):
            _check_count(name, getattr(self, name))
        for count in self.replicas:
            _check_count("concurrency", count)
        least, most = self.replicas
        if least > most:
            raise UsageError(f"concurrency: got {self.concurrency}, allowed the smaller one first")
        options = self.options  # names and values are checked here
        if most > 1 and options.host_memory is None:
            raise UsageError(
                f"concurrency: got {self.concurrency} without a memory budget, allowed with"
                ' engine_kwargs={"host_memory": ...}: several replicas may come to one node'
            )

    @property
    def replicas(self) -> tuple[int, int]:
        """The fewest and the most."""
        own = self.concurrency
        return own if isinstance(own, tuple) else (own, own)

    @property
    def options(self) -> EngineOptions:
        own = {"expert_usage": "auto", **checked_args(self.engine_kwargs)}
        if "model" in own:
            raise UsageError("engine_kwargs: got model, allowed as model_source")
        return EngineOptions(model=self.model_source, **own)

    def spec(self) -> ReplicaSpec:
        """How each replica opens its engine."""
        is_folder = Path(self.model_source).expanduser().is_absolute()
        name = model_name(Path(self.model_source)) if is_folder else self.model_source
        name = name.partition("@")[0]
        return ReplicaSpec(
            options=self.options,
            served_names=(self.served_model_name or name, self.model_source),
            created=int(time.time()) if self.created is None else self.created,
            max_retries=self.max_retries,
            tool_call_parser=self.tool_call_parser,
            reasoning_parser=self.reasoning_parser,
        )

    def for_actors(self) -> dict[str, Any]:
        """What Ray's `map_batches` is told of them."""
        names = ("num_cpus", "num_gpus", "memory", "accelerator_type", "resources", "runtime_env")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}: got {value!r}, allowed a whole number of 1 or more")
