"""Whoever expects experts and whoever gives them up: the engine gives the same bits, and replay
finds the engine's hits."""

import numpy as np
import pytest

from engines import engine_for, make_model, prompts, request, run_all
from windlass.build import foresight
from windlass.device.cpu import CpuDevice
from windlass.errors import UsageError
from windlass.forecast.gate import Gate
from windlass.forecast.interface import Candidates
from windlass.forecast.learned import LearnedForecast
from windlass.forecast.registry import FORECASTS
from windlass.forecast.sequence_usage import SequenceUsage
from windlass.ids import Part
from windlass.options import EXPERT_CACHE_POLICIES, EXPERT_FORECASTS, EngineOptions
from windlass.prefetch.registry import choose_policy
from windlass.replay.routing_trace import read_trace
from windlass.replay.run import Deciders, TraceRun, ratio_machine
from windlass.replay.study import forecast_of
from windlass.replay.trace_file import Trace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3_moe", path)
    return path


def answers(model, lengths=(12,), *, max_tokens=10, **options):
    """Tokens and log-probabilities, and what the engine counted."""
    options = {"moe_expert_cache_size": "3", "max_num_seqs": 2, **options}
    with engine_for(model, **options) as engine:
        asked = [
            request(f"r{i}", prompt, max_tokens=max_tokens, logprobs=2)
            for i, prompt in enumerate(prompts(lengths))
        ]
        results = run_all(engine, asked)
        stats = engine.stats()
    said = {
        name: (one.outputs[0].token_ids, repr(one.outputs[0].logprobs))
        for name, one in results.items()
    }
    return said, stats


@pytest.fixture(scope="module")
def plain(model):
    return answers(model, (12, 7))[0]


@pytest.mark.parametrize("name", EXPERT_FORECASTS)
def test_answers_are_the_same_whoever_expects_experts(name, model, plain, tmp_path):
    options = {"expert_map_store": tmp_path / "maps"} if name == "finemoe" else {}
    assert answers(model, (12, 7), expert_forecast=name, **options)[0] == plain
    assert (tmp_path / "maps").exists() == bool(options)


@pytest.mark.parametrize("name", EXPERT_CACHE_POLICIES)
def test_answers_are_the_same_whoever_gives_experts_up(name, model, plain):
    assert answers(model, (12, 7), expert_cache_policy=name)[0] == plain


class Liar(SequenceUsage):
    """Is sure of what did not come lately, and wants all of it read; or says whatever it likes."""

    def __init__(self, table, *, is_random):
        super().__init__(table)
        self._random = np.random.default_rng(0) if is_random else None

    def begin(self, batch, embedded_TD=None):
        super().begin(batch, embedded_TD)
        for told in (self.outlook.now, self.outlook.next, self.outlook.usage):
            told[:] = 1 - told if self._random is None else self._random.random(len(told))

    def candidates(self, layer):
        chances = self.outlook.now
        return Candidates(np.arange(len(chances)), chances + 1.0)


@pytest.mark.parametrize("is_random", [False, True])
def test_answers_are_the_same_with_a_forecast_that_lies(is_random, model, plain, monkeypatch):
    monkeypatch.setitem(
        FORECASTS, "usage", lambda setting: Liar(setting.table, is_random=is_random)
    )
    found, stats = answers(model, (12, 7), expert_forecast="usage")
    assert found == plain
    assert stats.weights.prefetch_issued > stats.weights.prefetch_used, "it was believed, and wrong"


class Unhurried(LearnedForecast):
    """Always has time, and judges soon."""

    def __init__(self, setting):
        super().__init__(setting.table, setting.hidden_size, window=4)

    def begin(self, batch, embedded_TD):
        super().begin(batch, embedded_TD)
        self._drain()

    def observe(self, tokens):
        super().observe(tokens)
        self._drain()

    def _drain(self):
        while self.work():
            pass


@pytest.mark.parametrize("is_random", [False, True])
def test_gates_that_lie_are_switched_off_and_say_so(is_random, model, monkeypatch):
    """The contrary of what they believe, or anything."""
    plain, _ = answers(model, (12, 7), max_tokens=36)
    random, honest = np.random.default_rng(0), Gate.foretell

    def lie(gate, x_TD, rate_TE=None):
        told = honest(gate, x_TD, rate_TE)
        q_TE = told.said.chances_TE
        lies_TE = random.random(q_TE.shape) if is_random else 1 - q_TE
        return told._replace(said=told.said._replace(chances_TE=lies_TE))

    monkeypatch.setattr(Gate, "foretell", lie)
    # it goes by seconds: how long passes take here shall decide nothing
    monkeypatch.setattr(foresight, "WindowGuard", lambda: None)
    monkeypatch.setitem(FORECASTS, "learned", Unhurried)
    found, stats = answers(model, (12, 7), max_tokens=36)
    assert found == plain
    assert stats.forecast_sources == (
        "forecasts on: none; off, no better than without them: 1 layer ahead, of the next token,"
        " as a token begins"
    )


@pytest.mark.parametrize("policy", ["next-use", "lru", "mrs"])
def test_replay_finds_the_hits_of_the_engine(policy, model, tmp_path):
    path = tmp_path / "t"
    stats = answers(
        model, expert_forecast="off", expert_cache_policy=policy, routing_trace=path,
        max_num_seqs=1, max_tokens=60,
        device=CpuDevice(1),  # one lane: experts come in the order of demand
    )[1].weights  # fmt: skip
    trace = read_trace(Trace(path))
    slots = 3 * len(trace.table().layers)
    forecast = forecast_of(trace, "off")
    by = Deciders(forecast, *choose_policy(policy, forecast.outlook, slots))
    values = TraceRun(trace, ratio_machine(trace, slots, 3.0), by).run().values
    assert values["requests"].sum() == stats.requests[Part.EXPERT]
    # what was under way when it was asked for was found too: how fast the disk was is no matter
    found = stats.hits[Part.EXPERT] + stats.prefetch_late
    engine_hits = found / stats.requests[Part.EXPERT]
    replayed = (values["hits"].sum() + values["late"].sum()) / values["requests"].sum()
    # what the engine reads ahead for certain may or may not be in time
    assert replayed == pytest.approx(engine_hits, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_forecast": "luck"}, "expert_forecast: got 'luck', allowed learned"),
        ({"expert_cache_policy": "fifo"}, "expert_cache_policy: got 'fifo', allowed next-use"),
        ({"expert_map_store": "x"}, "expert_map_store: got one beside expert_forecast learned"),
    ],
)
def test_names_that_nobody_has_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        EngineOptions(**options)
