"""Recorded runs of engines: the file holds what observers are told, at no bit's expense."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from recorder import RoutingRecorder, Token, observed_by
from windlass.cli import main
from windlass.errors import UsageError
from windlass.models.registry import read_spec
from windlass.models.spec import Moe
from windlass.options import EngineOptions, checkpoint_stamp
from windlass.replay.trace_file import Trace, TraceWriter

LENGTHS, TOKENS = (5, 70, 30), (9, 14, 5)


def run(path, **options):
    """Sequences that begin and end at different times; ids and log-probabilities of each."""
    requests = [
        request(f"{i}", ids, max_tokens=count, temperature=0.8, seed=i, logprobs=2)
        for i, (ids, count) in enumerate(zip(prompts(LENGTHS), TOKENS, strict=True))
    ]
    with engine_for(path, **options) as engine:
        results = run_all(engine, requests[:1]) | run_all(engine, requests[1:])
    return {name: output.outputs for name, output in results.items()}


# Softmax, biased sigmoid in groups, biased logits, a router with its own norm, layer norms, hybrid
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "phimoe", "nemotron_h"]
)
def test_a_trace_holds_what_routers_read_and_chose(family, tmp_path):
    make_model(family, tmp_path)
    recorder = RoutingRecorder()
    with observed_by(recorder):
        plain = run(tmp_path)
    path = tmp_path / "t"
    assert run(tmp_path, routing_trace=path, routing_trace_inputs=True) == plain
    trace = Trace(path)
    check_header(trace.header, tmp_path)
    found = {
        Token(layer.layer, int(sequence), int(position)): (routing, row)
        for one in trace
        for layer, routing in zip(trace.header.layers, one.layers, strict=True)
        for row, (sequence, position) in enumerate(
            zip(one.sequences_T, one.positions_T, strict=True)
        )
    }
    assert found.keys() == recorder.seen.keys()
    for token, (routing, row) in found.items():
        seen = recorder.seen[token]
        assert np.array_equal(routing.ids_TA[row], seen.ids_A)
        assert seen.scores_E is not None
        halves_E = seen.scores_E.half().float()
        assert np.array_equal(routing.scores_TE[row], halves_E)
    check_phases(trace)
    check_routers(trace, has_mean=family == "phimoe")


def check_header(header, folder):
    config = json.loads((folder / "config.json").read_text())
    spec, _ = read_spec(config)
    moes = {i: b.ffn for i, b in enumerate(spec.blocks) if isinstance(b.ffn, Moe)}
    assert [(one.layer, one.num_experts, one.top_k, one.routing) for one in header.layers] == [
        (i, moe.num_experts, moe.top_k, type(moe.routing).__name__) for i, moe in moes.items()
    ]
    assert (header.model, header.stamp) == (folder.name, checkpoint_stamp(folder))
    assert (header.num_layers, header.hidden_size) == (len(spec.blocks), spec.hidden_size)


def check_phases(trace):
    assert [one.number for one in trace] == list(range(len(trace)))
    rows = [*zip(*(
        np.concatenate([getattr(one, name) for one in trace])
        for name in ("sequences_T", "positions_T", "is_prompt_T")
    ), strict=True)]  # fmt: skip
    lengths = dict(enumerate(LENGTHS, start=min(sequence for sequence, _, _ in rows)))
    assert all(is_prompt == (at < lengths[sequence]) for sequence, at, is_prompt in rows)
    assert trace.num_rows == len(rows) == sum(LENGTHS) + sum(TOKENS) - 3


def check_routers(trace, *, has_mean):
    """The recorded routers make the recorded scores of the recorded residual streams."""
    for one in trace:
        states = [one.embedded_TD, *(routing.residual_TD for routing in one.layers), one.final_TD]
        assert all(np.isfinite(x).all() and x.any(axis=1).all() for x in states)
        for layer, router, routing in zip(
            trace.header.layers, trace.routers, one.layers, strict=True
        ):
            x_TD = routing.residual_TD
            if has_mean:  # LayerNorm
                x_TD = x_TD - x_TD.mean(axis=1, keepdims=True)
            x_TD = x_TD / np.sqrt((x_TD * x_TD).mean(axis=1, keepdims=True) + 1e-5)
            logits_TE = x_TD @ router.weight_ED.T + router.bias_E
            scores_TE = torch.from_numpy(logits_TE)
            if layer.routing == "SoftmaxTopK":
                scores_TE = scores_TE.softmax(-1)
            if layer.routing == "SigmoidTopK":
                scores_TE = scores_TE.sigmoid()
            assert routing.scores_TE == pytest.approx(scores_TE.numpy(), abs=0.02)


def test_without_inputs_layers_are_captured_and_the_trace_is_small(tmp_path):
    make_model("mixtral", model := tmp_path / "model")
    plain = run(model)
    assert run(model, routing_trace=tmp_path / "bare") == plain
    run(model, routing_trace=tmp_path / "inputs", routing_trace_inputs=True)
    bare, inputs = Trace(tmp_path / "bare"), Trace(tmp_path / "inputs")
    assert len(bare) == len(inputs) > 0 and not bare.routers
    for one, two in zip(bare, inputs, strict=True):
        assert one.embedded_TD is one.final_TD is None
        for a, b in zip(one.layers, two.layers, strict=True):
            assert np.array_equal(a.ids_TA, b.ids_TA) and np.array_equal(a.scores_TE, b.scores_TE)
            assert a.residual_TD is None and b.residual_TD is not None


def test_a_trace_is_complete_where_little_is_in_memory_and_passes_come_in_parts(tmp_path):
    make_model("mixtral", model := tmp_path / "model")
    plain = run(model, schedule="model-based", moe_expert_cache_size="2")
    path = tmp_path / "t"
    options = {"schedule": "model-based", "moe_expert_cache_size": "2", "routing_trace": path}
    assert run(model, **options, routing_trace_inputs=True) == plain
    check_phases(Trace(path))


def test_a_full_disk_ends_the_recording_not_the_answers(tmp_path, caplog, monkeypatch):
    make_model("mixtral", model := tmp_path / "model")
    plain = run(model)
    write, room = TraceWriter._write, [4000]

    def limited(self, data):
        write(self, data[: room[0]])
        room[0] -= len(data)
        if room[0] < 0:
            room[0] = 1_000_000  # a disk may have room again: nothing may follow a torn record
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TraceWriter, "_write", limited)
    assert run(model, routing_trace=tmp_path / "t") == plain
    (line,) = [r.getMessage() for r in caplog.records if "No space left" in r.getMessage()]
    trace = Trace(tmp_path / "t")
    assert line.endswith(f": recording ends in pass {len(trace)}")
    assert len(trace) > 0 and trace.cut_bytes > 0
    with pytest.raises(UsageError, match="routing-trace: got '/dev/full': No space left"):
        engine_for(model, routing_trace=Path("/dev/full"))


def test_files_that_cannot_be_made_are_refused_before_anything_is_computed(tmp_path, capsys):
    bad = str(tmp_path / "none" / "t")
    assert main(["generate", "-n", "1", "--routing-trace", bad, "Hello"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"windlass: routing-trace: got {bad!r}: No such file or directory"
    ]
    with pytest.raises(
        UsageError, match="routing_trace_inputs: got it alone, allowed with routing_trace"
    ):
        EngineOptions(routing_trace_inputs=True)
