"""What a pass on a device with streams sends and fetches, and how often the host waits for it: no
more than it must. None of it changes a bit."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters import Eager
from engines import engine_for, engine_on, make_model, prompts, request, run_all
from fake_cuda import FakeCuda
from families import VOCAB
from nextn import make_nextn
from quantised import make_quantised
from quantised_cases import CASES
from windlass.engine.drafting import Drafting
from windlass.engine.drafts import LayerGuess
from windlass.engine.request import Request
from windlass.errors import CheckpointError
from windlass.runtime import routed_groups
from windlass.runtime.head import Head
from windlass.speculative import SpeculativeConfig

EXPERTS, TOP_K, HIDDEN = 8, 3, 32
_TOKEN = 8 + 4  # bytes of the likeliest: its id and its logit
TIGHT: dict[str, Any] = dict(
    moe_expert_cache_size="64KiB", max_model_len=64, max_num_seqs=3, max_num_batched_tokens=100
)


WIDE = TIGHT | dict(max_num_seqs=12, max_num_batched_tokens=130)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3_moe", path, dtype=torch.bfloat16)
    return path


class Traffic(NamedTuple):
    """Of one pass: waits of the host for results, and copies."""

    waits: int
    uploads: int
    downloads: int
    downloaded_bytes: int

    @classmethod
    def so_far(cls, device: FakeCuda) -> "Traffic":
        waits = device.order.waits["up"]
        return cls(waits, device.num_uploads, device.num_downloads, device.downloaded_bytes)

    def less(self, before: "Traffic") -> "Traffic":
        return Traffic(*(own - other for own, other in zip(self, before, strict=True)))


def _passes(path: Path, requests: Iterable[Request], **options: Any) -> list[Traffic]:
    device = FakeCuda(seed=1)
    found = []
    with engine_on(device, path, **(TIGHT | options)) as engine:
        for one in requests:
            engine.add(one)
        while engine.has_work:
            before = Traffic.so_far(device)
            engine.step()
            found.append(Traffic.so_far(device).less(before))
    assert not device.memory.races
    return found


def _layers(path: Path) -> int:
    """With experts."""
    with engine_for(path, **TIGHT) as engine:
        return sum(layer.network == "experts" for layer in engine._parts.shape.layers)


def test_a_pass_waits_and_copies_no_more_than_it_must(path):
    layers = _layers(path)
    begin, *_, last = _passes(path, [request("a", prompts((20,))[0], max_tokens=9)])
    # many rows: the host waits for tokens alone; counts and ids come with them
    chosen = layers * (8 * EXPERTS + 20 * TOP_K * 8)
    routers = layers  # read once, when their block first is there
    sizes = HIDDEN * 2 + HIDDEN * EXPERTS * 2  # of a norm and a router
    assert begin == Traffic(
        waits=1 + 2 * routers,
        uploads=2,  # cos and sin, beside what each pass has
        downloads=2 * layers + 2 + 2 * routers,
        downloaded_bytes=chosen + _TOKEN + layers * sizes,
    )
    # few rows: embedded, then for each layer, then the token; what forecasts learn from
    state = HIDDEN * 4
    assert last == Traffic(
        waits=1 + layers + 1,
        uploads=1,
        downloads=1 + 4 * layers + 1 + 2,
        downloaded_bytes=2 * state
        + layers * (8 * EXPERTS + 8 * TOP_K + 4 * EXPERTS + state)
        + _TOKEN,
    )


def test_pages_of_all_sequences_are_cleared_by_what_each_pass_has(path):
    """Prompts of several pages, and then a page for each sequence in one pass."""
    texts = prompts((30, 30, 30))
    requests = [request(f"r{i}", one, max_tokens=9) for i, one in enumerate(texts)]
    first, *others = _passes(path, requests)
    assert first.uploads == 2 and {one.uploads for one in others} == {1}


def test_logits_come_of_rows_alone_of_which_more_is_asked(path):
    asks: list[dict[str, Any]] = [{}, dict(logprobs=0), dict(temperature=1.0, seed=1)]
    last = []
    for ask in asks:
        given = [
            request("a", prompts((20,))[0], max_tokens=4),
            request("b", prompts((9,))[0], max_tokens=4, **ask),
        ]
        last.append(_passes(path, given)[-1])
    greedy, *others = last
    for other in others:
        assert other == Traffic(
            waits=greedy.waits,
            uploads=1,
            downloads=greedy.downloads + 1,
            downloaded_bytes=greedy.downloaded_bytes - _TOKEN + 4 * VOCAB,
        )


def _varied() -> list[Request]:
    """Some take the likeliest token, of some more is asked, of one only at first."""
    plain = [request(f"r{i}", one, max_tokens=2 + i) for i, one in enumerate(prompts((20, 3, 9)))]
    asks: list[dict[str, Any]] = [
        dict(logprobs=1), dict(temperature=0.8, seed=3), dict(logit_bias={7: 3.0}),
        dict(repetition_penalty=1.3), dict(allowed_token_ids=[5, 9, 11]),
        dict(min_tokens=2, ignore_eos=False, stop_token_ids=list(range(40))),
        dict(prompt_logprobs=4),
    ]  # fmt: skip
    texts = prompts((4, 7, 5, 12, 6, 8, 10), seed=1)
    return plain + [
        request(f"a{i}", text, max_tokens=3, **ask)
        for i, (text, ask) in enumerate(zip(texts, asks, strict=True))
    ]


def _found(results: dict[str, Any]) -> dict[str, Any]:
    return {name: (one.outputs, one.prompt_logprobs) for name, one in results.items()}


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, Any]:
    """What a CPU says."""
    with engine_for(path, moe_backend="torch", **WIDE) as engine:
        return _found(run_all(engine, _varied()))


@pytest.mark.parametrize(("groups", "many"), [(1, 3), (2, 0.0), (2, 1e9)])
def test_the_same_bits_whether_routing_is_read_back_or_not(
    path, expected, groups, many, monkeypatch
):
    monkeypatch.setattr(routed_groups, "MANY_ROWS", many)
    device = FakeCuda(seed=int(many) % 7, late=0.9)
    with engine_on(device, path, **WIDE, batch_groups=groups, micro_batch_size=64) as engine:
        assert _found(run_all(engine, _varied())) == expected
        passes, weights = engine.stats().passes, engine._weights.stats()
    assert not device.memory.races and weights.prefetch_used > 0
    layers = _layers(path)
    least = passes + 2 * layers  # results, and routers once
    found = device.order.waits["up"]
    assert found == least if many == 0 else found > least
    if many > EXPERTS:
        assert found >= least + passes * (1 + layers)


@pytest.mark.parametrize("family", ["gemma4_text", "deepseek_v3"])
def test_numbers_of_a_block_and_guesses_of_a_layer_stay_on_the_device(
    family, tmp_path, monkeypatch
):
    """A scale behind each block; a layer that drafts, whose rows are some of the pass."""
    options = dict(TIGHT)
    if family == "deepseek_v3":
        make_nextn(family, tmp_path)
        options["speculative_config"] = SpeculativeConfig(method="mtp")
        monkeypatch.setattr(Drafting, "of", lambda _: Eager(1, LayerGuess, is_heard=True))
    else:
        make_model(family, tmp_path, dtype=torch.bfloat16)
    with engine_for(tmp_path, moe_backend="torch", **options) as engine:
        expected = _found(run_all(engine, _varied()[:2]))
    device = FakeCuda(seed=3)
    with engine_on(device, tmp_path, **options) as engine:
        assert _found(run_all(engine, _varied()[:2])) == expected
        drafts = engine.stats().drafts
    assert not device.memory.races
    assert (family == "deepseek_v3") == (drafts is not None and drafts.proposed > 0)


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [("gptq-symmetric", ""), ("gptq-symmetric", ".qzeros"), ("int8-everything", "")],
)
def test_what_is_looked_at_when_it_is_first_read_comes_to_the_host(name, spoilt, tmp_path):
    """Zero points that say nothing, and routers, of packed ones too."""
    case = CASES[name]
    make_quantised(case.family, case.quantiser, case.settings, tmp_path, **case.changes)
    if spoilt:
        file, name = tmp_path / "model.safetensors", f"model.layers.2.mlp.experts.3.up_proj{spoilt}"
        tensors = load_file(file)
        tensors[name].view(-1)[2] = 7
        save_file(tensors, file, metadata={"format": "pt"})
    one = request("a", prompts((30,))[0], max_tokens=2)
    with engine_for(tmp_path, moe_backend="torch", **TIGHT) as engine:
        if not spoilt:
            expected = _found(run_all(engine, [one]))
    device = FakeCuda(seed=3)
    with engine_on(device, tmp_path, **TIGHT) as engine:
        if spoilt:
            with pytest.raises(CheckpointError, match="got zero points"):
                run_all(engine, [one])
        else:
            assert _found(run_all(engine, [one])) == expected
    assert not device.memory.races


def test_logits_that_are_no_numbers_fail_their_request_alone(path, monkeypatch):
    whole = Head.add

    def add(self, chunk, w_CD, final):
        final.likeliest[0][:1] = torch.nan
        whole(self, chunk, w_CD, final)

    monkeypatch.setattr(Head, "add", add)
    device = FakeCuda(seed=4)
    requests = [request(f"r{i}", one, max_tokens=1) for i, one in enumerate(prompts((20, 3)))]
    with engine_on(device, path, **TIGHT) as engine:
        results = run_all(engine, requests)
    assert results["r0"].outputs[0].finish_reason == "error"
    assert results["r1"].outputs[0].finish_reason == "length"
