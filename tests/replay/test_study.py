"""Everything that is asked for is replayed and said: as a table, plain data and a page."""

import json
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest

from machines import machine
from planning import SPECS, round_sizes
from traces import layer_of, topical_ids, trace_of, written
from windlass.cli import main
from windlass.errors import UsageError
from windlass.forecast.interface import ExpertTable
from windlass.forecast.registry import ForecastSetting, choose_forecast
from windlass.options import EXPERT_FORECASTS
from windlass.perf.sizes import Problem
from windlass.prefetch.registry import choose_policy
from windlass.replay.machine import check_model, profiled_machine
from windlass.replay.metrics import measure
from windlass.replay.page import chart, page
from windlass.replay.run import Deciders, TraceRun, ratio_machine
from windlass.replay.study import NamedMachine, StudyWishes, forecast_of, study
from windlass.replay.trace_file import Router


def a_trace(num_rows=60, **more):
    return trace_of(topical_ids(1, num_rows, 2, 10, 2), 10, num_prompt=4, **more)


def ratio(trace, *rhos):
    return [
        NamedMachine(f"rho {rho:g}", rho, partial(ratio_machine, trace, rho=rho)) for rho in rhos
    ]


@pytest.fixture(scope="module")
def found():
    trace = a_trace()
    wishes = StudyWishes(
        forecasts=("off", "usage"), policies=("lru", "next-use"), resident=(0.3, 1.0),
        machines=ratio(trace, 1.0, 5.0), sees=(1, None),
    )  # fmt: skip
    told: list[str] = []
    return study(trace, wishes, told.append), told


def test_every_combination_runs_once_and_is_told_of(found):
    study, told = found
    assert len(study.runs) == len(told) == 2 * 2 * (2 * 2 + 2)
    names = {(run.resident, run.rho, run.forecast, run.policy) for run in study.runs}
    assert len(names) == len(study.runs)
    assert {run.slots for run in study.runs} == {6, 20}


def test_a_slower_link_is_slower_and_with_all_in_memory_it_is_no_matter(found):
    runs = {(r.resident, r.rho, r.forecast, r.policy): r.metrics for r in found[0].runs}
    for forecast, policy in (("off", "lru"), ("usage", "next-use"), ("1 ahead", "oracle")):
        slow, fast = (runs[0.3, rho, forecast, policy].token_s for rho in (5.0, 1.0))
        assert slow > fast
    assert runs[1.0, 5.0, "off", "lru"].token_s < runs[0.3, 5.0, "off", "lru"].token_s
    small = runs[0.3, 5.0, "off", "lru"]
    assert small.resident_hits == runs[0.3, 1.0, "off", "lru"].resident_hits


def test_bounds_stand_beside_the_best_that_reads_nothing_ahead(found):
    for bound in found[0].bounds:
        own = [r.metrics.resident_hits for r in found[0].runs
               if r.resident == bound.resident and r.forecast == "off"]  # fmt: skip
        assert bound.causal == pytest.approx(1 - max(own))
        assert bound.misses.belady <= bound.misses.forced <= bound.causal + 1e-9


def test_the_document_is_plain_and_whole(found):
    document = json.loads(json.dumps(found[0].to_json()))
    assert set(document) == {"trace", "runs", "bounds", "forecasts"}
    assert document["trace"] == {
        "model": "tiny", "layers": 2, "experts": 10, "top_k": 2, "sequences": 1, "passes": 60,
        "tokens": 56,
    }  # fmt: skip
    for run in document["runs"]:
        assert set(run) == {
            "forecast", "policy", "resident", "slots", "machine", "rho", "expert_bytes",
            "forecast_sources", "tokens", "token_s", "tokens_per_s", "of_resident", "stall_s",
            "resident_hits", "prefetch_hits", "late", "bytes", "demand_bytes", "useful_bytes",
            "wasted_bytes", "cancelled", "good", "warm_after", "recovery", "operating_point",
            "curve",
        }  # fmt: skip
        assert run["tokens_per_s"] == pytest.approx(1 / run["token_s"])
    assert {"belady_misses", "forced_misses", "causal_misses", "gap", "admission", "victim",
            "resident", "slots"} == set(document["bounds"][0])  # fmt: skip
    usage = document["forecasts"]["usage"]
    assert list(document["forecasts"]) == ["usage"]
    assert 0 < usage["means"]["1"]["recall_1k"] < usage["means"]["1"]["recall_2k"] <= 1
    assert set(usage["by_layer"]["1"]) == {"1"} and usage["layer_us"] > 0


def test_the_table_names_every_run(found):
    lines = found[0].lines()
    assert "2 layers of 10 experts, top 2; 1 sequence, 60 passes" in lines[0]
    assert lines[1].split()[:4] == ["resident", "machine", "forecast", "policy"]
    assert len([line for line in lines if line.startswith(("30 %  ", "100 %  "))]) == 24
    assert sum("Belady" in line for line in lines) == 2
    assert sum(line.startswith("usage foretells") for line in lines) >= 3


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_by_itself(found):
    text = page(found[0], "Replay of <t>")
    tags = Tags()
    tags.feed(text)
    assert tags.tags.count("svg") == 2 + 1 + 2 + 2 + 1  # machines, hits, links, times, recall
    assert tags.tags.count("polyline") > 20
    assert not {"script", "link", "img"} & set(tags.tags) and "http" not in text
    assert "Replay of <t>" in tags.text and "Belady" in tags.text


def test_a_chart_puts_points_where_they_belong():
    text = chart("t", {"a": [(0, 0), (10, 50)], "b": [(5, 100)]}, "x", "y")
    assert "points='56.0,260.0 550.0,135.0'" in text
    assert "points='303.0,10.0'" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resident": (0.05,)}, "resident: got 0.05 of 20 experts, allowed 0.1"),
        ({"resident": (1.5,)}, "resident: got 1.5"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(changes, message):
    trace = a_trace(8)
    wishes = {
        "forecasts": ("off",), "policies": ("lru",), "resident": (0.5,),
        "machines": ratio(trace, 1.0), **changes,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        study(trace, StudyWishes(**wishes))


def test_a_trace_of_prompts_alone_has_nothing_to_measure():
    trace = a_trace(4)
    wishes = StudyWishes(
        forecasts=("off",), policies=("lru",), resident=(0.5,), machines=ratio(trace, 1.0)
    )
    with pytest.raises(UsageError, match="got 4 passes, all with prompts"):
        study(trace, wishes)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_and_writes_what_it_found(tmp_path, capsys):
    path = written(tmp_path / "a.trace", a_trace(30, sequences=[0] * 15 + [1] * 15))
    job = tmp_path / "job.jsonl"
    job.write_text('{"custom_id": "de-1"}\n{"custom_id": "en-2"}\n')
    code = main([
        "replay", str(path), "--resident", "40%,0.6", "--rho", "2", "--oracle", "1",
        "--expert-cache-policy", "lru", "--expert-forecast", "off", "--max-num-seqs", "2",
        "--passes", "9", "--prompts", str(job), "--no-guard",
        "--json", str(tmp_path / "o.json"), "--page", str(tmp_path / "o.html"),
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0 and "Belady" in out
    assert err.count("replay: ") == 4
    document = json.loads((tmp_path / "o.json").read_text())
    assert [run["resident"] for run in document["runs"]] == [0.4, 0.4, 0.6, 0.6]
    assert document["trace"]["passes"] == 9 and document["trace"]["sequences"] == 2
    assert "<svg" in (tmp_path / "o.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FILE is missing: a trace that --routing-trace wrote"),
        (["{no}"], "no such: No such file"),
        (["{text}"], "not a routing trace"),
        (["{trace}", "--resident", "0"], "--resident: got '0', allowed more than 0% to 100%"),
        (["{trace}", "--resident", "5%"], "resident: got 0.05 of 20 experts"),
        (["{trace}", "--rho", "0"], "--rho: got '0', allowed a number above 0"),
        (["{trace}", "--oracle", "0"], "--oracle: got '0'"),
        (["{trace}", "--expert-forecast", "luck"], "--expert-forecast: got 'luck', allowed"),
        (["{trace}", "--expert-cache-policy", "lru,fifo"], "got 'fifo', allowed next-use"),
        (
            ["{trace}", "--expert-forecast", "off,gate"],
            "expert-forecast: got gate for a trace without hidden states: record it with",
        ),
        (["{trace}", "--machine", "this"], "--machine: allowed together with --model"),
        (
            ["{trace}", "--machine", "laptop", "--model", "demo"],
            "model: got demo for a trace of tiny: 144 experts in 6 layers, top 4, the trace has 20",
        ),
        (["{trace}", "--prompts", "{text}"], "--prompts: "),
        (["{trace}", "--json", "{trace}"], "--json: got"),
        (["{trace}", "--json", "{no}", "--page", "{no}"], "--page: got"),
        (["{trace}", "--page", "{text}/x"], "there is no such folder"),
        (["{trace}", "--machine", "t4", "--model", "demo", "--rho", "9"], "--rho: allowed without"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "text").write_text("hello\n")
    names = {
        "{no}": tmp_path / "no such", "{text}": tmp_path / "text",
        "{trace}": written(tmp_path / "t", a_trace(12)),
    }  # fmt: skip
    code = main(["replay", *(str(names.get(one, one)) for one in arguments)])
    out, err = capsys.readouterr()
    assert code in (1, 2) and out == ""
    assert err.startswith("windlass: ") and err.count("\n") == 1
    assert message in err


def test_a_machine_with_a_profile_takes_milliseconds():
    whole = SPECS["olmoe-1b-7b"]
    spec = replace(whole, blocks=whole.blocks[:2])
    problem = Problem(spec, round_sizes(spec), machine())
    table = ExpertTable.of(spec)
    ids = topical_ids(2, 30, len(spec.blocks), table.num_experts[0], table.top_k)
    trace = trace_of(ids, table.num_experts[0])
    check_model(trace, problem, "tiny")
    found = []
    for slots in (len(table), len(table) // 3):
        forecast = choose_forecast("off", ForecastSetting(table, 0))
        by = Deciders(forecast, *choose_policy("lru", forecast.outlook, slots))
        profiled = profiled_machine(problem, slots, read_threads=4)
        run, op_cost = TraceRun(trace, profiled, by), profiled.op_cost
        metrics = measure(trace, run.run(), num_bytes=run.machine.num_bytes, layer_slots=1.0)
        # what takes time is computation, reading and drawing a token
        rest_s = metrics.token_s - metrics.stall_s - run.lanes["host"].busy_s / metrics.tokens
        assert rest_s >= op_cost.sample_s(1)
        found.append(metrics)
    assert found[0].token_s < found[1].token_s
    assert found[1].bytes > found[0].bytes > 0


def stateful_trace(num_rows):
    """Routers that choose by a state, which is nearly the same in the next layer and another in the
    next pass."""
    random = np.random.default_rng(3)
    table = [random.standard_normal((10, 16)).astype(np.float32) for _ in range(2)]
    states = random.standard_normal((num_rows, 1, 16))
    x_RLD = (states + 0.1 * random.standard_normal((num_rows, 2, 16))).astype(np.float32)
    x_RLD /= np.sqrt((x_RLD**2).mean(-1, keepdims=True))
    scores = np.stack([x_RLD[:, i] @ table[i].T for i in range(2)], 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    trace = trace_of(np.argsort(-scores, 2)[:, :, :2], 10, num_prompt=1)
    zeros = np.zeros(10, np.float32)
    return replace(
        trace, embedded_RD=x_RLD[:, 0], final_RD=x_RLD[:, 1], routings=("SoftmaxTopK",) * 2,
        routers=tuple(Router(own, zeros, zeros) for own in table),
        layers=tuple(
            replace(layer_of(trace, i), scores_RE=scores[:, i], residual_RD=x_RLD[:, i])
            for i in range(2)
        ),
    )  # fmt: skip


def test_all_forecasts_replay_a_trace_with_states_and_a_gate_foretells_what_it_should():
    trace = stateful_trace(90)
    wishes = StudyWishes(
        forecasts=EXPERT_FORECASTS, policies=("next-use",), resident=(0.3,),
        machines=ratio(trace, 0.6), guards=False,
    )  # fmt: skip
    found = study(trace, wishes)
    recall = {name: one.means["1"]["recall_1k"] for name, one in found.foretold.items()}
    assert min(recall["gate"], recall["learned"]) > 0.8 > recall["usage"]
    hits = {run.forecast: run.metrics for run in found.runs}
    assert hits["gate"].hits > hits["usage"].hits + 0.05
    assert hits["off"].prefetch_hits == 0 < hits["gate"].prefetch_hits


def test_it_says_which_sources_of_a_forecast_are_off():
    trace = stateful_trace(140)
    wishes = StudyWishes(
        forecasts=("learned", "off"), policies=("next-use",), resident=(0.3,),
        machines=ratio(trace, 0.6), guards=False, with_recall=False,
    )  # fmt: skip
    found = study(trace, wishes)
    words = (
        "forecasts on: 1 layer ahead, as a token begins; off, no better than without them: of the"
        " next token"
    )
    assert f"30 % resident, rho 0.6, learned, next-use: {words}" in found.lines()
    sources = [run["forecast_sources"] for run in found.to_json()["runs"]]
    assert sources == [words, ""]


def test_a_router_of_a_kind_that_nobody_knows_is_refused():
    trace = replace(stateful_trace(4), routings=("Dice", "Dice"))
    with pytest.raises(UsageError, match="got Dice of layer 0, allowed SoftmaxTopK"):
        forecast_of(trace, "gate")
