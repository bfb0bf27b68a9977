"""Layers that are captured and replayed: the same bits as computed anew, of every family, and
nothing is replayed that would have to be decided again."""

import subprocess
import sys

import pytest
import torch

from backends import LIBRARY, NATIVE, kernels_of
from engines import FAMILIES, engine_for, make_model, prompts, request, run_all
from windlass.ids import Part, WeightKey
from windlass.kernels.cpu.native_capture import NativeCapture
from windlass.kernels.interface import AttentionWork
from windlass.models.spec import RmsNorm
from windlass.schedule import batch as batches
from windlass.tensors import StoredTensors

# What torch computes within all of their layers: a layer norm, a mixer, a clamp.
NEVER = {"phimoe", "dbrx", "olmoe"}

pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"the native library {LIBRARY}")


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Layers, and keys of blocks, that were replayed and not computed anew."""
    layers: list[object] = []
    run = NativeCapture.run

    def watched(capture, key, body, **more):
        before = capture.num_replayed
        result = run(capture, key, body, **more)
        layers.extend([key] * (capture.num_replayed - before))
        return result

    monkeypatch.setattr(NativeCapture, "run", watched)
    return layers


def answers(path, **options):
    """Three sequences that begin and end at different times, sampled; every bit of them."""
    lengths = [(5, 9), (70, 14), (30, 5)]
    requests = [
        request(f"{i}", prompt, max_tokens=tokens, temperature=0.8, seed=i, logprobs=3)
        for i, (prompt, (_, tokens)) in enumerate(
            zip(prompts([length for length, _ in lengths]), lengths, strict=True)
        )
    ]
    with engine_for(path, moe_backend="cpu", **options) as engine:
        first = run_all(engine, requests[:1])
        return {
            name: [
                (
                    one.token_ids,
                    [
                        sorted((t, p.logprob) for t, p in step.items())
                        for step in one.logprobs or ()
                    ],
                )
                for one in output.outputs
            ]
            for name, output in (first | run_all(engine, requests[1:])).items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_bits(family, tmp_path, monkeypatch, replayed):
    make_model(family, tmp_path)
    got = answers(tmp_path)
    assert bool(replayed) == (family not in NEVER)
    replayed.clear()
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    assert got == answers(tmp_path) and not replayed


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "int8"}, {"dtype": "bfloat16"}, {"schedule": "model-based"}]
)
def test_so_do_options(options, tmp_path, monkeypatch, replayed):
    make_model("qwen3_moe", tmp_path)
    got = answers(tmp_path, **options)
    assert replayed
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    assert got == answers(tmp_path, **options)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gemma4_text", "gpt_oss", "lfm2_moe"])
def test_of_layers_whose_experts_may_be_evicted_the_blocks_are(
    family, tmp_path, monkeypatch, replayed
):
    make_model(family, tmp_path)
    got = answers(tmp_path, moe_expert_cache_size="1")
    with_experts = [one for one in replayed if isinstance(one, WeightKey)]
    assert with_experts and {one.part for one in with_experts} == {Part.BLOCK}
    assert not {one.layer for one in with_experts} & {*replayed}
    replayed.clear()
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    assert got == answers(tmp_path, moe_expert_cache_size="1") and not replayed


def test_captures_hold_for_later_jobs(tmp_path, replayed):
    """Prompts and other numbers of rows in between change nothing."""
    num_layers = int(make_model("mixtral", tmp_path).config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    several = [request(f"{i}", p, max_tokens=4) for i, p in enumerate(prompts([5, 70, 9]))]
    one = [request("one", prompts([40])[0], max_tokens=8)]
    with engine_for(tmp_path, moe_backend="cpu") as engine:
        run_all(engine, several)
        run_all(engine, one)
        for job in (one, several):
            before = engine.stats().passes
            replayed.clear()
            run_all(engine, job)
            decoded = engine.stats().passes - before - 1
            assert len(replayed) == decoded * num_layers


def test_hits_and_times_are_counted_as_without(tmp_path, monkeypatch, replayed):
    make_model("mixtral", tmp_path)
    counts = []
    for most in (16, 0):
        monkeypatch.setattr(batches, "MOST_CAPTURED", most)
        with engine_for(tmp_path, moe_backend="cpu") as engine:
            run_all(engine, [request("0", prompts([6])[0], max_tokens=12)])
            stats = engine.stats()
        counts.append(stats.expert_requests)
        modules = stats.phases["decode"].modules
        assert all(modules[name] > 0 for name in ("attention", "experts", "dense", "head"))
        assert sum(modules.values()) <= stats.phases["decode"].seconds
    assert counts[0] == counts[1] and replayed


# --- the capture ---------------------------------------------------------------------------------

WORK = AttentionWork((0,), (1,), (0,), ((0,),), (False,))


@pytest.fixture(params=NATIVE)
def kernels(request):
    with kernels_of(request.param) as found:
        yield found


def normalised(kernels, capture, x, weight, extra=lambda y: y):
    capture.begin(WORK)
    return capture.run(0, lambda: extra(kernels.normalise(RmsNorm(eps=1e-6), weight, None, x)))


def test_a_replayed_layer_reads_what_is_there_now(kernels):
    x, weight = torch.randn(1, 48), torch.randn(48)
    capture = kernels.capture(lambda: "norm")
    assert torch.equal(
        normalised(kernels, capture, x, weight),
        kernels.normalise(RmsNorm(eps=1e-6), weight, None, x),
    )
    assert not capture.num_replayed
    x.copy_(torch.randn(1, 48))
    assert torch.equal(
        normalised(kernels, capture, x, weight),
        kernels.normalise(RmsNorm(eps=1e-6), weight, None, x),
    )
    assert capture.num_replayed == 1
    assert capture.seconds()["norm"] > 0 and capture.seconds()["norm"] == 0


def test_a_capture_imports_nothing():
    """The first use of some of torch's modes takes a second, and memory that no plan knows."""
    program = """
import sys, torch
from windlass.kernels.interface import AttentionWork
from windlass.kernels.select import choose_kernels
from windlass.models.spec import RmsNorm
kernels = choose_kernels("cpu", threads=1, bf16_activations=False)
x, weight, before = torch.randn(1, 48), torch.randn(48), set(sys.modules)
capture = kernels.capture(lambda: "")
capture.begin(AttentionWork((0,), (1,), (0,), ((0,),), (False,)))
for _ in range(3):
    capture.run(0, lambda: kernels.normalise(RmsNorm(eps=1e-6), weight, None, x))
assert capture.num_replayed == 2
print(len(set(sys.modules) - before))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 5


@pytest.mark.parametrize(
    "extra",
    [
        lambda y: y + 1,
        lambda y: torch.cat((y, y)),
        lambda y: y.clamp_(0, 1),
        lambda y: y.t().contiguous().flatten() if y.shape[1] > 1 else y,
        lambda y: y.double(),
        lambda y: y if y[0, 0].item() > 0 else y[:1],
    ],
)
def test_what_torch_computes_is_not_replayed(kernels, extra):
    x, weight = torch.randn(2, 48), torch.randn(48)
    capture = kernels.capture(lambda: "")
    results = [normalised(kernels, capture, x, weight, extra) for _ in range(5)]
    assert not capture.num_replayed
    assert [one is None for one in results] == [False, False, False, True, True]


def test_views_are(kernels):
    x, weight = torch.randn(2, 48), torch.randn(48)
    capture = kernels.capture(lambda: "")
    for _ in range(3):
        normalised(kernels, capture, x, weight, lambda y: y.view(2, 6, 8)[:, 1:].split(2, 1))
    assert capture.num_replayed == 2


def test_results_of_a_layer_lie_apart_and_their_memory_is_used_again(kernels):
    first, second = (kernels.capture(lambda: "") for _ in range(2))
    shapes = [(1, 48), (16, 5000), (3, 7), (2, 3, 4), (16, 5000)]

    def taken(capture):
        capture.begin(WORK)
        return capture.run(0, lambda: [capture.empty(*shape) for shape in shapes])

    for capture in (first, second):
        found = taken(capture)
        assert [tuple(one.shape) for one in found] == shapes
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in found)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert [one.data_ptr() for one in taken(first)] == [one.data_ptr() for one in taken(second)]


def test_copies_of_weights_are_not_kept(kernels):
    """A transposed packed matrix is widened for a call: no slot is planned for the copy."""
    from windlass.kernels.cpu.prepared import Linears

    linears = Linears([(torch.randn(4, 8), None)])
    linears.has_copies = True
    w = StoredTensors()
    w.prepared["x",] = linears
    capture = kernels.capture(lambda: "")
    capture.begin(WORK)
    for _ in range(3):
        capture.run(0, lambda: kernels.linears(torch.ones(1, 8), w, ("x",)))
    assert not capture.num_replayed
