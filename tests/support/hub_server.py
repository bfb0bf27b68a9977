"""A hub on this machine: what huggingface_hub asks of huggingface.co, answered from memory by the
standard library, and a count of what was asked and sent. Contents that git-lfs would keep come from
another origin, by a redirect, as there."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a_token_for_tests"


@dataclass
class Repo:
    """`commits`: files by name, by commit; `refs`: the commit of each branch."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    is_gated: bool = False

    @classmethod
    def of(cls, files: Mapping[str, bytes], **more: Any) -> "Repo":
        commit = commit_of(files)
        return cls({commit: dict(files)}, {"main": commit}, **more)

    def push(self, files: Mapping[str, bytes]) -> str:
        """A new commit of main."""
        self.refs["main"] = commit = commit_of(files)
        self.commits[commit] = dict(files)
        return commit


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    has_token: bool
    sent: int = 0


@dataclass
class HubServer:
    """`break_after`: by file, of how many bytes each next connection breaks; `replaced`: what comes
    instead of a file's content; `ignores_ranges`: every content comes whole."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    break_after: dict[str, list[int]] = field(default_factory=dict)
    replaced: dict[str, bytes] = field(default_factory=dict)
    ignores_ranges: bool = False

    def sent(self, suffix: str) -> int:
        """Bytes of contents sent for files that end so."""
        return sum(one.sent for one in self.requests if one.path.endswith(suffix))

    def asked(self, method: str, part: str) -> list[Request]:
        return [one for one in self.requests if one.method == method and part in one.path]


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files by their relative names."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_large(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".bin", ".gguf", ".pth")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, state: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state
        self.lock = Lock()


@contextmanager
def hub_server(**repos: Repo) -> Iterator[HubServer]:
    """Serves `repos`, named org__name, until left."""
    state = HubServer(repos={name.replace("__", "/"): repo for name, repo in repos.items()})
    server = _Server(state)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The variables that lead huggingface_hub here."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **more,
    }


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        split = urlsplit(self.path)
        words = [unquote(word) for word in split.path.strip("/").split("/")]
        authorization = self.headers.get("Authorization")
        self.request_seen = Request(
            self.command, unquote(split.path), self.headers.get("Range"),
            authorization is not None,
        )  # fmt: skip
        with self.server.lock:
            self.server.state.requests.append(self.request_seen)
        if words[0] == "content":
            name, commit, file = "/".join(words[1:3]), words[3], "/".join(words[4:])
            data = self.server.state.repos[name].commits[commit][file]
            self._send_content(file, self.server.state.replaced.get(file, data), {})
            return
        is_api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if is_api else words[:2])
        repo = self.server.state.repos.get(name)
        if repo is None:
            self._fail(401, "RepoNotFound", "Repository not found")
            return
        rest = words[4:] if is_api else words[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = revision if revision in repo.commits else repo.refs.get(revision, "")
        if not commit:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif is_api:
            self._send_api(name, repo, commit, rest[:1], parse_qs(split.query))
        elif repo.is_gated and authorization != f"Bearer {TOKEN}":
            self._fail(401, "GatedRepo", f"Access to model {name} is restricted")
        else:
            self._send_file(name, repo, commit, "/".join(rest[2:]))

    def _send_api(
        self, name: str, repo: Repo, commit: str, kind: list[str], query: dict[str, list[str]]
    ) -> None:
        files = repo.commits[commit]
        if kind == ["tree"]:
            self._send_json([{"type": "file", "path": file, **_entry(file, data)}
                             for file, data in files.items()])  # fmt: skip
            return
        siblings = [
            {"rfilename": file, **({} if "blobs" not in query else _blob(file, data))}
            for file, data in files.items()
        ]
        self._send_json({"_id": "0", "id": name, "modelId": name, "sha": commit,
                         "private": False, "gated": "auto" if repo.is_gated else False,
                         "tags": [], "downloads": 0, "siblings": siblings})  # fmt: skip

    def _send_file(self, name: str, repo: Repo, commit: str, file: str) -> None:
        data = repo.commits[commit].get(file)
        if data is None:
            self._fail(404, "EntryNotFound", "Entry not found", commit=commit)
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not is_large(file):
            self._send_content(file, data, {**headers, "ETag": f'"{_git_id(data)}"'})
            return
        port = self.server.state.url.rsplit(":", 1)[1]
        place = f"http://localhost:{port}/content/{name}/{commit}/{file}"
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"',
                  "X-Xet-Hash": sha256}  # fmt: skip
        self._send(302, b"", {**headers, **linked, "Location": place})

    def _send_content(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        wanted, status = self.headers.get("Range"), 200
        if wanted is not None and not self.server.state.ignores_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)) + 1, len(data))
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data = data[begin:end]
        self._send(status, data, headers, file=file)

    def _send_json(self, document: Any) -> None:
        data = json.dumps(document).encode()
        self._send(200, data, {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.server.lock:
            breaks = self.server.state.break_after.get(file)
            limit = breaks.pop(0) if breaks else len(data)
        self.request_seen.sent = min(limit, len(data))
        try:
            self.wfile.write(data[:limit])
            self.wfile.flush()
        except OSError:  # who asked has left
            self.close_connection = True
        if limit < len(data):
            self.close_connection = True


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, Any]:
    """As in a listing of a tree. What is large is kept by Xet too, which this server has not."""
    entry: dict[str, Any] = {"size": len(data), "oid": _git_id(data)}
    if is_large(file):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["xetHash"] = sha256
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


def _blob(file: str, data: bytes) -> dict[str, Any]:
    """As among the siblings of a model."""
    found = {"size": len(data), "blobId": _git_id(data)}
    if not is_large(file):
        return found
    sha256 = hashlib.sha256(data).hexdigest()
    return {**found, "lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}
