"""`windlass bench serve` against a server that answers by a script."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from openai_server import Scripted, scripted_server
from windlass.cli import main
from windlass.errors import UsageError
from windlass.load.answers import Answer
from windlass.load.arrivals import Pace, delays
from windlass.load.prompts import read_prompts
from windlass.load.report import Report, Wanted


def bench(server: Scripted, *arguments: str) -> int:
    small = ("--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "4")
    return main(["bench", "serve", "--port", str(server.port), *small, *arguments])


def table(text: str) -> dict[str, float]:
    rows = re.findall(r"^(\S.*:) +([\d.]+) *$", text, flags=re.MULTILINE)
    return {label: float(value) for label, value in rows}


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
@pytest.mark.parametrize("chunked", [True, False])
def test_the_table_tells_what_came(
    capsys: pytest.CaptureFixture[str], backend: str, chunked: bool
) -> None:
    with scripted_server(piece_s=0.01, chunked=chunked) as server:
        assert bench(server, "--backend", backend, "--metric-percentiles", "50,99") == 0
    said = capsys.readouterr().out
    assert said.startswith("============ Serving Benchmark Result ============\n")
    found = table(said)
    assert found["Successful requests:"] == 6 and found["Failed requests:"] == 0
    assert found["Total input tokens:"] == 6 * 23  # ten words of two tokens, three before
    assert found["Total generated tokens:"] == 6 * 4
    assert "---------------Time to First Token----------------" in said
    assert "-----Time per Output Token (excl. 1st token)------" in said
    assert "---------------Inter-token Latency----------------" in said
    # the first text comes after 10 ms, the role before it at once
    assert min(found[f"{label} TTFT (ms):"] for label in ("Mean", "Median", "P50", "P99")) >= 10
    # three distances each: the mean of all is that of means
    assert found["Mean ITL (ms):"] == pytest.approx(found["Mean TPOT (ms):"], abs=0.02)
    assert found["Mean ITL (ms):"] > 0 and "P99 TPOT (ms):" in found
    path = {"openai": "prompt", "openai-chat": "messages"}[backend]
    streams = [body for body in server.bodies if body.get("stream")]
    assert len(streams) == 6 and all(path in body for body in streams)
    assert all(body["model"] == "org/scripted" for body in server.bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in streams)


def test_what_is_asked_reaches_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    with scripted_server(piece_s=0.02) as server:
        code = bench(
            server, "--model", "mine", "--ignore-eos", "--temperature", "0.5", "--extra-body",
            '{"top_p": 0.9}', "--max-concurrency", "2", "--num-warmups", "1", "--request-rate",
            "1000", "--goodput", "ttft:60000,tpot:60000", "--percentile-metrics", "ttft,e2el",
            "--save-result", "--save-detailed", "--result-dir", str(tmp_path / "made"),
        )  # fmt: skip
    assert code == 0
    found = table(capsys.readouterr().out)
    assert found["Maximum request concurrency:"] == found["Peak concurrent requests:"] == 2
    assert found["Request rate configured (RPS):"] == 1000
    assert found["Request goodput (req/s):"] == found["Request throughput (req/s):"]
    assert found["P99 E2EL (ms):"] >= 80 and "Mean TPOT (ms):" not in found
    streams = [body for body in server.bodies if body.get("stream")]
    assert len(streams) == 7
    wanted = {"model": "mine", "ignore_eos": True, "temperature": 0.5, "top_p": 0.9}
    assert all(wanted.items() <= body.items() for body in streams)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer a key"}
    (path,) = (tmp_path / "made").iterdir()
    assert re.fullmatch(r"openai-1000\.0qps-concurrency2-mine-\d{8}-\d{6}\.json", path.name)
    saved = json.loads(path.read_text())
    assert saved["completed"] == 6 and saved["request_rate"] == 1000
    assert saved["total_output_tokens"] == sum(saved["output_lens"]) == 24
    assert len(saved["ttfts"]) == 6 and all(len(one) == 3 for one in saved["itls"])
    assert saved["p99_e2el_ms"] >= saved["median_e2el_ms"] >= 80


def test_failures_are_counted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(statuses=[503, 200, 200, 200, 429, 400]) as server:
        assert bench(server, "--max-concurrency", "1") == 3
        said = capsys.readouterr()
        assert table(said.out)["Failed requests:"] == 2
        assert "failed: status 429: refused, 429\nfailed: status 400" in said.err
        server.breaks = True
        assert bench(server) == 1
        assert "failed: the connection broke off within an answer" in capsys.readouterr().err
        server.breaks, server.error = False, "the disk is gone"
        assert bench(server) == 1
        assert "failed: the disk is gone" in capsys.readouterr().err
        server.error, server.statuses = "", [401]
        assert bench(server) == 1
        assert "/v1/completions: status 401: refused, 401" in capsys.readouterr().err


def test_without_usage_pieces_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(tells_usage=False) as server:
        assert bench(server) == 0
    said = capsys.readouterr()
    assert table(said.out)["Total generated tokens:"] == 24
    assert "no usage" in said.err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        pass
    for more in ((), ("--model", "m")):
        assert bench(server, "--ready-check-timeout-sec", "0", *more) == 1
        said = capsys.readouterr().err
        assert re.search(r"windlass: 127\.0\.0\.1:\d+/v1/\w+: .*Connect", said)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tokenizer", "x"), "unknown option: --tokenizer"),
        (("--dataset-name", "sharegpt"), "--dataset-name: got 'sharegpt', allowed random, custom"),
        (("--dataset-name", "custom"), "--dataset-path: .*needed"),
        (("--request-rate", "0"), "--request-rate: got '0'"),
        (("--goodput", "itl:4"), "--goodput: got 'itl', allowed ttft, tpot, e2el"),
        (("--metric-percentiles", "101"), "allowed 0 to 100"),
        (("--base-url", "ftp://x"), "base url: got 'ftp://x'"),
        (("--extra-body", "[]"), "allowed a JSON object"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_tokens": 5}\n')
    asks = read_prompts(path, 3, 7)
    assert [(one.prompt, one.output_len) for one in asks] == [("one", 7), ("two", 5), ("one", 7)]
    for bad in ('{"text": "one"}', "[]", '{"prompt": "x", "output_tokens": 0}', "{", ""):
        path.write_text(bad)
        with pytest.raises(UsageError, match=r"prompts\.jsonl"):
            read_prompts(path, 1, 7)


def test_arrivals_are_a_poisson_process_unless_told_otherwise() -> None:
    assert delays(3, Pace()) == [0.0, 0.0, 0.0]
    times = delays(4000, Pace(rate=20.0, seed=1))
    assert times[-1] == pytest.approx(200.0) and times == sorted(times)
    gaps = np.diff(times)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as of an exponential
    assert np.mean(gaps > 0.05) == pytest.approx(np.exp(-1), abs=0.03)
    assert delays(4000, Pace(rate=20.0, seed=1)) == times != delays(4000, Pace(rate=20.0, seed=2))
    even = np.diff(delays(4000, Pace(rate=20.0, burstiness=100.0)))
    bursts = np.diff(delays(4000, Pace(rate=20.0, burstiness=0.1)))
    assert np.std(even) < 0.2 * np.mean(even) and np.std(bursts) > 2 * np.mean(bursts)


def test_numbers_of_a_report() -> None:
    answers = [
        Answer(0.0, 0.1, 0.5, [0.1, 0.3], input_tokens=10, output_tokens=5),
        Answer(0.4, 0.3, 0.3, [], input_tokens=20, output_tokens=1),
        Answer(0.45, error="gone"),
    ]
    wanted = Wanted(goodput={"ttft": 200, "tpot": 100}, percentiles=(50.0, 99.9))
    found = Report(answers, 2.0, wanted).to_json(detailed=False)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 6)
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 3.0)
    assert found["request_goodput"] == 0.5 and found["max_concurrent_requests"] == 2
    assert found["mean_ttft_ms"] == pytest.approx(200) and found["p50_ttft_ms"] == pytest.approx(
        200
    )
    assert found["mean_tpot_ms"] == pytest.approx(100)  # of the first alone: (0.5 - 0.1) / 4
    assert found["median_itl_ms"] == pytest.approx(200) and found["max_output_tokens_per_s"] == 4
    assert found["p99.9_itl_ms"] == pytest.approx(299.8)
