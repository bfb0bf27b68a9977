"""The whole forecast on a world whose next layers can be foretold: hidden states wander, routers
read them, and each layer turns them a little."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from routing import passing, segment
from windlass.forecast.gate import BY_WORTH, FIXED, MOST_TOKENS, Source
from windlass.forecast.interface import CERTAIN, ExpertTable
from windlass.forecast.learned import LearnedForecast, forecast_bytes, sources_within
from windlass.forecast.recall import BEFORE, OWN, START, RecallMeter, RouterControl
from windlass.forecast.sequence_usage import SequenceUsage
from windlass.models.spec import Ffn, Moe, RmsNorm, SoftmaxTopK
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RouterWeights

HIDDEN, EXPERTS, TOP_K = 24, 16, 3
SIZES = [EXPERTS, 0, EXPERTS, EXPERTS, EXPERTS]
TABLE = ExpertTable(SIZES, TOP_K)
MOE = Moe(
    num_experts=EXPERTS, top_k=TOP_K, routing=SoftmaxTopK(renorm_floor=0.0),
    expert=Ffn(intermediate=1),
)  # fmt: skip


class Told(NamedTuple):
    one_pass: Batch
    embedded_TD: np.ndarray
    layers: list[RoutedTokens]
    final_TD: np.ndarray


class World:
    """What a runtime would tell. `is_random`: routers read something else."""

    def __init__(self, seed: int = 0, *, is_random: bool = False) -> None:
        self.chance = np.random.default_rng(seed)
        self.is_random = is_random
        draw = self.chance.normal
        self.turns = [np.eye(HIDDEN) + draw(0, 0.15, (HIDDEN, HIDDEN)) for _ in SIZES]
        self.weights = [draw(0, 0.4, (HIDDEN, EXPERTS)).astype(np.float32) for _ in SIZES]
        self.states: dict[int, np.ndarray] = {}

    def routers(self) -> Iterator[RouterWeights]:
        for layer in TABLE.layers:
            bias = np.zeros(EXPERTS, np.float32)
            yield RouterWeights(layer, MOE, RmsNorm(eps=1e-6), self.weights[layer], bias, None)

    def tell(self, one_pass: Batch) -> Told:
        x_TD = np.concatenate([self._embedded(one) for one in one_pass.segments])
        embedded, layers = x_TD.astype(np.float32), []
        for layer in range(len(SIZES)):
            x_TD = x_TD @ self.turns[layer]
            if SIZES[layer]:
                layers.append(self._routed(layer, one_pass, x_TD.astype(np.float32)))
        return Told(one_pass, embedded, layers, x_TD.astype(np.float32))

    def _embedded(self, segment) -> np.ndarray:
        rows = []
        for _ in segment.token_ids:
            last = self.states.get(segment.sequence, np.zeros(HIDDEN))
            rows.append(0.8 * last + 0.6 * self.chance.normal(0, 1, HIDDEN))
            self.states[segment.sequence] = rows[-1]
        return np.array(rows)

    def _routed(self, layer: int, one_pass: Batch, x_TD: np.ndarray) -> RoutedTokens:
        read_TD = (
            self.chance.normal(0, 1, x_TD.shape).astype(np.float32) if self.is_random else x_TD
        )
        rms = np.sqrt((read_TD**2).mean(-1, keepdims=True) + 1e-6)
        logits = read_TD / rms @ self.weights[layer]
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        ids = np.argsort(-scores, 1)[:, :TOP_K]
        counts = np.bincount(ids.ravel(), minlength=EXPERTS)
        return RoutedTokens(layer, one_pass, counts, ids, scores, None, x_TD)


def tell(forecast: LearnedForecast | RecallMeter | SequenceUsage, told: Told) -> None:
    """Arrays are overwritten as soon as they have been told of."""

    def once(array: np.ndarray) -> np.ndarray:
        given.append(array.copy())
        return given[-1]

    given: list[np.ndarray] = []
    forecast.begin(told.one_pass, once(told.embedded_TD))
    for tokens in told.layers:
        forecast.observe(
            tokens._replace(
                ids_TA=once(tokens.ids_TA), scores_TE=once(tokens.scores_TE),
                residual_TD=once(tokens.residual_TD), counts_E=once(tokens.counts_E),
            )
        )  # fmt: skip
        for array in given:
            array[...] = 0
    forecast.end(once(told.final_TD))
    given[-1][...] = 0


def decode(world: World, forecast: LearnedForecast | RecallMeter, steps: range) -> None:
    for i in steps:
        tell(forecast, world.tell(passing(segment(0, 1, i))))


def forecast_of(world: World, **options) -> LearnedForecast:
    forecast = LearnedForecast(TABLE, HIDDEN, **options)
    for router in world.routers():
        forecast.set_router(router)
    return forecast


def drain(forecast: LearnedForecast) -> int:
    pieces = 0
    while forecast.work():
        pieces += 1
    return pieces


def test_it_learns_and_the_control_is_whole():
    found = {}
    for kind in ("learned", "fixed"):
        world = World()
        control = RouterControl()
        for router in world.routers():
            control.set_router(router)
        forecast = forecast_of(world, is_fixed=kind == "fixed")
        warm = 160 if kind == "learned" else 50
        decode(world, RecallMeter(forecast), range(1, warm))
        meter = RecallMeter(forecast, own=control.chances)
        decode(world, meter, range(warm, warm + 50))
        found[kind] = {h: meter.mean(h)["recall_1k"] for h in (1, 2, 3, START, BEFORE)}
        assert meter.mean(OWN)["recall_1k"] == 1 == meter.mean(OWN)["whole"]
        assert max(meter.mean(h)["worst_calibration_error"] for h in (1, 2, 3)) < 0.08
    learned, fixed = found["learned"], found["fixed"]
    assert learned[1] > 0.85 and learned[3] > 0.7 and learned[START] > 0.7
    assert all(learned[h] > fixed[h] + 0.1 for h in (1, 2, 3, START))
    assert learned[BEFORE] > fixed[BEFORE] > TOP_K / EXPERTS


def test_a_source_that_says_nothing_passes_no_threshold():
    world = World(is_random=True)
    forecast = forecast_of(world)
    meter = RecallMeter(forecast)
    decode(world, meter, range(1, 150))
    assert forecast.outlook.next.max() < forecast.threshold
    tell_layers = world.tell(passing(segment(0, 1, 150)))
    forecast.begin(tell_layers.one_pass, tell_layers.embedded_TD)
    forecast.observe(tell_layers.layers[0])
    drain(forecast)
    assert not len(forecast.candidates(0).places)
    assert forecast.outlook.now[EXPERTS:].mean() == pytest.approx(TOP_K / EXPERTS, abs=0.05)


def test_what_is_far_off_is_foretold_before_it_comes_and_by_value():
    world = World()
    forecast = forecast_of(world)
    decode(world, RecallMeter(forecast), range(1, 120))
    told = world.tell(passing(segment(0, 1, 120)))
    forecast.begin(told.one_pass, told.embedded_TD)
    drain(forecast)
    forecast.observe(told.layers[0])
    now, version = forecast.outlook.now, forecast.outlook.version
    assert now[:EXPERTS].sum() == TOP_K and set(now[:EXPERTS]) == {0.0, 1.0}
    before = now.copy()
    assert forecast.work() and forecast.outlook.version > version
    changed = {int(layer) for layer in TABLE.layer_of[now != before]}
    assert changed == {2}, "the next layer with experts comes first"
    drain(forecast)
    places, values = forecast.candidates(0)
    assert forecast.threshold is not None
    assert len(places) and (now[places] >= forecast.threshold).all() and now.max() <= 1
    ahead = TABLE.layer_of[places] > 0
    assert (now[places][ahead] < CERTAIN).all() and not now[EXPERTS:].max() > CERTAIN
    distance = np.maximum(TABLE.layer_of[places[ahead]], 1)
    np.testing.assert_allclose(values[ahead], now[places[ahead]] / distance)
    forecast.threshold = 0.7
    assert (now[forecast.candidates(0).places] >= 0.7).all()


def test_tokens_of_several_sequences_are_foretold_apart_and_merged():
    world = World()
    forecast = forecast_of(world)
    meter = RecallMeter(forecast, counts=lambda _: True)
    for i in range(1, 60):
        both = passing(segment(0, 1, i), segment(1, 1, 7 + i), segment(2, 1, 40 + i))
        tell(meter, world.tell(both))
    told = world.tell(passing(segment(0, 1, 60), segment(1, 1, 67)))
    forecast.begin(told.one_pass, told.embedded_TD)
    forecast.observe(told.layers[0])
    assert forecast.work()
    gate = forecast._gates[Source.ONE_BEFORE, 2]
    x_TD = told.layers[0].residual_TD
    x_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-6)
    q_TE = gate.foretell(x_TD).said.chances_TE
    expected = np.minimum(1 - (1 - q_TE[0]) * (1 - q_TE[1]), CERTAIN - 1e-3)
    np.testing.assert_allclose(forecast.outlook.now[TABLE.slice(2)], expected, rtol=1e-5)
    assert meter.mean(1)["recall_1k"] > 0.6


def test_rows_of_a_sequence_that_are_drafts_follow_each_other():
    """A pass of three tokens of one sequence, of which the next pass keeps one, two or three."""
    world = World()
    forecast = forecast_of(world)
    at = 1
    for i in range(60):
        tell(forecast, world.tell(passing(replace(segment(0, 3, at), is_prompt=False))))
        drain(forecast)
        at += 1 + i % 3
    assert forecast._gates[Source.TOKEN_BEFORE, 4]._version > 50
    assert forecast._gates[Source.START, 4]._version > 50


def test_prompts_are_learnt_from_by_a_sample_and_not_foretold():
    world = World()
    forecast = forecast_of(world)
    told = world.tell(passing(segment(0, 700, 0, ends=False), segment(1, 90, 0)))
    forecast.begin(told.one_pass, told.embedded_TD)
    for tokens in told.layers:
        forecast.observe(tokens)
        assert not forecast._ahead and not forecast._start
    states = forecast._pass
    assert states is not None and len(states.rows_n) == MOST_TOKENS
    assert {789} <= set(states.rows_n.tolist()), "the token that others follow"
    assert all(seen.residual_nD.shape == (MOST_TOKENS, HIDDEN) for seen in states._seen.values())
    drain(forecast)
    assert forecast._gates[Source.ONE_BEFORE, 2]._version == 1
    assert (
        forecast.outlook.now[EXPERTS:].tolist()
        == (told.layers[1].counts_E > 0).tolist()
        + (told.layers[2].counts_E > 0).tolist()
        + (told.layers[3].counts_E > 0).tolist()
    )


def test_the_next_pass_begins_with_what_was_foretold_of_it():
    world = World()
    forecast = forecast_of(world)
    decode(world, RecallMeter(forecast), range(1, 40))
    foretold = forecast.outlook.next.copy()
    usage = SequenceUsage(TABLE)
    assert not np.allclose(foretold, usage.outlook.next)
    forecast.begin(passing(segment(0, 1, 40)), None)
    assert forecast.outlook.now.tolist() == foretold.tolist()
    forecast.end(None)
    forecast.begin(passing(segment(5, 1, 33)), None)  # another sequence: nothing was foretold of it
    assert forecast.outlook.now.tolist() != foretold.tolist()


def test_work_that_is_never_done_is_dropped():
    world = World()
    forecast = forecast_of(world)
    for i in range(1, 40):
        tell(forecast, world.tell(passing(segment(0, 1, i))))
    most = len(BY_WORTH) * len(TABLE.layers)
    assert len(forecast._lessons) == most
    assert len(forecast._ahead) + len(forecast._next) + len(forecast._start) <= most
    assert drain(forecast) <= 2 * most and not forecast.work()


def test_a_clock_makes_the_next_layer_foretold_at_once_where_layers_are_slow():
    for layer_s, is_eager in ((1.0, True), (1e-3, False)):
        now, world = [0.0], World()

        def clock(now=now) -> float:
            now[0] += 1e-3  # so that a forecast takes a millisecond
            return now[0]

        forecast = forecast_of(world, clock=clock)
        for i in range(1, 60):
            told = world.tell(passing(segment(0, 1, i)))
            forecast.begin(told.one_pass, told.embedded_TD)
            for tokens in told.layers:
                now[0] += layer_s
                forecast.observe(tokens)
                forecast._lessons.clear()
            forecast.end(told.final_TD)
        states = forecast._pass
        assert states is not None
        assert ((Source.ONE_BEFORE, 2) in states.claims) is is_eager


def test_without_states_or_routers_it_is_usage():
    world = World()
    plain, bare, usage = LearnedForecast(TABLE, HIDDEN), forecast_of(world), SequenceUsage(TABLE)
    for i in range(1, 30):
        told = world.tell(passing(segment(0, 1, i)))
        for forecast in (plain, usage):
            tell(forecast, told)
        bare.begin(told.one_pass, None)
        for tokens in told.layers:
            bare.observe(tokens._replace(residual_TD=None))
        bare.end(None)
        for forecast in (plain, bare):
            assert not forecast.work()
            assert forecast.outlook.usage.tolist() == usage.outlook.usage.tolist()


def test_what_fits_is_kept_in_order_of_worth():
    table = ExpertTable([128] * 48, 8)
    whole = forecast_bytes(table, 2048)
    assert sources_within(table, 2048, None) == BY_WORTH == sources_within(table, 2048, whole)
    kept: list[tuple[Source, ...]] = [BY_WORTH]
    while kept[-1]:
        least = forecast_bytes(table, 2048, kept[-1])
        kept.append(sources_within(table, 2048, least - 1))
    assert kept == [BY_WORTH[:n] for n in range(len(BY_WORTH), -1, -1)]
    assert whole == pytest.approx(48 * 128 * 2048 * 4 * 6, rel=0.2)
    fixed = sources_within(table, 2048, forecast_bytes(table, 2048, FIXED[:1]), is_fixed=True)
    assert fixed == FIXED
    assert not LearnedForecast(table, 2048, limit_bytes=1 << 20).sources


def test_memory_does_not_grow_with_passes():
    world = World()
    forecast = forecast_of(world)
    for i in range(1, 30):
        many = passing(*(segment(100 * i + s, 1, i) for s in range(MOST_TOKENS)))
        tell(forecast, world.tell(many))
        for _ in range(i % 5):
            forecast.work()
        kept = {id(one): one for due in forecast._lessons for one in (due.seen, due.last) if one}
        assert len(kept) <= 3
        held = sum(one.residual_nD.nbytes for each in kept.values() for one in each._seen.values())
        assert held <= 3 * MOST_TOKENS * HIDDEN * 4 * len(TABLE.layers)


class BlindStart(World):
    """A token's start has nothing to do with what follows, as long as it `is_blind`."""

    is_blind = True

    def tell(self, one_pass):
        told = super().tell(one_pass)
        if not self.is_blind:
            return told
        noise = self.chance.normal(0, 1, (2, *told.final_TD.shape)).astype(np.float32)
        return told._replace(embedded_TD=noise[0], final_TD=noise[1])


def follow(world: World, forecast: LearnedForecast, first: int, passes: int) -> int:
    """Tokens from this position on; what is put off is done between layers. The one after them."""
    for at in range(first, first + passes):
        told = world.tell(passing(segment(0, 1, at)))
        forecast.begin(told.one_pass, told.embedded_TD)
        for tokens in told.layers:
            drain(forecast)
            forecast.observe(tokens)
        drain(forecast)
        forecast.end(told.final_TD)
    return first + passes


def test_one_source_goes_off_alone_and_comes_back():
    world = BlindStart()
    forecast = forecast_of(world, window=8)
    at = follow(world, forecast, 1, 3 * 8 + 1)
    start = forecast._guards.of(Source.START)
    assert not start.is_on and not start.speaks
    assert forecast.words() == (
        "forecasts on: 1 layer ahead, of the next token, 2 layers ahead, 3 layers ahead; off, no"
        " better than without them: as a token begins"
    )
    world.is_blind, least = False, at
    while not start.is_on and at < least + 36 * 8:
        at = follow(world, forecast, at, 1)
    assert not forecast.words(), "all are on again"


def test_a_source_on_trial_is_heard_and_not_believed():
    world = World()
    forecast = forecast_of(world)
    at = follow(world, forecast, 1, 20)
    forecast._guards.of(Source.START).is_on = False
    told = world.tell(passing(segment(0, 1, at)))
    forecast.begin(told.one_pass, told.embedded_TD)
    before, version = forecast.outlook.now.copy(), forecast.outlook.version
    drain(forecast)
    assert forecast.outlook.now.tolist() == before.tolist() and forecast.outlook.version == version
    states = forecast._pass
    assert states is not None
    assert {layer for source, layer in states.claims if source is Source.START} == {0, 2, 3, 4}


@pytest.mark.parametrize("is_fixed", [False, True])
def test_where_nothing_can_be_foretold_nothing_is_computed(is_fixed):
    world = World(is_random=True)
    forecast = forecast_of(world, window=8, is_fixed=is_fixed)
    guards = [forecast._guards.of(source) for source in forecast.sources]
    at = 1
    while at < 250 and any(guard.is_on or guard.speaks for guard in guards):
        at = follow(world, forecast, at, 1)
    assert forecast.words().startswith("forecasts on: none; off, no better than without them: 1 l")
    drain(forecast)
    usage, told = forecast.outlook.usage, world.tell(passing(segment(0, 1, at)))
    tell(forecast, told)
    assert not drain(forecast)
    follow(world, forecast, at + 1, 0)
    forecast.begin(passing(segment(0, 1, at + 1)), None)
    assert forecast.outlook.now.tolist() == usage.tolist(), "usage stands"
