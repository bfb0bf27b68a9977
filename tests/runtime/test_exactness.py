"""The contract: tokens and log-probabilities of a request are the same bits, whatever else runs,
however rows are cut, however little memory there is, and in whatever order weights arrive."""

import json
import random
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from windlass.checkpoint.reader import Checkpoint
from windlass.kernels.cpu import library
from windlass.kernels.reference import TorchKernels
from windlass.plan import SCHEDULES

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
PLAIN = [(family, "auto") for family in FAMILIES]  # and what keys and values are kept in
MODELS = [
    *PLAIN, ("gemma4_text", "auto"), ("lfm2_moe", "auto"), ("nemotron_h", "auto"),
    ("qwen3_moe", "int8"), ("deepseek_v3", "int8"), ("gpt_oss", "int8"),
]  # fmt: skip
LENGTHS = (90, 3, 33, 64, 17, 150)
COMBINATIONS = 4  # of each model: 40 in all


def _requests():
    sampled = {"temperature": 0.8, "top_p": 0.95, "ignore_eos": False}
    return [
        request(
            f"r{i}",
            prompt,
            max_tokens=4 + 2 * i,
            logprobs=3,
            **(sampled if i % 2 else {}),
        )
        for i, prompt in enumerate(prompts(LENGTHS))
    ]


def _bits(output):
    """Everything that must be equal, floats included."""
    choice = output.outputs[0]
    return choice.token_ids, choice.cumulative_logprob, choice.logprobs, choice.finish_reason


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request, tmp_path_factory):
    """What opens engines of a checkpoint, and the results of each request alone, with everything in
    memory."""
    family, kv_cache_dtype = request.param
    path = tmp_path_factory.mktemp(family)
    make_model(family, path, dtype=torch.bfloat16)
    engine_of = partial(engine_for, path, kv_cache_dtype=kv_cache_dtype)
    alone = {}
    for one in _requests():
        with engine_of() as engine:
            alone.update(run_all(engine, [one]))
    return engine_of, {name: _bits(output) for name, output in alone.items()}


@pytest.mark.parametrize("seed", range(COMBINATIONS))
def test_bits_do_not_depend_on_budget_batch_order_or_arrival(model, seed):
    engine_of, alone = model
    chance = random.Random(seed)
    chosen = chance.sample(_requests(), chance.randint(2, len(alone)))
    seqs = chance.randint(1, 8)
    options = dict(
        moe_expert_cache_size=f"{chance.choice((64, 70, 130, 1000))}KiB",
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + chance.choice((64, 70, 130, 300)),
        micro_batch_size=chance.choice((64, 65, 100, 500)),
        schedule=chance.choice(SCHEDULES),
        burst_tokens=chance.choice((None, 0, 1, 3, 16)),
        batch_groups=chance.choice((1, 2, 3)),
    )
    device = FakeDevice(seed=seed) if seed % 2 else None
    with engine_of(device=device, **options) as engine:
        results = run_all(engine, chosen)
        stats = engine.stats()
    assert len(results) == len(chosen)
    for name, output in results.items():
        assert _bits(output) == alone[name], f"{name} under {options}"
    assert stats.expert_requests > 0


@pytest.mark.parametrize("model", PLAIN, ids="-".join, indirect=True)
def test_small_caches_really_read_again(model):
    engine_of, _ = model
    with engine_of(moe_expert_cache_size="64KiB") as engine:
        run_all(engine, _requests()[:2])
        small = engine.stats()
    with engine_of() as engine:
        run_all(engine, _requests()[:2])
        large = engine.stats()
    assert small.bytes_read > 2 * large.bytes_read
    assert small.expert_hits < small.expert_requests


def test_bits_do_not_depend_on_preemption(model):
    """Few pages: the younger sequences give theirs back and are computed again."""
    engine_of, _ = model
    long = [request(f"r{i}", p, max_tokens=70) for i, p in enumerate(prompts((30, 5, 60, 31)))]
    with engine_of() as engine:
        expected = {name: _bits(output) for name, output in run_all(engine, long).items()}
        assert engine._admission.num_preemptions == 0
    with engine_of() as engine:
        kv = engine._admission._kv.device
        held = kv.take_pages(kv.num_free_pages - 8)  # as if another had them
        for one in long:
            engine.add(one)
        results = {}
        while engine.has_work:
            results.update({o.request_id: o for o in engine.step().finished})
        assert engine._admission.num_preemptions > 0
        kv.give_pages(held)
        engine.check()
    assert {name: _bits(output) for name, output in results.items()} == expected


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_threads_and_memory_are_no_excuse(model, backend):
    """Two threads and buffered reads give the bits of one thread and direct reads."""
    engine_of, _ = model
    found = library.load()
    if backend == "cpu" and isinstance(found, str):
        pytest.skip(f"the native library {found}")
    some = _requests()[1::2]
    with engine_of(threads=1, moe_backend=backend) as engine:
        alone = run_all(engine, some)
    with engine_of(load_mode="buffered", threads=2, moe_backend=backend) as engine:
        results = run_all(engine, some)
        # the two pools never work at the same time
        assert torch.get_num_threads() == (2 if backend == "torch" else 1)
        assert backend == "torch" or not isinstance(found, str) and found.wl_get_threads() == 2
    torch.set_num_threads(1)
    assert all(_bits(results[name]) == _bits(output) for name, output in alone.items())


def test_bits_do_not_depend_on_the_schedule(model):
    """Model-based: every micro-batch through all layers by itself, prompts cut and scored too."""
    engine_of, alone = model
    scored = [replace(one, params=replace(one.params, prompt_logprobs=0)) for one in _requests()]
    found, passes, reads = {}, {}, {}
    for schedule in SCHEDULES:
        options = dict(micro_batch_size=64, moe_expert_cache_size="130KiB", schedule=schedule)
        with engine_of(**options) as engine:
            results = run_all(engine, scored)
            stats = engine.stats()
        found[schedule] = {name: output.prompt_logprobs for name, output in results.items()}
        passes[schedule], reads[schedule] = stats.passes, stats.expert_requests
        assert {name: _bits(output) for name, output in results.items()} == alone
    assert found["module-based"] == found["model-based"]
    # a step of 357 prompt rows is six passes, and each needs nearly all experts again
    assert passes["model-based"] >= passes["module-based"] + 5
    assert reads["model-based"] > reads["module-based"] + 5


@pytest.fixture
def slow(monkeypatch):
    """Reads and experts that take their time asleep, so that other work on this machine changes
    nothing about what runs beside what."""

    def delayed(call):
        def slept(*args, **more):
            time.sleep(0.002)
            return call(*args, **more)

        return slept

    monkeypatch.setattr(Checkpoint, "read", delayed(Checkpoint.read))
    monkeypatch.setattr(TorchKernels, "experts", delayed(TorchKernels.experts))


@pytest.mark.parametrize("model", PLAIN, ids="-".join, indirect=True)
@pytest.mark.parametrize("overlap", [True, False])
def test_reads_go_on_beside_compute_unless_the_plan_says_no(model, overlap, tmp_path, slow):
    engine_of, alone = model
    options = dict(moe_expert_cache_size="130KiB", moe_backend="torch")
    with engine_of(**options) as engine:
        plan = replace(engine.plan, overlap=overlap)
    file = tmp_path / "trace.json"
    with engine_of(plan=plan, trace=file, **options) as engine:
        results = run_all(engine, _requests()[:2])
        stats = engine._weights.stats()
    events = json.loads(file.read_text())
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [(lanes[e["tid"]], e) for e in events if e["ph"] == "X"]
    reads = [(e["ts"], e["ts"] + e["dur"]) for lane, e in spans if lane.startswith("disk")]
    compute = [
        (e["ts"], e["ts"] + e["dur"]) for lane, e in spans
        if lane == "compute" and e["name"] in ("attention", "experts", "dense", "head")
    ]  # fmt: skip
    overlapping = sum(any(b < f and a < e for a, f in compute) for b, e in reads)
    assert reads and any(e["ph"] == "C" for e in events)
    if overlap:
        assert overlapping > 0.1 * len(reads), f"{overlapping} of {len(reads)} reads overlap"
        assert stats.prefetch_issued > 0 and stats.prefetch_used > 0
    else:
        assert (overlapping, stats.prefetch_issued) == (0, 0)
    assert set(results) < set(alone)


@pytest.mark.parametrize("model", PLAIN, ids="-".join, indirect=True)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_rounded_activations_change_results_but_depend_on_nothing_else(model, backend):
    engine_of, exact = model
    options = dict(dtype="bfloat16", moe_backend=backend)
    alone = {}
    for one in _requests()[::2]:
        with engine_of(**options) as engine:
            alone.update(run_all(engine, [one]))
    with engine_of(moe_expert_cache_size="130KiB", threads=2, **options) as engine:
        results = run_all(engine, _requests())
    torch.set_num_threads(1)
    for name, output in alone.items():
        assert _bits(results[name]) == _bits(output), name
    assert any(_bits(output) != exact[name] for name, output in alone.items())
