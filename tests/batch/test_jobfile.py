"""Scanning a job file: identities, bad lines, duplicates, memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_engine import FakeTokenizer
from windlass.batch.jobfile import JobFile, JobRow
from windlass.engine.text_limits import most_chars
from windlass.errors import JobError, RequestError, UsageError
from windlass.params import SamplingParams
from windlass.protocol.openai import Endpoint, ServedModel, parse_body


def line(custom_id: str = "a", **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "hi"},
    }
    return {**fields, **changes}


def write(path: Path, *lines: Any) -> Path:
    texts = [each if isinstance(each, (str, bytes)) else json.dumps(each) for each in lines]
    data = [text.encode() if isinstance(text, str) else text for text in texts]
    path.write_bytes(b"\n".join(data) + b"\n")
    return path


def rows(job: JobFile) -> list[JobRow]:
    return list(job.rows(np.ones(len(job), bool)))


def test_rows_keep_order_lines_and_bodies(tmp_path: Path) -> None:
    path = write(tmp_path / "in", line("a"), "", "  ", line("b", url="/v1/chat/completions"))
    job = JobFile(path)
    first, second = rows(job)
    assert len(job) == 2
    assert (first.index, first.line, first.custom_id) == (0, 1, "a")
    assert (second.index, second.line, second.endpoint) == (1, 4, Endpoint.CHAT)
    assert second.body == {"prompt": "hi"}
    assert [row.index for row in job.rows(np.array([False, True]))] == [1]


def test_rows_that_need_grammars_are_seen(tmp_path: Path) -> None:
    plain = line("a")
    assert not JobFile(write(tmp_path / "plain", plain)).wants_grammars
    body = {"prompt": "hi", "structured_outputs": {"regex": "a"}}
    assert JobFile(write(tmp_path / "in", plain, line("b", body=body), "x")).wants_grammars


def test_last_line_without_newline_crlf_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line("a")).encode() + b"\r\n")
    path.write_bytes(path.read_bytes() + json.dumps(line("b")).encode())
    assert [row.custom_id for row in rows(JobFile(path))] == ["a", "b"]
    (tmp_path / "empty").touch()
    assert len(JobFile(tmp_path / "empty")) == 0


@pytest.mark.parametrize(
    ("text", "code", "custom_id", "message"),
    [
        ("{oops", "invalid_json_line", None, "not valid JSON"),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None, "not valid Unicode"),
        ('{"custom_id": "\\ud800"}', "invalid_json_line", None, "surrogates"),
        ("[" * 100_000, "invalid_json_line", None, "recursion"),
        ('{"custom_id": "a", "body": {"x": NaN}}', "invalid_json_line", None, "NaN"),
        ("9" * 5000, "invalid_json_line", None, "digits"),
        ("[1]", "invalid_request", None, "an object"),
        ({"method": "POST"}, "missing_required_parameter", None, "custom_id: missing"),
        (line(custom_id=7), "invalid_type", None, "custom_id: got 7, allowed a string"),  # type: ignore[arg-type]
        (line(body="x"), "invalid_type", "a", "body: got 'x', allowed an object"),
        (line(method="GET"), "invalid_method", "a", "'POST'"),
        (line(url="/v1/embeddings"), "invalid_url", "a", "/v1/chat/completions or"),
        (line(extra=1), "unknown_parameter", "a", "extra"),
        ({"custom_id": "a"}, "missing_required_parameter", "a", "method: missing"),
    ],
)
def test_bad_lines_are_rows_that_say_why(
    tmp_path: Path, text: Any, code: str, custom_id: str | None, message: str
) -> None:
    path = write(tmp_path / "in", line("good"), text)
    job = JobFile(path)
    good, bad = rows(job)
    assert good.malformed is None
    assert job.num_malformed == 1
    assert bad.malformed is not None
    assert (bad.malformed.code, bad.custom_id) == (code, custom_id)
    assert bad.malformed.message.startswith("line 2: ")
    assert message in bad.malformed.message
    with pytest.raises(UsageError, match="1 malformed lines") as caught:
        JobFile(path, strict=True)
    assert "line 2: " in str(caught.value)


def test_duplicates_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in", line("a"), line("b"), "", line("a", body={}), line("c"), line("b", url="?")
    )
    with pytest.raises(UsageError) as caught:
        JobFile(path)
    assert "'a': lines 1 and 4" in str(caught.value)
    assert "'b': lines 2 and 6" in str(caught.value)
    assert "'c'" not in str(caught.value)


def test_many_duplicates_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *[line(str(i % 20)) for i in range(40)])
    with pytest.raises(UsageError, match="and 10 more"):
        JobFile(path)


def test_identical_bad_lines_are_no_duplicates(tmp_path: Path) -> None:
    job = JobFile(write(tmp_path / "in", "{bad", "{bad"))
    assert rows(job)[0].digest != rows(job)[1].digest


def test_identity_ignores_spelling_and_sees_content(tmp_path: Path) -> None:
    spaced = (
        '{"url": "/v1/completions", "method":"POST",  "body": {"prompt" : "h\\u0069", "n" : 2}, '
    )
    spaced += '"custom_id": "a"}'
    plain = line("a", body={"n": 2, "prompt": "hi"})
    digests = [
        rows(JobFile(write(tmp_path / "in", text)))[0].digest
        for text in (
            plain,
            spaced,
            line("a"),
            line("a", body={"prompt": "ho"}),
            line("b"),
            line("a", url="/v1/chat/completions"),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "in", line("a"), line("b"))
    job = JobFile(path)
    write(path, line("a"), line("c"))
    with pytest.raises(JobError, match="line 2 changed"):
        rows(job)


@pytest.mark.parametrize("name", ["missing", "."])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="input file: got"):
        JobFile(tmp_path / name)


def test_memory_per_row_is_small(tmp_path: Path) -> None:
    path = tmp_path / "in"
    num_rows = 8_000
    filler = "x" * 300
    with path.open("w") as file:
        for i in range(num_rows):
            file.write(json.dumps(line(f"row-{i}", body={"prompt": filler})) + "\n")
    tracemalloc.start()
    job = JobFile(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(job) == num_rows
    # a million rows: below 50 MB for good and 110 MB while scanning
    assert held / num_rows < 50
    assert peak / num_rows < 110


PROSE = "The quick brown fox. " * 50_000  # a MiB
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 1_500


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": PROSE}]},
        {"messages": [{"role": "user", "content": PROSE + "👩"}]},  # four bytes a character
        {"messages": [{"role": "user", "content": [{"type": "text", "text": PROSE + "é"}]}]},
        {"messages": [{"role": "user", "content": "你好世界" * 90_000}]},
        {"messages": TALK},
        {"prompt": [12345] * 30_000},
        {"prompt": [1] * 60_000},
        {"prompt": [PROSE[:300_000]] * 3},
    ],
)
@pytest.mark.parametrize("escaped", [False, True])
def test_what_a_long_row_takes_is_known_from_the_scan(
    tmp_path: Path, body: dict[str, Any], escaped: bool
) -> None:
    url = Endpoint.CHAT if "messages" in body else Endpoint.COMPLETIONS
    text = json.dumps(line(url=url, body=body), ensure_ascii=escaped)
    job = JobFile(write(tmp_path / "in", text, line("b")))
    model = ServedModel(("m",), Wordless(), 4096, SamplingParams(max_tokens=None))
    (long,) = job.long_rows
    del text
    tracemalloc.start()
    row = next(job.rows(np.array([True, False])))
    assert row.endpoint is not None and row.body is not None
    with pytest.raises(RequestError):
        parse_body(row.endpoint, row.body, model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    needed = long.needed_bytes(most_chars(4096))
    assert 0.2 * needed < peak < needed


class Wordless(FakeTokenizer):
    """Refuses all that it is asked, as the real one does what is too long."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]:
        raise RequestError("too long")


def test_no_row_is_held_while_the_next_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *(line(str(i), body={"prompt": PROSE}) for i in range(4)))
    job = JobFile(path)
    tracemalloc.start()
    assert sum(map(lambda row: row.line, job.rows(np.ones(4, bool)))) == 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < job.long_rows[0].reading_bytes
