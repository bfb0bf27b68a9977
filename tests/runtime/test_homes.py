"""Attention of some sequences on the host, beside a device that computes everything else: the same
bits at a fixed share, whatever else is chosen and whenever the host gets to it; no race, and none
without each wait; errors end the step, and nothing hangs."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import count, product
from threading import Event, Timer
from typing import Any

import pytest

from amounts import rarely
from engines import engine_for, prompts, request, run_all
from fake_cuda import FakeCuda
from fake_streams import Race
from processes import PATIENCE_S
from two_processors import (
    FEW,
    Fails,
    Results,
    bits_in_spite,
    bits_of,
    model,
    some_requests,
    with_right_guesses,
)
from windlass.build import homes as build
from windlass.build.open import open_engine
from windlass.device.cpu import CpuDevice
from windlass.errors import UsageError
from windlass.ids import Home
from windlass.kvcache.kv_tiers import content_name, home_of
from windlass.models.registry import read_description
from windlass.models.spec import Mla
from windlass.options import EngineOptions, read_config
from windlass.plan import HOST, Plan
from windlass.runtime.host_attention import HostAttention, Staging

__all__ = ["model"]  # a fixture

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
POINTS = (
    "record of compute in HostAttention.begin",  # queries, keys and values are there
    "wait of up in HostAttention.begin",  # before they are copied
    "record of up in HostAttention.begin",  # and on the host
    "synchronisation with up in HostAttention._compute",  # before the worker reads them
    "record of back in HostAttention._compute",  # what it found is on the device
    "wait of compute in HostAttention.result",  # before kernels read it
    "wait of up in HostAttention._free_stage",  # and before its place is used again
)


# --- on a device with streams ---------------------------------------------------------------------


@pytest.mark.parametrize(("family", "share"), [("gpt_oss", 0.0), *product(FAMILIES, (0.5, 1.0))])
def test_no_race_and_what_a_cpu_says(family, share, model):
    """The same kernels on both: bits are those of a machine without a device."""
    own = model(family)
    groups = 1 + FAMILIES.index(family) % 3
    device = FakeCuda(name="device", seed=groups)
    plan = own.plan_for(share, groups=groups, micro_batch_tokens=64)
    found = own.run_on(device, plan, some_requests(3))
    assert found == {name: own.bits[name] for name in found} and len(found) == 3
    assert not device.memory.races
    assert device.worker.num_jobs > 4 or share == 0
    assert len({home_of(name, share) for name in found}) == (2 if share == 0.5 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_at_any_other_moments(family, seed, model):
    own = model(family)
    device = FakeCuda(name="device", seed=seed, late=(0.5, 0.9, 1.0)[seed // 9 % 3])
    plan = own.plan_for(
        (0.5, 1.0, 0.0)[seed % 3], groups=1 + seed // 3 % 3, micro_batch_tokens=(64, 512)[seed % 2],
        max_num_batched_tokens=(100, 512)[seed // 2 % 2],
    )  # fmt: skip
    assert own.run_on(device, plan, some_requests(), _STAGING_BYTES=seed % 2 << 28) == own.bits
    assert not device.memory.races


@pytest.mark.parametrize("point", POINTS)
def test_without_any_of_its_waits_and_events_there_is_a_race(point, model):
    own = model("qwen3_moe")
    device = FakeCuda(name="device", seed=3, without=point)
    plan = own.plan_for(1.0, micro_batch_tokens=64)
    with pytest.raises(Race, match="nothing orders them"):
        own.run_on(device, plan, [request("r", prompts((200,))[0])], _STAGING_BYTES=0)
    assert device.order.points[point] > 0


# --- with threads ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def apart(request, model):
    """A family, and what its requests get with native attention on the host, torch's on the device:
    by the share of the host."""
    own = model(request.param)

    @cache
    def made(share: float) -> Results:
        plan = own.plan_for(share, {}, micro_batch_tokens=512)
        with own.open(plan, backend="cpu") as engine:
            return bits_of(engine, some_requests())

    return own, made


@pytest.mark.parametrize(
    "values",
    [
        dict(share=0.5, groups=2, micro_batch_tokens=64, max_num_batched_tokens=100),
        dict(share=0.5, slots=FEW, schedule="model-based", micro_batch_tokens=64),
        dict(share=1.0, groups=2, micro_batch_tokens=64, slots=FEW),
        *rarely(
            [dict(share=0.5, groups=3, slots=FEW, micro_batch_tokens=64, max_num_batched_tokens=72)]
        ),
    ],
)
def test_bits_are_those_of_the_share_alone(values, apart):
    """And a sequence's those of its home: whatever the groups, budgets, batches and schedule."""
    own, made = apart
    share = values["share"]
    with own.open(own.plan_for(**{"slots": {}, **values}), backend="cpu") as engine:
        found = bits_of(engine, some_requests())
    assert found == made(share)
    homes = {name: home_of(name, share) for name in found}
    assert found == {name: made(1.0 if homes[name] is Home.HOST else 0.0)[name] for name in found}
    assert Home.HOST in homes.values()


def test_the_host_rounds_otherwise(apart):
    """Else the others could not fail."""
    _, made = apart
    assert made(0.0) != made(1.0)


def test_what_the_worker_does_is_traced(model, tmp_path):
    own, trace = model("qwen3_next"), tmp_path / "trace.json"
    with own.open(own.plan_for(1.0, {}), trace=trace) as engine:
        run_all(engine, some_requests(1))
    events = json.loads(trace.read_text())
    (lane,) = (e["tid"] for e in events if e.get("args") == {"name": "host attention"})
    found = [event for event in events if event["tid"] == lane and event["ph"] == "X"]
    rows = [(event["args"]["layer"], event["args"]["rows"]) for event in found]
    assert rows == [(1, 70), (3, 70), (1, 1), (3, 1)], "the prompt, then a token"


def test_few_pages_of_each_home(model):
    """Sequences of each give way to older ones of theirs, and come to the same end."""
    own = model("qwen3_moe")
    many = [
        request(f"r{i}", prompt, max_tokens=12, logprobs=1)
        for i, prompt in enumerate(prompts((30, 28, 31, 25, 60, 29)))
    ]
    preempted = 0
    found = []
    for pages in ((99, 99), (3, 9), (9, 3), (4, 4)):
        plan = own.plan_for(0.5, {}, pages, max_model_len=96, max_num_batched_tokens=100)
        with own.open(plan, backend="cpu") as engine:
            engine.add(many[0])
            engine.step()
            held = {tier.name: tier.kv_bytes for tier in engine.look().tiers}
            is_host = home_of(many[0].seed_key, 0.5) is Home.HOST
            assert (held[HOST] > 0) == is_host and (held["device"] > 0) != is_host
            engine.abort(many[0].request_id)
            found.append(bits_of(engine, many))
            preempted += engine.stats().num_preemptions
    assert found[1:] == found[:1] * 3
    assert preempted > 0


def test_who_has_no_name_has_the_home_of_its_prompt_and_seed(model):
    """A server names requests by chance: the same body has the same bits again."""
    own = model("qwen3_moe")
    plan = own.plan_for(0.5)
    homes, found = [], []
    for names in ("abcdef", "ghijkl"):
        with own.open(plan, backend="cpu") as engine:
            for name, prompt in zip(names, prompts((30, 28, 31, 25, 60, 29)), strict=True):
                one = request(name, prompt, max_tokens=5, logprobs=1, temperature=0.8, seed=7)
                engine.add(replace(one, is_named=False))
                engine.step()
                held = {tier.name: tier.kv_bytes > 0 for tier in engine.look().tiers}
                homes.append(held[HOST])
                found += [output.outputs for output in run_all(engine, []).values()]
    assert homes[:6] == homes[6:] and len(set(homes)) == 2
    assert found[:6] == found[6:]
    assert content_name((1, 2), 7) != content_name((1, 2), None) != content_name((1, 3), None)


def test_prompts_find_what_others_of_their_home_have_computed(model):
    own = model("gpt_oss")
    common = prompts((140,))[0]
    some = [request(f"r{i}", [*common, 5 + i], max_tokens=3, logprobs=1) for i in range(6)]
    at_host = sum(home_of(one.seed_key, 0.5) is Home.HOST for one in some)
    assert 2 <= at_host <= 4
    found = {}
    for caching in (True, False):
        plan = own.plan_for(0.5, {}, prefix_caching=caching)
        with own.open(plan, backend="cpu") as engine:
            found[caching] = bits_of(engine, some)
            hits = engine.stats().prefix_cache_hits
        assert hits == (128 * 4 if caching else 0)  # of each home the first computes them
    assert found[True] == found[False]


def _fail_once(monkeypatch: pytest.MonkeyPatch, job: int) -> None:
    """The worker, in that job."""
    compute, jobs = HostAttention._compute, count(1)

    def fail(self: HostAttention, given: Any) -> Any:
        if next(jobs) == job:
            raise Fails
        return compute(self, given)

    monkeypatch.setattr(HostAttention, "_compute", fail)


@pytest.mark.parametrize("job", [1, 6, 20])
def test_a_worker_that_raises_ends_the_step_and_the_engine_goes_on(job, model, monkeypatch):
    own = model("qwen3_moe")
    _fail_once(monkeypatch, job)
    with own.open(own.plan_for(1.0, {}, groups=2, micro_batch_tokens=64)) as engine:
        found = bits_in_spite(engine, some_requests())
    assert found == {name: bits[0] for name, bits in own.bits.items()}


def test_pages_are_given_to_others_when_the_worker_has_left_them(model, monkeypatch):
    """After a pass that failed. Not drained, it races; where the moments are such that it fails
    again before anybody could see that, others are tried."""
    own = model("qwen3_moe")
    plan = own.plan_for(1.0, micro_batch_tokens=64)

    def run(device: FakeCuda) -> Results:
        with monkeypatch.context() as patched:
            _fail_once(patched, 2)
            patched.setattr("two_processors.bits_of", bits_in_spite)
            return own.run_on(device, plan, some_requests())

    drained = FakeCuda(name="device", seed=1, late=0.9)
    assert run(drained) == {name: bits[0] for name, bits in own.bits.items()}
    assert not drained.memory.races
    monkeypatch.setattr(HostAttention, "drain", lambda self: None)
    with pytest.raises(Race):
        for seed in range(12):
            with suppress(Fails):
                run(FakeCuda(name="device", seed=seed, late=0.5))


def test_native_kernels_may_be_those_of_both(model):
    own = model("deepseek_v3")
    with engine_for(own.path, moe_backend="cpu") as engine:
        expected = bits_of(engine, some_requests())
    plan = own.plan_for(0.5, {}, groups=2, micro_batch_tokens=64)
    options = EngineOptions(
        model=str(own.path), plan=plan, generation_config="vllm", moe_backend="cpu"
    )
    with open_engine(options, above=CpuDevice(1, name="device")) as engine:
        assert bits_of(engine, some_requests()) == expected


def test_the_layer_that_drafts_keeps_its_rows_where_the_sequence_is(tmp_path, monkeypatch):
    expected, found, made = with_right_guesses(tmp_path, monkeypatch, host_attention=0.5)
    assert found == expected
    assert made is not None and made.accepted > 0


def test_closing_ends_the_worker_also_while_it_has_work(model, monkeypatch):
    own = model("qwen3_moe")
    workers = []

    def make(*given: Any) -> ThreadPoolExecutor:
        workers.append(ThreadPoolExecutor(*given))
        return workers[-1]

    monkeypatch.setattr(build, "ThreadPoolExecutor", make)
    with own.open(own.plan_for(1.0, {})) as engine:
        run_all(engine, some_requests(2))
        begun, gate = Event(), Event()

        def work() -> bool:
            begun.set()
            return gate.wait()

        first = workers[0].submit(work)
        second = workers[0].submit(gate.wait)
        assert begun.wait(PATIENCE_S)
        Timer(0.05, gate.set).start()
    assert first.result() and (second.cancelled() or second.done())
    with pytest.raises(RuntimeError):
        workers[0].submit(print)


# --- what is planned ------------------------------------------------------------------------------


def test_a_share_of_names_is_at_the_host():
    names = [f"request {i}" for i in range(2000)]
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        at_host = {name for name in names if home_of(name, share) is Home.HOST}
        assert abs(len(at_host) - 2000 * share) < 80
        assert share in (0.5, 0.9, 1.0) or len(at_host) < 300
    few, more = ({n for n in names if home_of(n, s) is Home.HOST} for s in (0.3, 0.6))
    assert few < more, "who is at the host stays there as the share grows"


def test_the_share_is_part_of_plan_and_fingerprint(model):
    own = model("qwen3_moe")
    assert "host_attention" not in own.plan.to_json()
    assert Plan.from_json(own.plan.to_json()) == own.plan
    found = {}
    for share in (0.0, 0.25, 1.0):
        plan = own.plan_for(share, {})
        assert Plan.from_json(plan.to_json()) == plan
        with own.open(plan) as engine:
            found[share] = engine.fingerprint
            assert [
                line for line in plan.lines() if "25 % of the sequences" in line
            ] or share != 0.25
    assert [one["host_attention"] for one in found.values()] == [0.0, 0.25, 1.0]
    assert ["host_kernels" in one for one in found.values()] == [False, True, True]
    with engine_for(own.path, moe_backend="torch") as engine:
        assert "host_attention" not in engine.fingerprint
    with pytest.raises(UsageError, match="host_attention: got 1.5, allowed 0 to 1"):
        own.open(own.plan_for(1.5, {}))
    with pytest.raises(UsageError, match="host_attention: got 0.5, allowed 0 to 0"):
        engine_for(own.path, plan=replace(own.plan, host_attention=0.5), max_num_batched_tokens=512)
    with pytest.raises(UsageError, match="max_model_len: got 256, allowed 2 to 64"):
        own.open(own.plan_for(0.5, {}, (2, None)))


def test_staging_is_bounded(model):
    own = model("deepseek_v3")
    spec = read_description(read_config(own.path)).spec
    plan = own.plan_for(1.0, micro_batch_tokens=64, max_num_batched_tokens=512)
    staging = Staging.of(spec, plan)
    mla = spec.blocks[0].attention
    assert isinstance(mla, Mla)
    key = mla.kv_lora_rank + mla.rope.dim
    assert staging.floats == 64 * (mla.num_heads * (key + mla.kv_lora_rank) + key)
    assert staging.num_stages == 9 and staging.num_bytes == 9 * 4 * staging.floats
    large = replace(plan, micro_batch_tokens=1 << 20, max_num_batched_tokens=8 << 20)
    assert Staging.of(spec, large).num_stages == 2
