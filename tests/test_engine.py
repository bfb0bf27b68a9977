"""The engine around the passes: what it opens and closes, and what it keeps of requests."""

import gc
import os
import shutil
import threading
import time

import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from windlass import build
from windlass.errors import BudgetError
from windlass.memory import weights
from windlass.memory.views import make_views
from windlass.units import MIB


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
        until = time.monotonic() + 10
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

    def watched(recipe, memory):
        views = make_views(recipe, memory)
        if views.has_copies:
            storages = {t.untyped_storage().data_ptr(): t for t in views.tensors.values()}
            copied.append(sum(t.untyped_storage().nbytes() for t in storages.values()))
        return views

    monkeypatch.setattr(weights, "make_views", watched)
    monkeypatch.setattr(build, "resident_bytes", lambda: 200 * MIB)
    one = request("a", prompts([9])[0], logprobs=2)
    results = []
    for path in (folder, _odd_copy(folder, tmp_path / "odd")):
        with engine_for(path) as engine:
            results.append(run_all(engine, [one])["a"].outputs)
            assert engine.plan.process_bytes == 200 * MIB + max(copied)
    assert results[0] == results[1]
    assert max(copied) > 10_000
