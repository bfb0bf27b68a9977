"""A server that answers as its script says, by the standard library: what clients are tested with.
One piece of text a word of the prompt, at most as many as asked for."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass
class Scripted:
    """`statuses`: of the next answers, before those that go well. `piece_s`: seconds before each
    piece of text. `breaks`: streams end within their first piece. `error`: what streams tell after
    it. `chunked`: how bodies are sent."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    piece_s: float = 0.0
    breaks: bool = False
    error: str = ""
    tells_usage: bool = True
    chunked: bool = True
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    script: Scripted


@contextmanager
def scripted_server(**options: Any) -> Iterator[Scripted]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.script = Scripted(server.server_port, **options)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._whole(200, {"object": "list", "data": [{"id": "org/scripted"}]})

    def do_POST(self) -> None:
        script = self.server.script
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with script.lock:
            script.bodies.append(body)
            script.headers.append({k.lower(): v for k, v in self.headers.items()})
            status = script.statuses.pop(0) if script.statuses else 200
        if status != 200:
            self._whole(status, {"error": {"message": f"refused, {status}"}})
        elif body.get("stream"):
            self._stream(body)
        else:
            self._whole(200, {"choices": [], "usage": _usage(body)})

    def _whole(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: Any) -> None:
        script = self.server.script
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        if script.chunked:
            self.send_header("transfer-encoding", "chunked")
        else:
            self.close_connection = True
        self.end_headers()
        is_chat = "messages" in body
        self._send(b": reading\n\n")
        if is_chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(_usage(body)["completion_tokens"]):
            time.sleep(script.piece_s)
            if script.breaks:
                self.wfile.write(b"ff\r\ndata: {")
                self.close_connection = True
                return
            text = f" {number}"
            choice = {"delta": {"content": text}} if is_chat else {"text": text}
            self._event({"choices": [choice]})
            if script.error:
                self._event({"error": {"message": script.error}})
                break
        self._event({"choices": [{"finish_reason": "length", "text": "", "delta": {}}]})
        if script.tells_usage:
            self._event({"choices": [], "usage": _usage(body)})
        self._send(b"data: [DONE]\n\n")
        if script.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _event(self, document: Any) -> None:
        data = b"data: " + json.dumps(document).encode() + b"\n\n"
        self._send(data[:9])  # in two pieces
        self._send(data[9:])

    def _send(self, data: bytes) -> None:
        if self.server.script.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.wfile.write(data)
        self.wfile.flush()


def _usage(body: Any) -> dict[str, int]:
    """Three tokens before a prompt, two a word."""
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    most = body.get("max_tokens") or body["max_completion_tokens"]
    words = len(prompt.split())
    return {"prompt_tokens": 3 + 2 * words, "completion_tokens": min(most, words)}
