"""`/v1/files` without a network: uploads that go to the disk, lists, content, limits."""

import errno
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_server import BOUNDARY, DataServer, data_server, form
from windlass.errors import UsageError
from windlass.server import file_routes
from windlass.server.data_folder import data_folder
from windlass.server.errors import HttpError
from windlass.server.file_store import FileStore, Upload
from windlass.server.multipart import MultipartReader, Part


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DataServer]:
    with data_server(tmp_path / "data", most_bytes=5000) as found:
        yield found


def names(answered: Any) -> list[str]:
    return [one["filename"] for one in answered.json["data"]]


@settings(max_examples=60, deadline=None)
@given(
    content=st.lists(st.sampled_from([b"a", b"\r", b"\n", b"--", b"a-boundary", b"\x00\xff"])),
    cuts=st.integers(1, 40),
)
def test_parts_are_the_same_however_the_body_is_cut(content: list[bytes], cuts: int) -> None:
    data = b"".join(content)
    if f"\r\n--{BOUNDARY}".encode() in b"\r\n" + data:
        return  # no client may send that
    body = b"nobody's\r\n" + form(data, purpose="batch") + b"after the end"
    reader = MultipartReader(f'multipart/form-data; boundary="{BOUNDARY}"')
    found: list[tuple[Part, bytes]] = []
    for start in range(0, len(body), cuts):
        for event in reader.feed(body[start : start + cuts]):
            if isinstance(event, Part):
                found.append((event, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + event)
    assert reader.has_ended
    assert found == [(Part("purpose", None), b"batch"), (Part("file", "in.jsonl"), data)]


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"", 415),
        ("multipart/form-data", b"", 415),
        ("multipart/form-data; boundary=b", b"--bx\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nX: y\r\n\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x" * 9000, 400),
    ],
)
def test_what_is_no_multipart_is_refused(kind: str, body: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        list(MultipartReader(kind).feed(body))
    assert caught.value.status == status


def test_a_file_goes_and_comes_back(server: DataServer) -> None:
    data = b'{"a": "\xc3\xa9"}\r\n--\r\n' * 20
    sent = server.upload(data, cut=7)
    assert sent.status == 200
    file = sent.json
    assert set(file) == {
        "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status",
        "status_details",
    }  # fmt: skip
    assert (file["object"], file["bytes"], file["filename"], file["purpose"], file["status"]) == (
        "file", len(data), "in.jsonl", "batch", "processed",
    )  # fmt: skip
    assert file["id"].startswith("file-") and abs(file["created_at"] - time.time()) < 60
    where = f"/v1/files/{file['id']}"
    assert server.ask("GET", where).json == file
    assert b"".join(server.ask("GET", where + "/content").pieces) == data
    assert server.ask("DELETE", where).json == {
        "id": file["id"], "object": "file", "deleted": True
    }  # fmt: skip
    for method, path in (("GET", where), ("GET", where + "/content"), ("DELETE", where)):
        answered = server.ask(method, path)
        assert answered.status == 404 and "No such File" in answered.json["error"]["message"]
    assert server.ask("GET", "/v1/files/..%2Flock").status == 404
    assert server.ask("PUT", where).status == 405


def test_files_are_there_after_a_restart_and_leftovers_are_not(tmp_path: Path) -> None:
    with data_server(tmp_path) as server:
        first = server.upload(b"one").json
    (tmp_path / "files" / "x.part").write_bytes(b"half")
    (tmp_path / "files" / "file-lost").write_bytes(b"killed before it was known")
    with data_server(tmp_path) as server:
        assert server.ask("GET", "/v1/files").json["data"] == [first]
        second = server.upload(b"two").json
        found = server.ask("GET", "/v1/files").json["data"]
        assert [one["id"] for one in found] == [second["id"], first["id"]]
    assert {p.name for p in (tmp_path / "files").iterdir()} == {
        f"{one['id']}{end}" for one in (first, second) for end in ("", ".json")
    }


def test_lists(server: DataServer) -> None:
    for i in range(5):
        purpose = ("batch", "user_data")[i % 2]
        body = form(b"x", filename=f"f{i}", purpose=purpose)
        assert server.send_form([body]).status == 200
    everything = server.ask("GET", "/v1/files")
    assert names(everything) == ["f4", "f3", "f2", "f1", "f0"]
    assert everything.json["object"] == "list" and everything.json["has_more"] is False
    assert names(server.ask("GET", "/v1/files?order=asc&purpose=user_data")) == ["f1", "f3"]
    page = server.ask("GET", "/v1/files?limit=2")
    assert names(page) == ["f4", "f3"] and page.json["has_more"] is True
    assert page.json["last_id"] == page.json["data"][1]["id"]
    rest = server.ask("GET", f"/v1/files?limit=3&after={page.json['last_id']}")
    assert names(rest) == ["f2", "f1", "f0"] and rest.json["has_more"] is False
    for query in ("limit=0", "limit=x", "after=nobody", "order=up", "sort=1"):
        answered = server.ask("GET", f"/v1/files?{query}")
        assert answered.status == 400 and query.split("=")[0] in answered.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(b"x", filename=None, purpose="batch"), "file: missing"),
        (form(b"x"), "purpose: got ''"),
        (form(b"x", purpose="fun"), "purpose: got 'fun', allowed batch"),
        (form(b"x", purpose="batch", color="red"), "color: not supported"),
        (form(b"", filename=None, purpose="batch", file="text"), "file: got a text"),
        (form(b"x", purpose="p" * 2000), "bytes or more, allowed 1024"),
        (form(b"x", purpose="batch")[:-8], "last boundary is missing"),
        (form(b"x", **{"purpose": "batch", "expires_after[seconds]": "9"}), "anchor: got None"),
        (
            form(b"x", **{"purpose": "batch", "expires_after[anchor]": "created_at",
                          "expires_after[seconds]": "9"}),
            "seconds: got 9, allowed 3600",
        ),
    ],
)  # fmt: skip
def test_uploads_that_are_refused_leave_nothing(
    server: DataServer, tmp_path: Path, body: bytes, message: str
) -> None:
    answered = server.send_form([body])
    assert answered.status == 400 and message in answered.json["error"]["message"]
    assert list((tmp_path / "data/files").iterdir()) == []


def test_a_file_that_is_too_large_is_refused_before_it_is_kept(
    server: DataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.upload(b"x" * 5000).status == 200
    monkeypatch.setattr(file_routes, "_WRITE_BYTES", 100)
    answered = server.upload(b"x" * 5001, cut=64)
    assert answered.status == 413 and "--max-file-size" in answered.json["error"]["message"]
    announced = server.ask(
        "POST", "/v1/files", pieces=[],
        headers={"content-type": "multipart/form-data; boundary=b", "content-length": "9999999"},
    )  # fmt: skip
    assert announced.status == 413
    assert len(list((tmp_path / "data/files").iterdir())) == 2


def test_all_files_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an earlier server; what is refused or deleted does not count."""
    monkeypatch.setattr(file_routes, "_WRITE_BYTES", 100)
    with data_server(tmp_path, stored_bytes=10_000) as server:
        first = server.upload(b"x" * 6000).json
    with data_server(tmp_path, stored_bytes=10_000) as server:
        for _ in range(2):
            answered = server.upload(b"x" * 4001, cut=64)
            assert answered.status == 413
            error = answered.json["error"]
            assert error["code"] == "storage_limit_exceeded"
            assert error["type"] == "invalid_request_error"
            assert "allowed 10000 (--max-stored-size)" in error["message"]
        announced = {
            "content-type": "multipart/form-data; boundary=b", "content-length": "500000",
        }  # fmt: skip
        assert server.ask("POST", "/v1/files", pieces=[], headers=announced).status == 413
        assert len(list((tmp_path / "files").iterdir())) == 2
        assert server.upload(b"x" * 4000).status == 200
        assert server.upload(b"x").status == 413
        assert server.ask("DELETE", f"/v1/files/{first['id']}").status == 200
        assert server.upload(b"x" * 6000).status == 200
        # results of batches are kept whatever there is
        (tmp_path / "out").write_bytes(b"x" * 500)
        server.data.files.keep(
            tmp_path / "out", filename="o", purpose="batch_output", file_id="file-o"
        )
        assert server.upload(b"x").status == 413


def test_a_full_disk_is_one_clear_error(
    server: DataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Upload, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = server.upload(b"kept").json
    with monkeypatch.context() as patched:
        patched.setattr(Upload, "write", full)
        answered = server.upload(b"lost")
    assert answered.status == 507
    assert "No space left on device; nothing was kept" in answered.json["error"]["message"]
    assert [one["id"] for one in server.ask("GET", "/v1/files").json["data"]] == [kept["id"]]
    assert server.upload(b"again").status == 200


def test_too_many_files(tmp_path: Path) -> None:
    store = FileStore(tmp_path, most=1, most_bytes=100)
    with store.begin() as upload:
        upload.write(b"x")
        upload.end()
        store.keep(upload.path, filename="a", purpose="batch")
    with pytest.raises(UsageError, match="there are 1, allowed 1"):
        store.begin()


def test_a_file_that_has_expired_is_gone(server: DataServer) -> None:
    wanted = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = server.send_form([form(b"x", **wanted, purpose="batch")]).json
    assert file["expires_at"] == file["created_at"] + 3600
    store = server.data.files
    found = store.get(file["id"])
    assert found is not None
    store._files[file["id"]] = replace(found, expires_at=int(time.time()))
    assert server.ask("GET", f"/v1/files/{file['id']}").status == 404
    assert server.ask("GET", "/v1/files").json["data"] == []
    assert store.expired() == [file["id"]]


def test_one_server_has_a_folder_for_itself(server: DataServer, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="another server is using; --data-dir gives"),
        data_folder(tmp_path / "data", most_bytes=1, stored_bytes=1, say=lambda text: None),
    ):
        pass


def test_without_a_folder_there_are_no_files(server: DataServer) -> None:
    server.state.data = "somebody has it"
    for method, path in (("GET", "/v1/files"), ("GET", "/v1/batches"), ("POST", "/v1/files")):
        answered = server.ask(method, path)
        assert answered.status == 503 and "somebody has it" in answered.json["error"]["message"]
    assert server.ask("GET", "/metrics").status == 200


def test_a_draining_server_takes_no_file(server: DataServer) -> None:
    kept = server.upload(b"x").json
    server.state.is_draining = True
    assert server.upload(b"x").status == 503
    assert server.ask("GET", f"/v1/files/{kept['id']}").json == kept
    assert json.loads(b"".join(server.ask("POST", "/v1/batches", {}).pieces))["error"]
