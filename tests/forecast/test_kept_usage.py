"""Usage that outlives a run: counts, in a file that may go."""

import json
from pathlib import Path

import numpy as np
import pytest

from engines import engine_for, make_model, prompts, request, run_all
from routing import told
from windlass.errors import UsageError
from windlass.forecast.interface import ExpertTable
from windlass.forecast.kept_usage import KeptUsage
from windlass.ids import Part
from windlass.options import EngineOptions

TABLE = ExpertTable([4, 0, 4], top_k=2)


def test_counts_add_up_from_run_to_run_and_fade(tmp_path):
    path = tmp_path / "deep" / "usage.json"
    first = KeptUsage(path, "m", TABLE)
    assert first.tokens == 0 and not first.shares.any()
    first.observe(told(0, {1: 6, 2: 4}, 4))
    first.observe(told(2, {3: 10}, 4))
    first.save()
    second, other = KeptUsage(path, "m", TABLE), KeptUsage(path, "m", TABLE)
    assert second.tokens == 5
    assert second.shares.tolist() == [0, 1.2, 0.8, 0, 0, 0, 0, 2]
    for one in (second, other):  # two runs at once: nobody's counts are lost
        one.observe(told(0, {0: 2}, 4))
        one.save()
        one.save()
    assert KeptUsage(path, "m", TABLE).tokens == 7
    many = KeptUsage(path, "m", TABLE)
    many.observe(told(0, {0: 10**9}, 4))
    many.save()
    assert KeptUsage(path, "m", TABLE).tokens == pytest.approx(1 << 20, rel=1e-3), "bounded"
    assert path.stat().st_size < 1000


def test_a_file_of_another_model_counts_as_none_and_a_foreign_one_is_an_error(tmp_path):
    path = tmp_path / "usage.json"
    own = KeptUsage(path, "m", TABLE)
    own.observe(told(0, {1: 6}, 4))
    own.save()
    assert KeptUsage(path, "another", TABLE).tokens == 0
    assert KeptUsage(path, "m", ExpertTable([4, 0, 5], top_k=2)).tokens == 0
    document = json.loads(path.read_text())
    spoilt: tuple[object, ...] = (
        [-1.0] * 8, ["1"] * 7 + ["x"], {}, [[1], [2, 3]], [10**400] * 8, [1e999] * 8,
    )  # fmt: skip
    for counts in spoilt:
        path.write_text(json.dumps(document | {"counts": counts}))
        assert KeptUsage(path, "m", TABLE).tokens == 0
    path.write_text('{"prompts": []}')
    with pytest.raises(UsageError, match="no file of usage: delete it"):
        KeptUsage(path, "m", TABLE)
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot read"):
        KeptUsage(path, "m", TABLE)


def _run(path: Path, usage: Path | str) -> tuple[dict[str, tuple[int, ...]], set[int]]:
    """Answers, and the places of experts that are in memory before the first pass."""
    with engine_for(path, moe_expert_cache_size="4", expert_usage=usage) as engine:
        store = engine._weights
        with store._changed:
            store._queue.wait(lambda: store._queue.bytes_in_flight == 0)
            keys = [key for key in store.cache._resident.entries if key.part is Part.EXPERT]
        asked = [request("0", prompts((6,))[0], max_tokens=8, temperature=0.8, seed=3)]
        found = {name: out.outputs[0].token_ids for name, out in run_all(engine, asked).items()}
        engine.check()
    return found, {8 * key.layer + key.index for key in keys}


def test_the_next_run_begins_with_what_the_last_one_used_most_and_answers_the_same(tmp_path):
    model, usage = tmp_path / "model", tmp_path / "usage.json"
    make_model("mixtral", model)
    cold, nothing = _run(model, usage)
    counts = np.array(json.loads(usage.read_text())["counts"])
    warm, held = _run(model, usage)
    off, still_nothing = _run(model, "off")
    assert warm == cold == off
    assert not nothing and not still_nothing
    assert len(counts) % 8 == 0 and len(held) == len(counts) // 2, "the pool is full"
    rest = counts[[place for place in range(len(counts)) if place not in held]]
    assert counts[sorted(held)].min() >= rest.max()


def test_files_that_are_written_have_places_of_their_own(tmp_path):
    with pytest.raises(UsageError, match="which routing_trace names too"):
        EngineOptions(routing_trace=tmp_path / "a", expert_usage=tmp_path / "b" / ".." / "a")
    EngineOptions(routing_trace=tmp_path / "a", expert_usage=tmp_path / "b")
    for value in ("4", 4.0, True):
        with pytest.raises(UsageError, match="burst_tokens: got .*, allowed a whole number"):
            EngineOptions(burst_tokens=value)  # type: ignore[arg-type]


def test_a_store_of_maps_in_no_possible_place_is_refused_before_anything_runs(tmp_path):
    model = tmp_path / "model"
    make_model("mixtral", model)
    (tmp_path / "file").write_text("")
    options = {"expert_forecast": "finemoe", "expert_map_store": tmp_path / "file" / "maps"}
    with pytest.raises(UsageError, match="expert_map_store: got"):
        engine_for(model, moe_expert_cache_size="4", **options)
