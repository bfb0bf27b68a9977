"""Keys and values of some sequences in the host's memory, attention over them on the device: the
bits of those that the device keeps, whatever else is chosen; no race, and one without each wait;
what fails leaves nothing on its way."""

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from engines import engine_for, prompts, request, run_all
from fake_cuda import FakeCuda
from fake_streams import Race
from two_processors import (
    Fails,
    Model,
    bits_in_spite,
    bits_of,
    model,
    some_requests,
    tier_with,
    with_right_guesses,
)
from windlass.device import cuda
from windlass.engine.request import Request
from windlass.errors import UsageError
from windlass.ids import Home, HomeShares, Route
from windlass.kvcache.kv_tiers import home_of
from windlass.options import EngineOptions
from windlass.plan import HOST, Plan
from windlass.runtime import kv_rounds
from windlass.runtime.kv_rounds import Run, Staged
from windlass.runtime.kv_stream import KvStream

__all__ = ["model"]  # a fixture

# grouped queries; latent; windows with sinks; recurrent layers, whose states stay on the device
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
POINTS = (
    "wait of down in Lane.submit",  # what used a place has gone back
    "record of down in Lane.submit",  # before others' pages come
    "synchronisation with down in Lane.arrive",  # and are read
    "wait of compute in KvStream._compute",  # or are written, where none come
    "record of compute in KvStream._send_back",  # rows are written
    "wait of up in KvStream._send_back",  # before their pages go back
    "record of up in KvStream._send_back",
)


@pytest.fixture(autouse=True)
def small_places(monkeypatch):
    """Room for the longest sequence alone, so that there are several rounds."""
    monkeypatch.setattr(kv_rounds, "_HALF_BYTES", 0)


def _plan(
    own: Model, streamed: float, *, host: float = 0.0, slots: Any = None, **values: Any
) -> Plan:
    values = {"micro_batch_tokens": 64, "max_model_len": 192, **values}
    return own.plan_for(host, slots or {}, kv_offloading_share=streamed, **values)


# --- on a device with streams ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "host", "streamed", "groups"),
    [("qwen3_moe", 0, 1, 1), ("deepseek_v3", 0, 0.6, 2), ("gpt_oss", 0.4, 0.6, 1),
     ("qwen3_next", 0, 1, 1)],
)  # fmt: skip
def test_no_race_and_what_a_cpu_says(family, host, streamed, groups, model):
    own = model(family)
    device = FakeCuda(name="device", seed=len(family))
    plan = _plan(own, streamed, host=host, groups=groups)
    found = own.run_on(device, plan, some_requests(3))
    assert found == {name: own.bits[name] for name in found} and len(found) == 3
    assert not device.memory.races
    assert device.order.points["record of up in KvStream._send_back"] > 4
    assert any(home_of(name, host, streamed) is Home.STREAMED for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_at_any_other_moments(family, seed, model, monkeypatch):
    own = model(family)
    monkeypatch.setattr(kv_rounds, "_HALF_BYTES", (seed % 4) << 14)
    device = FakeCuda(name="device", seed=seed, late=(0.5, 0.9, 1.0)[seed // 9 % 3])
    plan = _plan(
        own, (1.0, 0.5)[seed % 2], host=(0.0, 0.25, 0.5)[seed % 3], groups=1 + seed // 3 % 3,
        micro_batch_tokens=(64, 512)[seed % 2], max_num_batched_tokens=(100, 512)[seed // 2 % 2],
    ) if seed % 2 else _plan(own, 1.0, groups=1 + seed // 3 % 3)  # fmt: skip
    assert own.run_on(device, plan, some_requests()) == own.bits
    assert not device.memory.races


def _some() -> list[Request]:
    """A prompt whose later rounds read what earlier ones write, and some that read nothing."""
    return [request(f"r{i}", prompt) for i, prompt in enumerate(prompts((150, 60, 60)))]


@pytest.mark.parametrize("point", POINTS)
def test_without_any_of_its_waits_and_events_there_is_a_race(point, model):
    own = model("qwen3_moe")
    device = FakeCuda(name="device", seed=3, without=point)
    with pytest.raises(Race, match="nothing orders them"):
        own.run_on(device, _plan(own, 1.0), _some())
    assert device.order.points[point] > 0


def test_what_a_pass_writes_itself_comes_behind_it(model, monkeypatch):
    """A prompt of several micro-batches: as if its first pages could come at any time."""
    own = model("qwen3_moe")
    wanted = Staged.wanted

    def at_once(
        self: Staged, window: int | None, late: Collection[int]
    ) -> tuple[list[Run], list[Run]]:
        return wanted(self, window, ())

    monkeypatch.setattr(Staged, "wanted", at_once)
    device = FakeCuda(name="device", seed=3)
    with pytest.raises(Race, match="nothing orders them"):
        own.run_on(device, _plan(own, 1.0), _some())


def _fail_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A round, when it has been asked for and not gone back."""
    send_back, rounds = KvStream._send_back, count(1)

    def fail(self: KvStream, *given: Any) -> None:
        if next(rounds) == number:
            raise Fails
        send_back(self, *given)

    monkeypatch.setattr(KvStream, "_send_back", fail)


def test_pages_are_given_to_others_when_nothing_moves_any_more(model, monkeypatch):
    own = model("qwen3_moe")

    def run(device: FakeCuda) -> Any:
        with monkeypatch.context() as patched:
            _fail_once(patched, 8)
            patched.setattr("two_processors.bits_of", bits_in_spite)
            return own.run_on(device, _plan(own, 1.0), some_requests(3))

    drained = FakeCuda(name="device", seed=1, late=0.9)
    found = run(drained)
    assert found == {name: own.bits[name][0] for name in found} and len(found) == 3
    assert not drained.memory.races
    monkeypatch.setattr(KvStream, "drain", lambda self: self._ahead.begin(()))
    with pytest.raises(Race):
        for seed in range(8):
            with suppress(Fails):
                run(FakeCuda(name="device", seed=seed, late=0.9))


# --- with threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("qwen3_moe", dict(groups=3, max_num_batched_tokens=100)),
        ("deepseek_v3", dict(host=0.5, streamed=0.5, micro_batch_tokens=512)),
        ("gpt_oss", dict(schedule="model-based", max_num_batched_tokens=100)),
        ("qwen3_next", dict(streamed=0.5, groups=2)),
    ],
)
def test_bits_are_those_of_keys_on_the_device(family, values, model, monkeypatch):
    monkeypatch.setattr(cuda, "STEP_BYTES", 1000)  # no copy over the end of a step
    own = model(family)
    plan = _plan(own, **{"streamed": 1.0, **values})
    with own.open(plan) as engine:
        assert bits_of(engine, some_requests()) == own.bits
        carried = engine.stats().weights.link_bytes[Route(HOST, "device")]
    with own.open(_plan(own, 0.0, host=plan.host_attention)) as engine:
        run_all(engine, some_requests())
        assert carried > engine.stats().weights.link_bytes[Route(HOST, "device")]


def test_int8_keys_come_with_their_scales(model, tmp_path):
    own = model("qwen3_moe")
    with engine_for(own.path, moe_backend="torch", kv_cache_dtype="int8") as engine:
        expected, plan = bits_of(engine, some_requests(3)), engine.plan
    tiers = tuple(tier_with(plan.host, name, {}, None) for name in (HOST, "device"))
    plan = replace(plan, tiers=tiers, kv_offloading_share=1.0, micro_batch_tokens=64)
    with own.open(plan) as engine:
        assert bits_of(engine, some_requests(3)) == expected
    assert expected != {name: own.bits[name] for name in expected}


def test_few_pages_and_prompts_that_begin_alike(model):
    """Sequences give way to older ones, and find what others have computed."""
    own = model("gpt_oss")
    common = prompts((70,))[0]
    many = [request(f"r{i}", [*common, 5 + i], max_tokens=30, logprobs=1) for i in range(5)]
    found, hits, preempted = [], [], []
    for streamed, pages in ((0.0, (9, None)), (1.0, (40, None)), (1.0, (7, None))):
        plan = _plan(own, streamed, pages=pages, max_model_len=128, max_num_batched_tokens=100)
        with own.open(plan) as engine:
            found.append(bits_of(engine, many))
            hits.append(engine.stats().prefix_cache_hits)
            preempted.append(engine.stats().num_preemptions)
    assert found[1:] == found[:1] * 2
    assert hits[1] == hits[0] > 0 and preempted[2] > 0


def test_the_layer_that_drafts_keeps_its_rows_there_too(tmp_path, monkeypatch):
    expected, found, made = with_right_guesses(tmp_path, monkeypatch, kv_offloading_share=0.5)
    assert found == expected
    assert made is not None and made.accepted > 0


# --- what is planned ------------------------------------------------------------------------------


def test_who_attends_on_the_host_does_not_depend_on_what_streams():
    names = [f"request {i}" for i in range(1000)]

    def at(home: Home, *shares: float) -> set[str]:
        return {name for name in names if home_of(name, *shares) is home}

    assert at(Home.HOST, 0.3) == at(Home.HOST, 0.3, 0.5) and at(Home.DEVICE, 0.3, 0.7) == set()
    assert abs(len(at(Home.STREAMED, 0.3, 0.5)) - 500) < 60
    assert at(Home.STREAMED, 0.0, 0.3) < at(Home.STREAMED, 0.0, 0.6)


def test_the_share_is_part_of_the_plan_alone(model):
    own = model("qwen3_moe")
    fingerprints: list[Any] = []
    make: Callable[[float], Plan] = lambda share: _plan(own, share, host=0.25)  # noqa: E731
    for share in (0.0, 0.5):
        plan = make(share)
        assert Plan.from_json(plan.to_json()) == plan
        with own.open(plan) as engine:
            fingerprints.append(engine.fingerprint)
            tiers = {tier.name: tier.kv_total_bytes for tier in engine.look().tiers}
        assert tiers[HOST] == plan.host.kv_pages * plan.host.kv_page_bytes
    assert fingerprints[0] == fingerprints[1], "bits do not depend on it"
    assert any("keys and values of 50 %" in line for line in make(0.5).lines())
    assert make(0.5).shares == HomeShares(0.25, 0.5)
    pages = make(0.5).pages
    assert pages[Home.HOST] + pages[Home.STREAMED] == make(0.5).host.kv_pages
    assert abs(pages[Home.STREAMED] - 2 * pages[Home.HOST]) <= 1
    with pytest.raises(UsageError, match=r"kv_offloading_share: got 0.9, allowed 0 to 0.75"):
        own.open(make(0.9))
    with pytest.raises(UsageError, match="kv_offloading_share: got 1.5, allowed a number from 0"):
        EngineOptions(kv_offloading_share=1.5)
    with pytest.raises(UsageError, match="kv_offloading_share: allowed with device auto or cuda"):
        EngineOptions(kv_offloading_share=0.5, device="cpu")
    with pytest.raises(UsageError, match="kv_offloading_share: got 0.5, allowed 0 without a GPU"):
        engine_for(own.path, kv_offloading_share=0.5)
