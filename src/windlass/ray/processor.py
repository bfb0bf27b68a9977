"""Windlass in Ray Data, in the shape of `ray.data.llm`: a processor maps a data set to one with
answers."""

from collections.abc import Callable, Mapping
from typing import Any

from windlass.errors import UsageError
from windlass.ray.actors import actor_pool
from windlass.ray.data_rows import ERROR, with_request
from windlass.ray.processor_config import WindlassEngineProcessorConfig
from windlass.ray.stage import EngineStage

Row = dict[str, Any]
RowFunction = Callable[[Row], Mapping[str, Any]]


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
                "cpus": 1.0 if config.num_cpus is None else config.num_cpus,
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
