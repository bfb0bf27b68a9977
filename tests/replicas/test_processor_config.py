"""What a processor for Ray Data is told, checked before anything runs."""

from typing import Any

import pytest

from windlass.errors import UsageError
from windlass.ray import WindlassEngineProcessorConfig


def test_a_replica_is_opened_as_told() -> None:
    config = WindlassEngineProcessorConfig(
        model_source="/models/Small-MoE",
        engine_kwargs={"host_memory": "1GiB", "max_num_seqs": 8},
        concurrency=(1, 3),
        created=7,
        num_gpus=0.5,
    )
    spec = config.spec()
    assert (spec.options.model, spec.options.host_memory) == ("/models/Small-MoE", 1 << 30)
    assert (spec.options.max_num_seqs, spec.options.expert_usage) == (8, "auto")
    assert spec.served_names == ("Small-MoE", "/models/Small-MoE") and spec.created == 7
    assert config.replicas == (1, 3) and config.for_actors() == {"num_gpus": 0.5}


@pytest.mark.parametrize(
    "source, name",
    [("demo", "demo"), ("org/model@main", "org/model"), ("/a/models--o--n/snapshots/1", "o/n")],
)
def test_answers_tell_the_models_name(source: str, name: str) -> None:
    assert WindlassEngineProcessorConfig(model_source=source).spec().served_names[0] == name


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"batch_size": 0}, "batch_size: got 0, allowed a whole number of 1 or more"),
        ({"max_concurrent_batches": True}, "max_concurrent_batches: got True"),
        ({"concurrency": (2, 1)}, "concurrency: got (2, 1), allowed the smaller one first"),
        ({"concurrency": 2}, "without a memory budget"),
        ({"engine_kwargs": {"host_memry": 1}}, "did you mean host_memory?"),
        ({"engine_kwargs": {"model": "a"}}, "engine_kwargs: got model, allowed as model_source"),
    ],
)
def test_settings_that_cannot_work(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        WindlassEngineProcessorConfig(model_source="demo", **fields)
    assert words in str(caught.value)
