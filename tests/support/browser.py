"""A page in headless Chromium, driven over DevTools. For tests that skip where there is none."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

from processes import PATIENCE_S

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `problems`: what its console says of errors. `urls`: all that it asked for."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.problems: list[str] = []
        self.urls: list[str] = []
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> Any:
        """What DevTools answers; events that come before it are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: Any) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.problems.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.problems.append(str(params["entry"]))
            case "Network.requestWillBeSent":
                self.urls.append(params["request"]["url"])

    def evaluate(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        found = self.command(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + PATIENCE_S
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"never true: {script}; {self.problems}"
            time.sleep(0.05)
        return value

    def show(self, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """As wide and as dark as that."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        self.command(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def screenshot(self, file: Path) -> None:
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browsing(browser: str) -> Iterator[Page]:
    """An empty tab of a browser of its own, which has ended at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking",
            "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                port = _port(Path(folder, "DevToolsActivePort"), process)
                with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE_S) as answer:
                    tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
                with connect(tabs[0]["webSocketDebuggerUrl"], max_size=None) as socket:
                    yield Page(socket)
            finally:
                process.kill()


def _port(file: Path, process: "subprocess.Popen[bytes]") -> int:
    end = time.monotonic() + PATIENCE_S
    while not (file.exists() and (lines := file.read_text().splitlines())):
        assert process.poll() is None and time.monotonic() < end, "the browser did not start"
        time.sleep(0.02)
    return int(lines[0])
