"""Windlass in Ray Data, in the shape of `ray.data.llm`: a processor maps a data set to one with
answers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.llm import checked_args
from windlass.options import EngineOptions, model_name
from windlass.protocol.answers import AUTO
from windlass.ray.actors import actor_pool
from windlass.ray.data_rows import ERROR, with_request
from windlass.ray.messages import ReplicaSpec
from windlass.ray.stage import EngineStage

Row = dict[str, Any]
RowFunction = Callable[[Row], Mapping[str, Any]]


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


class Processor:
    """Call it with a data set. Nothing runs before the result is read or written."""

    def __init__(
        self,
        config: WindlassEngineProcessorConfig,
        *,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: Mapping[str, Any],
        postprocess_map_kwargs: Mapping[str, Any],
    ) -> None:
        self.config = config
        self._spec = config.spec()
        self._before = _before(preprocess, config.id_column)
        self._after = _after(postprocess, tells_errors=config.should_continue_on_error)
        self._before_kwargs = dict(preprocess_map_kwargs)
        self._after_kwargs = dict(postprocess_map_kwargs)

    def __call__(self, dataset: Any) -> Any:
        """A `ray.data.Dataset` with answers, of one without."""
        config = self.config
        least, most = config.replicas
        asked = dataset.map(self._before, **self._before_kwargs)
        answered = asked.map_batches(
            EngineStage,
            fn_constructor_kwargs={
                "spec": self._spec, "raises": not config.should_continue_on_error,
            },
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=actor_pool(least, most, calls=config.max_concurrent_batches),
            **config.for_actors(),
        )  # fmt: skip
        return answered.map(self._after, **self._after_kwargs)


def build_processor(
    config: WindlassEngineProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """As `ray.data.llm.build_processor`. `preprocess`: of a row, what is asked, put beside its
    columns: `messages`, `prompt` or `input` with `sampling_params`, or a whole `body`.
    `postprocess`: of a row with its answer, the columns that are wanted; all, if it is None. Rows
    that failed do not go through it. The other two: for the `Dataset.map` of each."""
    if not isinstance(config, WindlassEngineProcessorConfig):
        raise UsageError(
            f"config: got {type(config).__name__}, allowed {WindlassEngineProcessorConfig.__name__}"
        )
    return Processor(
        config,
        preprocess=preprocess,
        postprocess=postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs or {},
        postprocess_map_kwargs=postprocess_map_kwargs or {},
    )


def _before(preprocess: RowFunction | None, id_column: str | None) -> Callable[[Row], Row]:
    def before(row: Row) -> Row:
        own = {**row, **preprocess(row)} if preprocess is not None else row
        return with_request(own, id_column)

    return before


def _after(postprocess: RowFunction | None, *, tells_errors: bool) -> Callable[[Row], Row]:
    def after(row: Row) -> Row:
        if row[ERROR]:
            return row
        own = {name: value for name, value in row.items() if name != ERROR}
        found = own if postprocess is None else postprocess(own)
        return {**found, ERROR: ""} if tells_errors else dict(found)

    return after


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}: got {value!r}, allowed a whole number of 1 or more")
