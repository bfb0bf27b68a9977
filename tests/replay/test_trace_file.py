"""Routing traces on disk: what is written is read, to the last whole pass, and nothing else is
taken for one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from windlass.errors import UsageError
from windlass.replay.trace_file import (
    VERSION,
    Router,
    Trace,
    TracedLayer,
    TracedPass,
    TracedRouting,
    TraceHeader,
    TraceWriter,
)

HEADER = TraceHeader(
    model="tiny",
    stamp="0123",
    num_layers=4,
    hidden_size=8,
    # another number of experts in each layer, and one without any between them
    layers=(TracedLayer(0, 300, 2, "SoftmaxTopK"), TracedLayer(3, 5, 3, "SigmoidTopK")),
    inputs=True,
)
BARE = replace(HEADER, inputs=False)
random = np.random.default_rng(7)


def halves(*shape):
    """Numbers that float16 holds."""
    return random.standard_normal(shape).astype(np.float16).astype(np.float32)


def routers():
    return [
        Router(*(random.random(shape, np.float32) for shape in ((e, 8), (e,), (e,))))
        for e in (300, 5)
    ]


def a_pass(number, rows, header=HEADER):
    return TracedPass(
        number=number,
        sequences_T=random.integers(0, 1 << 32, rows),
        positions_T=random.integers(0, 1 << 20, rows),
        is_prompt_T=random.random(rows) < 0.5,
        layers=tuple(
            TracedRouting(
                random.integers(0, one.num_experts, (rows, one.top_k)).astype(np.uint16),
                halves(rows, one.num_experts),
                halves(rows, 8) if header.inputs else None,
            )
            for one in header.layers
        ),
        embedded_TD=halves(rows, 8) if header.inputs else None,
        final_TD=halves(rows, 8) if header.inputs else None,
    )


def written(path, header=HEADER, rows=(3, 1, 5)):
    passes = [a_pass(number, count, header) for number, count in enumerate(rows)]
    writer = TraceWriter(path, header)
    if found := routers() if header.inputs else []:
        writer.add_routers(found)
    for one in passes:
        writer.add(one)
    writer.close()
    return passes, found


def arrays_of(one):
    """All of a pass, in one flat list."""
    found = [one.sequences_T, one.positions_T, one.is_prompt_T, one.embedded_TD, one.final_TD]
    return found + [array for routing in one.layers for array in routing]


def assert_same(one, two):
    assert one.number == two.number
    for a, b in zip(arrays_of(one), arrays_of(two), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("header", [HEADER, BARE])
def test_what_is_written_is_read(header, tmp_path):
    passes, found = written(tmp_path / "t", header)
    trace = Trace(tmp_path / "t")
    assert trace.header == header and len(trace) == 3 and trace.num_rows == 9
    assert trace.cut_bytes == 0
    for one, two in zip(passes, trace, strict=True):
        assert_same(one, two)
    for router, read in zip(found, trace.routers, strict=True):
        assert all(map(np.array_equal, router, read))


def test_states_beyond_float16_keep_their_size(tmp_path):
    header = replace(HEADER, layers=(), inputs=True)
    large_TD = np.array([[1e6, -3.0, 0, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 1e-3]], np.float32)
    one = replace(a_pass(0, 2), layers=(), embedded_TD=large_TD, final_TD=-large_TD)
    writer = TraceWriter(tmp_path / "t", header)
    writer.add(one)
    writer.close()
    (read,) = Trace(tmp_path / "t")
    assert read.embedded_TD == pytest.approx(large_TD, rel=2e-3)
    assert read.final_TD == pytest.approx(-large_TD, rel=2e-3)


def test_a_file_cut_anywhere_is_read_to_its_last_whole_pass(tmp_path):
    header = replace(BARE, layers=(TracedLayer(0, 6, 2, "SoftmaxTopK"),) * 2)
    passes, _ = written(tmp_path / "whole", header, rows=(1, 2))
    data = (tmp_path / "whole").read_bytes()
    header_end = data.index(b"\n") + 1
    path = tmp_path / "cut"
    counts = []
    for end in range(header_end, len(data) + 1):
        path.write_bytes(data[:end])
        trace = Trace(path)
        counts.append(len(trace))
        if end % 37 == 0:
            for one, two in zip(passes, trace, strict=False):
                assert_same(one, two)
    assert counts == sorted(counts) and set(counts) == {0, 1, 2}
    assert counts.count(2) == 1  # the last byte belongs to the last pass


def test_a_pass_without_an_end_is_none(tmp_path):
    writer = TraceWriter(tmp_path / "t", BARE)
    failed, whole = a_pass(0, 4, BARE), a_pass(1, 2, BARE)
    writer.begin(failed)
    writer.add_layer(failed.layers[0])
    writer.add(whole)
    writer.begin(failed)
    writer.close()
    (read,) = trace = Trace(tmp_path / "t")
    assert_same(read, whole)
    assert trace.cut_bytes == 0 and trace.num_rows == 2


def test_damage_is_said_not_read(tmp_path):
    written(path := tmp_path / "t", BARE)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # of the last layer
    path.write_bytes(data)
    with pytest.raises(UsageError, match="t: damaged at byte .*checksum"):
        list(Trace(path))
    data[data.index(b"rows", data.index(b"\n"))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="t: damaged at byte .*not a record"):
        Trace(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a routing trace"),
        (b'{"a": 1}\n', "not a routing trace"),
        (b"[1]\n", "not a routing trace"),
        (b"\x00\xff\n", "not a routing trace"),
        (b'{"windlass_routing_trace": 1', "not a routing trace"),
        (b'{"windlass_routing_trace": 2}\n', f"of version 2, allowed {VERSION}"),
        (b'{"windlass_routing_trace": 1}\n', "damaged: header"),
        (b'{"windlass_routing_trace": 1, "layers": [{"layer": 1}]}\n', "damaged: header"),
    ],
)
def test_other_files_are_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        Trace(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_opened_are_said(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        Trace(tmp_path / "none")
    with pytest.raises(UsageError, match=r"routing-trace: got '.*': No such file"):
        TraceWriter(tmp_path / "no folder" / "t", BARE)
    with pytest.raises(UsageError, match="routing-trace: got '.*': Is a directory"):
        TraceWriter(tmp_path, BARE)


def test_the_header_is_one_line_that_people_can_read(tmp_path):
    written(tmp_path / "t", BARE)
    with (tmp_path / "t").open("rb") as file:
        document = json.loads(file.readline())
    assert document["windlass_routing_trace"] == VERSION and document["model"] == "tiny"
    assert document["layers"][1] == {
        "layer": 3, "num_experts": 5, "top_k": 3, "routing": "SigmoidTopK",
    }  # fmt: skip
