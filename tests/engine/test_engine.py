"""The engine around the passes: what it opens and closes, and what it keeps of requests."""

import gc
import os
import random
import shutil
import threading
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch

import windlass.build.checkpoint_sizes as model_module
from engines import engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from families import VOCAB
from planning import machine
from windlass.build.open import open_engine
from windlass.checkpoint.views import make_views
from windlass.engine.sampling import Sampled
from windlass.engine.sequence import LogprobLog
from windlass.errors import BudgetError
from windlass.options import EngineOptions
from windlass.units import MIB
from windlass.weights import store as weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3_moe", path, dtype=torch.bfloat16)
    return path


# --- opening and closing --------------------------------------------------------------------------


def _held(folder):
    """Open files of `folder`, and threads of devices."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    threads = [t.name for t in threading.enumerate() if t.name.startswith(("disk", "fake"))]
    return [link for link in links if link.startswith(str(folder))], threads


class _FullDevice(FakeDevice):
    """Has no memory."""

    def allocate(self, num_bytes):
        raise MemoryError("the device is full")


def test_an_engine_that_does_not_open_leaves_nothing_open(folder, tmp_path):
    no_tokenizer = tmp_path / "empty"
    no_tokenizer.mkdir()
    with pytest.raises(Exception, match="tokenizer"):
        engine_for(folder, tokenizer=str(no_tokenizer))
    with pytest.raises(BudgetError):
        engine_for(folder, host_memory=1 << 20, trace=folder / "trace.json")
    with pytest.raises(MemoryError):
        engine_for(folder, device=_FullDevice())
    assert _held(folder) == ([], [])


def test_a_dropped_engine_closes_itself(folder):
    engine = engine_for(folder)
    run_all(engine, [request("a", prompts([5])[0], max_tokens=2)])
    engine.add(request("b", prompts([5])[0]))
    engine.step()
    files, threads = _held(folder)
    assert files and threads
    gc.collect()
    gc.disable()  # no cycle may keep it
    try:
        del engine
        until = time.monotonic() + 120
        while _held(folder) != ([], []) and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert _held(folder) == ([], [])


def test_closing_twice_is_closing_once(folder):
    with engine_for(folder) as engine:
        run_all(engine, [request("a", [3, 4], max_tokens=1)])
    engine.close()
    assert _held(folder) == ([], [])


# --- files whose tensors begin at odd places ------------------------------------------------------


def _odd_copy(folder, target):
    """The same checkpoint with a header one byte longer."""
    shutil.copytree(folder, target)
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    odd = (end - 7).to_bytes(8, "little") + data[8:end] + b" " + data[end:]
    (target / "model.safetensors").write_bytes(odd)
    return target


def test_copies_of_odd_tensors_are_part_of_the_plan(folder, tmp_path, monkeypatch):
    copied = [0]

    def watched(part_reads, memory, **given):
        views = make_views(part_reads, memory, **given)
        if views.has_copies:
            tensors = [t for t in views.tensors.values() if isinstance(t, torch.Tensor)]
            storages = {t.untyped_storage().data_ptr(): t for t in tensors}
            copied.append(sum(t.untyped_storage().nbytes() for t in storages.values()))
        return views

    monkeypatch.setattr(weights, "make_views", watched)
    monkeypatch.setattr(model_module, "resident_bytes", lambda: 200 * MIB)
    one = request("a", prompts([9])[0], logprobs=2)
    results = []
    for path in (folder, _odd_copy(folder, tmp_path / "odd")):
        with engine_for(path) as engine:
            results.append(run_all(engine, [one])["a"].outputs)
            assert engine.plan.host.process_bytes == 200 * MIB + max(copied)
    assert results[0] == results[1]
    assert max(copied) > 10_000


# --- memory of requests ---------------------------------------------------------------------------


def _grown(act) -> int:
    """Bytes of Python objects that `act` leaves."""
    gc.collect()
    tracemalloc.start()
    try:
        act()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_waiting_choices_are_light_and_share_the_prompt(folder):
    with engine_for(folder) as engine:
        many = request("a", prompts([240])[0], max_tokens=1, n=500, repetition_penalty=1.2)
        assert _grown(lambda: engine.add(many)) < 500 * 200
        engine.step()
        begun = engine._open["a"].sequences
        # 512 rows per pass: of all but the first only those after the shared prefix
        assert [choice.queued.index for choice in begun] == [0, 1, 2, 3, 4, 5]
        first = begun[0].tokens(0, 240)
        assert first == many.prompt_token_ids
        engine.abort("a")
        engine.check()
        assert not engine.has_work and not engine._admission.waiting


def test_every_choice_comes_back_once_and_in_order(folder):
    one = request("a", [5, 6, 7], max_tokens=3, n=20, temperature=1.0)
    with engine_for(folder) as engine:
        outputs = run_all(engine, [one])["a"].outputs
        assert [output.index for output in outputs] == list(range(20))
        assert len({output.token_ids for output in outputs}) > 10
        many = [
            request(f"{n}", [5, 6, 7], max_tokens=3, n=n, temperature=1.0, seed=4) for n in (3, 20)
        ]
        few, all_of_them = run_all(engine, many).values()
        assert few.outputs == all_of_them.outputs[:3]


def test_a_log_of_logprobs_is_exact_and_compact():
    chance = random.Random(3)

    def step(num_top):
        top = tuple(
            (chance.randrange(200_000), -20 * chance.random(), i + 1) for i in range(num_top)
        )
        return Sampled(
            chance.randrange(200_000), -chance.random(), chance.randrange(1, 200_000), top
        )

    steps = [step(count) for count in (20, 0, 3, *[20] * 500)]
    log = LogprobLog()

    def fill():
        for one in steps:
            log.add(one)

    assert _grown(fill) < 500 * 21 * 20
    assert log.steps() == steps


def test_logprobs_are_the_same_from_the_log(folder):
    """The drawn token comes first, then the most likely ones, each with its rank."""
    one = request("a", prompts([9])[0], max_tokens=6, logprobs=4, temperature=1.5)
    with engine_for(folder) as engine:
        (output,) = run_all(engine, [one])["a"].outputs
    assert output.logprobs is not None and len(output.logprobs) == 6
    for token, step in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(step)) == token and len(step) in (4, 5)
        ranks = sorted(entry.rank for entry in step.values() if entry.rank is not None)
        assert ranks[:4] == [1, 2, 3, 4]
        assert step[token].decoded_token == f"w{token}"
    drawn = sum(s[t].logprob for t, s in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(drawn)


def test_preemptions_are_counted(folder):
    with engine_for(folder) as engine:
        kv = engine._admission._kv.device
        held = kv.take_pages(kv.num_free_pages - 5)  # as if others had them
        lengths = (20, 20, 20)
        run_all(
            engine,
            [request(str(i), p, max_tokens=70) for i, p in enumerate(prompts(lengths))],
            check=False,
        )
        assert engine.stats().num_preemptions > 0
        kv.give_pages(held)
        engine.check()


# --- LongRoPE -------------------------------------------------------------------------------------


def test_bursts_are_counted_measured_unless_asked_for_and_change_no_token(folder):
    jobs = [request(f"r{i}", p, max_tokens=60, n=1 + i) for i, p in enumerate(prompts((5, 70)))]

    def run(**options):
        with engine_for(folder, **options) as engine:
            found = run_all(engine, jobs)
            texts = {name: [c.token_ids for c in one.outputs] for name, one in found.items()}
            return texts, engine.stats(), engine.plan

    texts, plain, plan = run(burst_tokens=0)
    assert plain.burst_passes == 0 and plain.passes < 70
    again, asked, _ = run(burst_tokens=8)
    assert again == texts and asked.burst_passes > 150 and not asked.bursts_have_lost
    planned = replace(plan, burst_tokens=8, burst_max_seqs=3)
    with engine_for(folder, plan=planned) as engine:
        again = {n: [c.token_ids for c in o.outputs] for n, o in run_all(engine, jobs).items()}
        assert again == texts and 0 < engine.stats().burst_passes < asked.burst_passes


def test_bursts_are_planned_by_rates_that_were_measured(folder):
    slow = machine(disk=1e-3)
    options = EngineOptions(
        model=str(folder), moe_expert_cache_size="4", max_num_seqs=4, max_model_len=64,
        host_memory=4 * 1024 * MIB,
    )  # fmt: skip
    for profile, is_planned in ((slow, False), (replace(slow, source="measured"), True)):
        assert profile.is_assumed != is_planned
        with open_engine(options, profile=profile) as engine:
            assert (engine.plan.burst_tokens > 0) == is_planned


def test_longrope_does_not_depend_on_memory(tmp_path):
    """Its original context has 16 tokens. However few fit, a request that names no limit uses the
    factors of what the model, or the user, allows."""
    make_model("phimoe", tmp_path)

    def first(max_tokens, *, max_model_len=None, fits=None):
        """Log-probabilities of the first token, which ends the choice."""
        one = request(
            "a", [3, 4, 5], max_tokens=max_tokens, stop_token_ids=range(VOCAB), logprobs=3
        )
        with engine_for(tmp_path, max_model_len=max_model_len) as engine:
            engine.max_model_len = fits or engine.max_model_len
            return run_all(engine, [one])["a"].outputs[0].logprobs

    short, long = first(13), first(14)
    assert short != long
    assert first(None) == first(None, fits=16) == long
    assert first(None, max_model_len=16) == short
    assert first(None, max_model_len=17) == long
