"""Doctor: timing by medians, the disk's reader, rates from known seconds, reports that are kept.
Seconds are given here, so that every rate is exact."""

import itertools
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import windlass.doctor.device_rates as device_rates
import windlass.doctor.disk as disk
import windlass.doctor.examine as examine_module
import windlass.doctor.kernel_rates as kernel_rates
import windlass.doctor.overhead as overhead
from engines import make_model
from windlass.checkpoint.reader import Checkpoint
from windlass.cli import main
from windlass.device.cuda_rates import find_cuda
from windlass.doctor.bench_model import (
    KINDS,
    checkpoint_model,
    cold_parts,
    random_model,
    weight_kind,
)
from windlass.doctor.disk import DiskRates, drop_cached, measure_disk, scratch_checkpoint
from windlass.doctor.environment import disk_of, read_environment
from windlass.doctor.examine import Subject, examine, kept_report
from windlass.doctor.kernel_rates import ROWS, Findings, measure_attention, measure_products
from windlass.doctor.profile_store import cache_key, load_report, save_report
from windlass.doctor.tables import Report
from windlass.doctor.timing import Load, Timing, measure, noise_line
from windlass.errors import CheckpointError, UsageError
from windlass.hardware.preset import BYTES_PER_WEIGHT
from windlass.hardware.profile import Curve, LinkRates
from windlass.ids import Part
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import Gqa, Mla
from windlass.units import KIB, MIB


class Clock:
    """Moves on by itself at each look, and where a call says so."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


# --- timing ---------------------------------------------------------------------------------------


def test_a_slow_call_is_timed_alone_and_the_median_ignores_one_disturbance():
    clock, seconds = Clock(), itertools.chain([9, 0.1, 0.1, 5, 0.2], itertools.repeat(0.1))
    timing = measure(lambda: clock.work(next(seconds)), samples=5, limit_s=100, clock=clock)
    assert len(timing.samples) == 5 and timing.median_s == pytest.approx(0.1)
    assert timing.spread == pytest.approx(49)


def test_short_calls_are_repeated_within_a_sample():
    clock, calls = Clock(), itertools.count()

    def call() -> None:
        next(calls)
        clock.work(0.001)

    timing = measure(call, samples=4, sample_s=0.01, clock=clock)
    assert timing.median_s == pytest.approx(0.001) and len(timing.samples) == 4
    assert next(calls) == 2 + 4 * 10


def test_a_limit_leaves_three_samples():
    clock = Clock()
    timing = measure(lambda: clock.work(1), samples=9, limit_s=0.5, clock=clock)
    assert len(timing.samples) == 3


def test_noise_is_said_in_one_line():
    assert noise_line({"a": 0.19, "b": 0.0}, others=0.1, cores=2) is None
    line = noise_line({"a": 0.5, "b": 0.3, "c": 0.1}, others=1.5, cores=4)
    assert (
        line is not None
        and "2 of 3" in line
        and "worst: a, 50 %" in line
        and "1.5 of 4 cores" in line
    )
    assert "cores" not in (noise_line({"a": 0.5}, others=0.1, cores=2) or "cores")


def test_load_counts_what_others_did(tmp_path):
    tick = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text("cpu  1000 0 1000 5 5 0 0 0\n")
    load = Load(tmp_path)
    stat.write_text(f"cpu  {1000 + 10**6 * tick} 0 1000 999999 5 0 0 0\n")
    assert load.cores() > 1000  # a million seconds of work, however long this test took
    stat.write_text("cpu  1000 0 1000 5 5 0 0 0\n")
    assert load.cores() == 0


# --- environment ----------------------------------------------------------------------------------


def test_the_disk_of_a_path_is_the_deepest_and_last_mount(tmp_path):
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)
    mounts = (
        ("/", "ext4", "/dev/vda"), (tmp_path, "xfs", "/dev/hidden"), (tmp_path, "btrfs", "/dev/b"),
        (f"{tmp_path}/other", "nfs", "server:/x"), (str(tmp_path)[:-1], "tmpfs", "t"),
    )  # fmt: skip
    folder.joinpath("mountinfo").write_text(
        "".join(f"1 0 8:1 / {m} rw,x - {kind} {dev} rw\n" for m, kind, dev in mounts)
    )
    found = disk_of(tmp_path / "not yet" / "there", proc=tmp_path / "proc")
    assert (found.mount, found.file_system, found.device) == (str(tmp_path), "btrfs", "/dev/b")
    assert found.path.endswith("not yet/there") and 0 < found.free_bytes <= found.total_bytes


# --- disk -----------------------------------------------------------------------------------------


def test_reads_in_flight_are_the_fewest_that_are_fast_enough():
    rates = {(64 * KIB, d): 1e8 * d for d in (1, 4, 8)}
    rates |= {(4 * MIB, 1): 5e8, (4 * MIB, 4): 9.8e8, (4 * MIB, 8): 1e9, (16 * MIB, 8): 9e9}
    found = DiskRates(rates, {}, "dio", 1, False)
    assert found.in_flight == 4
    assert found.curve.points == ((64 * KIB, 4e8), (4 * MIB, 9.8e8))
    assert DiskRates({(64 * KIB, 1): 1.0, (64 * KIB, 4): 2.0}, {}, "dio", 1, False).in_flight == 4


def test_the_file_to_read_has_a_bounded_size_and_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_FILE_BYTES", 3 * MIB + 5)
    monkeypatch.setattr(disk, "_FEWEST_BYTES", MIB)
    with pytest.raises(ZeroDivisionError), scratch_checkpoint(tmp_path / "cache") as folder:
        file = folder / "model.safetensors"
        size, content = file.stat().st_size, file.read_bytes()
        assert 3 * MIB < size < 3 * MIB + 4096
        assert content[-MIB:] != content[-2 * MIB : -MIB]
        raise ZeroDivisionError
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_not_filled(tmp_path, monkeypatch):
    stats = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 100 * MIB // stats.f_frsize, stats.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with (
        pytest.raises(UsageError, match="free some, or give --model"),
        scratch_checkpoint(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_FILE_BYTES", 8 * MIB)
    monkeypatch.setattr(disk, "_FEWEST_BYTES", MIB)
    with scratch_checkpoint(tmp_path) as folder:
        yield folder


def test_the_disk_is_read_by_size_and_depth(small_file, monkeypatch):
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", MIB)
    read: list[tuple[int, int]] = []
    real = Checkpoint.read

    def spy(self, file, offset, into):
        read.append((offset, len(into)))
        real(self, file, offset, into)

    monkeypatch.setattr(Checkpoint, "read", spy)
    clock = Clock(tick=0.001)
    rates = measure_disk(small_file, clock=clock)
    sizes = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
    assert set(rates.rates) == {(size, depth) for size in sizes for depth in (1, 4, 8)}
    assert all(rate > 0 for rate in rates.rates.values())
    assert rates.is_repeated and rates.curve.points[-1][0] == 4 * MIB
    assert {size for _, size in read} == set(sizes)
    # the clock moves once for each read and twice more: 16 reads of 64 KiB, one at a time
    first = 64 * KIB * 16 / (0.001 * 17)
    assert rates.rates[64 * KIB, 1] == pytest.approx(first, rel=0.1)


def test_no_place_is_read_twice_before_all_were(small_file):
    source = Checkpoint(small_file)
    places = disk._Places(small_file, source)
    seen = [places.next(4 * MIB) for _ in range(2)]
    assert len(set(seen)) == 2 and not places.is_repeated
    assert places.next(4 * MIB) in seen and places.is_repeated
    source.close()


def test_a_checkpoint_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_FILE_BYTES", 8 * MIB)
    monkeypatch.setattr(disk, "_FEWEST_BYTES", MIB)
    monkeypatch.setattr(disk, "READ_BYTES", (64 * MIB,))
    with scratch_checkpoint(tmp_path) as folder, pytest.raises(CheckpointError, match="--model"):
        measure_disk(folder)


def test_a_failed_read_is_reported(small_file, monkeypatch):
    def fail(self, file, offset, into):
        raise CheckpointError("gone")

    monkeypatch.setattr(Checkpoint, "read", fail)
    with pytest.raises(CheckpointError, match="gone"):
        measure_disk(small_file)


def test_dropping_what_is_cached_needs_only_the_files(small_file):
    drop_cached(small_file)
    assert (small_file / "model.safetensors").stat().st_size > 8 * MIB


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_have_every_kind_of_weights(kind):
    model = random_model(kind)
    experts = cold_parts(model, Part.EXPERT, fewest=2, cold_bytes=1)
    assert [weight_kind(w[name]) for w in experts for name in ("gate", "up", "down")] == [kind] * 6


def test_parts_are_copied_until_they_are_cold():
    model = random_model("bfloat16")
    parts = cold_parts(model, Part.BLOCK, cold_bytes=100 * MIB)
    size = sum(w.numel() * w.itemsize for w in parts[0].values() if isinstance(w, torch.Tensor))
    assert len(parts) == pytest.approx(100 * MIB / size, abs=1.1) and len(parts) > 2
    first, third = (parts[i]["q_proj.weight"] for i in (0, 2))
    assert isinstance(first, torch.Tensor) and isinstance(third, torch.Tensor)
    assert torch.equal(first, third) and first.data_ptr() != third.data_ptr()


@pytest.fixture
def one_second(monkeypatch):
    """Every call takes a second, and is made once."""

    def fake(call, **settings):
        call()
        return Timing((1.0, 1.0, 1.5))

    for module in (kernel_rates, device_rates):
        monkeypatch.setattr(module, "measure", fake)
    monkeypatch.setattr(kernel_rates, "cold_parts", partial(cold_parts, cold_bytes=1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_model("qwen3_moe", path)
    return path


def test_rates_are_flops_by_seconds(one_second, tiny):
    model, findings = checkpoint_model(tiny), Findings()
    kernels = TorchKernels()
    measure_products(model, kernels, findings)
    decode, prefill = measure_attention(model, kernels, findings)
    spec = model.spec
    attention, ffn = spec.blocks[0].attention, model.moe.expert
    assert isinstance(attention, Gqa)
    (kind,) = findings.experts
    # a group of 8 experts in one call of a second; one alone beyond 256 rows
    expected = [
        (8 if rows <= 256 else 1) * 6 * spec.hidden_size * ffn.intermediate * rows for rows in ROWS
    ]
    assert [rate for _, rate in findings.experts[kind].points] == pytest.approx(expected)
    width = attention.head_dim * (2 * attention.num_heads + 2 * attention.num_kv_heads)
    dense = [2 * spec.hidden_size * width * rows for rows in ROWS]
    assert [rate for _, rate in findings.dense[kind].points] == pytest.approx(dense)
    assert decode == 32 * 512 * 2 * 2 * attention.num_kv_heads * attention.head_dim
    assert prefill == 4 * attention.num_heads * attention.head_dim * 512 * 513 / 2
    assert findings.spread[f"experts {kind}, 1024 rows"] == pytest.approx(0.5)
    assert {"decode attention", "prefill attention"} < set(findings.spread)


def test_rounds_end_early_where_time_is_short(monkeypatch):
    found, seen = Findings(), []

    def time_rows(rows: int) -> Timing:
        seen.append(rows)
        return Timing((float(rows),))

    assert found.rounds(time_rows)[4].samples == (4.0,) * 3 and not found.is_hurried
    monkeypatch.setattr(kernel_rates, "_PATIENCE_S", -1.0)
    assert found.rounds(time_rows)[4].samples == (4.0,) and found.is_hurried
    assert seen == [*ROWS] * 4


def test_attention_of_latents_counts_them_once(one_second, tmp_path):
    make_model("deepseek_v2", tmp_path)
    model = checkpoint_model(tmp_path)
    attention = model.spec.blocks[0].attention
    assert isinstance(attention, Mla) and attention.rope is not None
    decode, prefill = measure_attention(model, TorchKernels(), Findings())
    latent, rotary = attention.kv_lora_rank, attention.rope.dim
    assert decode == 32 * 512 * 2 * (latent + rotary)
    assert prefill == 2 * attention.num_heads * (2 * latent + rotary) * 512 * 513 / 2


def test_all_of_the_memory_is_read_by_the_kernels_that_are_measured(one_second, monkeypatch):
    monkeypatch.setattr(kernel_rates, "_LARGE_BYTES", MIB)
    read = []
    monkeypatch.setattr(TorchKernels, "read", lambda self, x: read.append(x.numel() * x.itemsize))
    timing = kernel_rates.measure_memory(TorchKernels())
    assert set(read) == {MIB}
    assert kernel_rates.memory_rate(timing) == MIB


def test_overhead_is_what_the_kernels_of_a_layer_do_not_take(monkeypatch):
    from windlass.options import EngineOptions

    # the clock does not see how long a call takes
    small = {"hidden_size": 32, "head_dim": 8, "vocab_size": 512}
    monkeypatch.setattr(overhead, "_CONFIG", overhead._CONFIG | small)
    monkeypatch.setattr(overhead, "_MANY_PASSES", 3)
    monkeypatch.setattr(overhead, "_ROUNDS", 2)
    options = EngineOptions(moe_backend="torch", threads=1, host_memory=overhead.small_budget())
    found = overhead.measure_overhead(options, Clock(tick=1.0))
    # a second passes between two looks at the clock: before each of the five calls of kernels in a
    # layer, more where experts come in several groups, and one at the very end
    assert len(found.call.samples) == 23
    assert min(found.call.samples) > (6 * 5 + 1) / 6 / 2 - 0.1 and found.call.median_s < 6


def test_overhead_solves_for_calls_experts_and_rows():
    from windlass.models.registry import read_spec

    spec = read_spec(overhead._CONFIG)[0]
    row_s, expert_s, call_s = 1e-5, 2e-5, 1e-4

    def layer(rows, experts):
        return 2 * call_s + experts * expert_s + rows * row_s

    one, many, prompts = layer(1, 8), layer(64, 32), layer(64 * 32, 32)
    found = overhead._solved(spec, [one, one], many, prompts)
    assert found.call.median_s == pytest.approx(call_s)
    assert found.expert_s == pytest.approx(expert_s)
    # of a row: norms 4 x 1024, rotation and norms of 24 heads, 8 kept, 3 + 10 x 1024, routing
    numbers = 5 * 1024 + 6 * 24 * 64 + 3 * 8 * 64 + 2 * 1024 + 4 * 32 + 8 * 8 + 10 * 1024
    assert found.row_rate == pytest.approx(4 * numbers / row_s)


# --- a GPU ----------------------------------------------------------------------------------------


class FakeAccelerator:
    """Computes on the host; remembers its copies."""

    name, memory_bytes, device, capability = "fake", 1 << 30, torch.device("cpu"), 90

    def __init__(self) -> None:
        self.copies: list[tuple[int, bool, bool]] = []
        self.synchronized = 0

    def copier(self, num_bytes, *, down, pinned):
        return lambda: self.copies.append((num_bytes, down, pinned))

    def synchronize(self):
        self.synchronized += 1


def test_a_device_and_its_links(one_second):
    shapes = device_rates.Shapes(
        copies=(KIB, MIB), rows=(1, 2), hidden=8, intermediate=4, cold_bytes=4096, large_bytes=4096,
        heads=(4, 2, 8), sequences=2, context=16, prompt=8,
    )  # fmt: skip
    fake = FakeAccelerator()
    found = device_rates.measure_device(fake, shapes)
    # eight rounds between two synchronisations take a second
    assert found.down.rate.points == found.up.rate.points == ((KIB, 8 * KIB), (MIB, 8 * MIB))
    assert found.down.pageable is not None
    assert found.down.pageable.points == ((KIB, 8 * KIB), (MIB, 8 * MIB))
    pinned = [(down, size) for size, down, is_pinned in fake.copies if is_pinned]
    both = {size: [(True, size), (False, size)] * 8 for size in (KIB, MIB)}
    alone = {size: [(True, size)] * 8 + [(False, size)] * 8 for size in (KIB, MIB)}
    assert pinned == both[KIB] + alone[KIB] + both[MIB] + alone[MIB]
    assert found.down.alone is not None and found.down.alone.points[1] == (MIB, 8 * MIB)
    processor = found.processor
    assert processor.memory_rate == 8 * 4096 and processor.call_s == pytest.approx(1 / 64)
    assert set(processor.experts) == set(processor.dense) == set(BYTES_PER_WEIGHT)
    few, many = (processor.experts["int4"].at(rows) for rows in (1, 2))
    assert few == many == processor.experts["bfloat16"].best  # a quarter of the bytes
    assert processor.experts["bfloat16"].points == ((1, 8 * 6 * 32), (2, 8 * 6 * 32 * 2))
    assert processor.dense["float32"].points == ((1, 8 * 128), (2, 8 * 256))
    assert processor.decode_attention == 8 * 2 * 2 * 2 * 16 * 8 * 2
    assert processor.prefill_attention == 8 * 4 * 4 * 8 * 8 * 9 / 2
    assert fake.synchronized >= 10 and found.spread["device memory"] == pytest.approx(0.5)
    assert found.attention_beside_copies is None


def test_the_host_attends_while_copies_are_under_way(one_second):
    """Both links have copies for longer than attention took alone, and are waited for after it."""
    fake = FakeAccelerator()
    link = LinkRates(rate=Curve(((KIB, 1e12),)))
    order = []

    def attend():
        order.append(("attend", len(fake.copies), fake.synchronized))
        time.sleep(1e-4)

    bench = device_rates._Bench(fake, device_rates.Shapes(copies=(KIB,)), None)
    rate = bench.beside_copies(device_rates.HostAttention(attend, 10**6), link, link)
    assert 0 < rate <= 1e10 and fake.synchronized == 5
    assert order[0] == ("attend", 0, 0)  # alone, to know how long it takes
    for number, (_, copies, synchronized) in enumerate(order[1:]):
        assert copies >= 2 * (number + 1) * int(2e-4 * 1e12 / KIB) > 0 and synchronized == number
    assert {down for _, down, _ in fake.copies} == {True, False}


def test_experts_are_measured_by_the_kernels_of_the_device(one_second):
    """Eight experts a call, each over its rows, with weights in turn."""
    calls = []

    class Kernels(TorchKernels):
        def experts(self, x_TD, experts, groups, activation, out):
            super().experts(x_TD, experts, groups, activation, out)
            calls.append((x_TD.shape[0], len(experts), bool(out.isfinite().all())))

    shapes = device_rates.Shapes(
        copies=(KIB,), rows=(1, 2), hidden=64, intermediate=64, cold_bytes=4096, large_bytes=4096,
        heads=(4, 2, 8), sequences=2, context=16, prompt=8,
    )  # fmt: skip
    found = device_rates.measure_device(FakeAccelerator(), shapes, kernels=Kernels())
    assert set(calls) == {(8, 8, True), (16, 8, True)}
    flops = 8 * 6 * 64 * 64 * 8  # eight rounds in a second, of one row of eight experts
    assert found.processor.experts["float32"].points == ((1, flops), (2, 2 * flops))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_device():
    device = find_cuda("cuda")
    assert device is not None
    found = device_rates.measure_device(device, device_rates.Shapes(cold_bytes=MIB))
    assert found.processor.memory_rate > 1e9 and found.down.rate.best > 1e8


# --- whole examinations ---------------------------------------------------------------------------


@pytest.fixture
def quick(one_second, monkeypatch):
    """Examinations without waiting; counts them."""
    monkeypatch.setattr(kernel_rates, "_LARGE_BYTES", MIB)
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", MIB)
    monkeypatch.setattr(disk, "_FILE_BYTES", 8 * MIB)
    monkeypatch.setattr(disk, "_FEWEST_BYTES", MIB)
    found = overhead.Overhead(Timing((1e-4,)), 1e-5, 1e10)
    monkeypatch.setattr(examine_module, "measure_overhead", lambda options: found)
    monkeypatch.setattr(examine_module, "find_cuda", lambda name: None)
    runs: list[str] = []
    real = measure_disk

    def counted(folder, **settings):
        runs.append(str(folder))
        return real(folder, **settings)

    monkeypatch.setattr(examine_module, "measure_disk", counted)
    return runs


def test_a_report_is_measured_once_and_kept(quick, tiny, tmp_path):
    subject = Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1)
    assert kept_report(subject) is None and quick == []
    before = torch.get_num_threads()
    first = examine(subject)
    assert torch.get_num_threads() == before
    again = examine(subject)
    assert kept_report(subject) == first
    assert quick == [str(tiny)] and again == first
    assert first.profile.source == "measured" and first.profile.threads == 1
    assert first.profile.disk_path == str(tiny)
    assert examine(subject, fresh=True).profile.host.experts == first.profile.host.experts
    assert len(quick) == 2
    # other threads, kernels, path: other reports
    examine(Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=2))
    examine(Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1, dtype="bfloat16"))
    assert len(quick) == 4
    assert [path.suffix for path in (tmp_path / "windlass/profiles").iterdir()] == [".json"] * 3


def test_a_report_that_cannot_be_read_is_measured_again(quick, tiny, tmp_path):
    subject = Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1)
    examine(subject)
    (path,) = (tmp_path / "windlass/profiles").iterdir()
    path.write_text(path.read_text()[:100])
    examine(subject)
    assert len(quick) == 2


@pytest.mark.parametrize(
    "change",
    ["cpu", "features", "cores", "gpu", "system", "threads", "kernels", "windlass",
     "torch", "disk", "model"],
)  # fmt: skip
def test_every_change_makes_a_report_stale(quick, tiny, tmp_path, change):
    report = examine(Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1))
    key = cache_key(report.environment, tiny)
    save_report(tmp_path, key, report)
    assert load_report(tmp_path, key) == report
    assert load_report(tmp_path, {**key, change: "another"}) is None


def test_a_limit_on_memory_keeps_the_report(quick, tiny, tmp_path, monkeypatch):
    subject = Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1)
    examine(subject)
    real = read_environment
    monkeypatch.setattr(
        examine_module,
        "read_environment",
        lambda *args, **kw: replace(real(*args, **kw), memory_bytes=1 << 30, limits=(1 << 30,)),
    )
    again = examine(subject)
    assert len(quick) == 1
    assert again.environment.memory_bytes == again.profile.host.memory_bytes == 1 << 30
    assert again.environment.limits == (1 << 30,)


def test_a_cache_that_cannot_be_written_is_one_error(quick, tiny, tmp_path):
    (tmp_path / "windlass").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"):
        examine(Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1))


def test_without_a_checkpoint_all_kinds_are_measured_and_no_file_stays(
    quick, tmp_path, monkeypatch
):
    monkeypatch.setattr(kernel_rates, "ROWS", (1, 2))
    monkeypatch.setattr(examine_module, "KINDS", ("bfloat16", "int4"))
    report = examine(Subject(cache=tmp_path, moe_backend="torch", threads=1))
    assert set(report.profile.host.experts) == {"bfloat16", "int4"}
    assert [path.name for path in tmp_path.iterdir()] == ["windlass"]


def test_a_report_shows_everything_and_survives_json(quick, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(examine_module, "find_cuda", lambda name: FakeAccelerator())
    small = device_rates.Shapes(
        copies=(KIB,), rows=(1,), hidden=8, intermediate=4, cold_bytes=1, large_bytes=4096,
        heads=(2, 1, 4), sequences=1, context=4, prompt=4,
    )  # fmt: skip
    given = []

    def measure_device(gpu, **more):
        given.append(more["kernels"])
        return device_rates.measure_device(gpu, small, **more)

    monkeypatch.setattr(examine_module, "measure_device", measure_device)
    report = examine(Subject(cache=tmp_path, model=tiny, moe_backend="torch", threads=1))
    (kernels,) = given
    assert type(kernels).__name__ == "_Placed", "not those that a run has on the device"
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    text = "\n".join(report.lines())
    for words in ("processor:", "memory read", "in flight", "expert networks", "dense products",
                  "GPU: fake", "host to device, pinned", "pinned, alone",
                  "while both links are busy", "device to host, pageable",
                  "noisy machine", "were read more than once", "±25%!"):  # fmt: skip
        assert words in text, words
    with pytest.raises(UsageError, match="report"):
        Report.from_json({"version": 1})


def test_the_command_prints_a_table_or_json(quick, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["doctor", "-m", str(tiny), "--moe-backend", "torch", "-t", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "expert networks" in shown.out and "measuring the disk" in shown.err
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["profile"]["threads"] == 1 and "measuring" not in shown.err
    assert len(quick) == 1
    assert main(["doctor", "-m", str(tmp_path / "absent")]) == 2


def test_a_relative_cache_folder_counts_as_none(monkeypatch):
    from windlass.doctor.kept import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/somebody")
    assert cache_folder() == Path("/somebody/.cache")
