"""What passes take is charged to the right phase, once, and to what worked."""

import threading
from dataclasses import replace

import pytest

from engines import engine_for, make_model, prompts, request, run_all
from windlass.device.base import Copy, FileRange
from windlass.device.cpu import CpuDevice
from windlass.engine.phase_meter import PhaseMeter, Readings
from windlass.phases import MODULES, PhaseStats
from windlass.schedule.batch import Segment

PROMPT = Segment(
    sequence=0, token_ids=tuple(range(30)), first_position=0, pages=(0,), state_slot=-1,
    is_prompt=True, long_rope=False, wants_logits=True,
)  # fmt: skip
DECODE = replace(PROMPT, sequence=1, token_ids=(1,), first_position=30, is_prompt=False)


def test_a_step_is_charged_what_changed_since_the_last():
    meter = PhaseMeter()
    spans = {"attention": 1.0, "experts": 2.0, "route": 0.5, "combine": 0.25, "head": 0.125}
    first = Readings(1000, 3.0, 0.5, spans)
    meter.add((PROMPT,), first, passes=1, output_tokens=1, seconds=6.0)
    later = Readings(1500, 3.5, 0.75, {**spans, "experts": 4.0, "shared": 1.0, "sample": 9.0})
    meter.add((DECODE,), later, passes=1, output_tokens=1, seconds=4.0)
    meter.add((*[DECODE] * 10, PROMPT), later, passes=2, output_tokens=11, seconds=8.0)
    assert meter.phases["prefill"] == PhaseStats(
        seconds=6.0, prompt_s=6.0, passes=1, prompt_tokens=30, output_tokens=1, first_tokens=1,
        bytes_read=1000, disk_s=3.0, wait_s=0.5,
        modules={"attention": 1.0, "experts": 2.0, "dense": 0.75, "head": 0.125},
    )  # fmt: skip
    assert meter.phases["prefill"].other_s == 6.0 - 3.875 - 0.5
    decode = meter.phases["decode"]
    assert (decode.bytes_read, decode.disk_s, decode.wait_s) == (500, 0.5, 0.25)
    assert decode.busy == {"disk": 0.5, "host": 3.75} and decode.first_tokens == 0
    mixed = meter.phases["mixed"]
    assert mixed.seconds == 8.0 and mixed.prompt_s == 8.0 * 30 / 40
    assert (mixed.passes, mixed.prompt_tokens, mixed.output_tokens) == (2, 30, 11)
    assert mixed.bytes_read == 0 and mixed.host_s == 0.0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meter")
    make_model("qwen3_moe", folder)
    return folder


def test_phases_of_a_run_add_up(path):
    """Four sequences at once, so that later prompts join those that decode."""
    requests = [request(f"r{i}", p, max_tokens=3 + i) for i, p in enumerate(prompts((20,) * 8))]
    with engine_for(path, max_num_seqs=4, moe_expert_cache_size="64KiB") as engine:
        run_all(engine, requests)
        stats = engine.stats()
    assert set(stats.phases) == {"prefill", "mixed", "decode"}
    total = stats.total
    assert total.passes == stats.passes and total.seconds == pytest.approx(stats.pass_s)
    assert total.prompt_tokens == stats.prompt_tokens == 160
    assert total.output_tokens == stats.generated_tokens == sum(3 + i for i in range(8))
    assert total.first_tokens == 8 and stats.decode_tokens == stats.generated_tokens - 8
    assert stats.prefill_s + stats.decode_s == pytest.approx(stats.pass_s)
    assert 0 < total.bytes_read <= stats.bytes_read  # what is read ahead after the last pass
    assert 0 < total.wait_s and total.wait_s == pytest.approx(stats.wait_s)
    assert 0 < total.disk_s
    assert all(total.modules[name] > 0 for name in MODULES)
    assert total.host_s + total.wait_s < total.seconds
    assert stats.phases["decode"].prompt_s == 0 < stats.phases["mixed"].prompt_s


class _Gate:
    """A source whose reads wait until they are let go."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()

    def read(self, file, offset, into):
        self.begun.release()
        assert self.go.wait(120)


def test_reads_at_the_same_time_keep_a_device_busy_once():
    device, gate = CpuDevice(2), _Gate()
    assert device.busy_s == 0
    memory = device.allocate(8192)
    device.submit(
        Copy(FileRange(gate, "f", 0, 4096), memory.part(0, 4096), "x"), lambda error: None
    )
    assert gate.begun.acquire(timeout=120)
    alone = device.busy_s
    assert 0 < alone < device.busy_s  # runs on while something is under way
    device.submit(
        Copy(FileRange(gate, "f", 0, 4096), memory.part(4096, 4096), "y"), lambda error: None
    )
    assert gate.begun.acquire(timeout=120)
    while_reading = device.busy_s
    assert alone < while_reading
    gate.go.set()
    device.close()
    assert device._reading == 0
    assert while_reading < device.busy_s == device.busy_s
