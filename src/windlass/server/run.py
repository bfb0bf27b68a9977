"""Runs the application: the port is open while the model loads, and a signal lets answers end."""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvicorn

from windlass.errors import UsageError, WindlassError
from windlass.server.app import make_app
from windlass.server.http import HttpProtocol
from windlass.server.state import Loaded, ServerState

_LOOK_S = 0.1  # between looks at what is still under way


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen. `port` 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()


def serve(
    state: ServerState,
    address: Address,
    load: Callable[[Callable[[str], None]], Loaded],
    *,
    say: Callable[[str], None],
) -> None:
    """Serves until a signal. `load` opens the model in a thread of its own; what it is told is said
    in `/health`. Raises UsageError where the address cannot be had, and what `load` raises."""
    asyncio.run(_Run(state, address, load, say).run())


class _Server(uvicorn.Server):
    """Signals are the run's own."""

    def install_signal_handlers(self) -> None:
        pass

    def capture_signals(self) -> "_Nothing":  # type: ignore[override]
        return _Nothing()


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


class _Run:
    def __init__(
        self,
        state: ServerState,
        address: Address,
        load: Callable[[Callable[[str], None]], Loaded],
        say: Callable[[str], None],
    ) -> None:
        self._state = state
        self._address = address
        self._load = load
        self._say = say
        # of each request that is no HTTP: whoever reaches the port could fill the log
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._stop = asyncio.Event()
        app = make_app(state, keys=address.keys, host=address.host)
        self._server = _Server(
            uvicorn.Config(
                app, host=address.host, port=address.port, log_config=None, access_log=False,
                lifespan="off", server_header=False, timeout_graceful_shutdown=5,
                http=HttpProtocol, ws="none",
            )
        )  # fmt: skip
        self._error: WindlassError | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        sockets = [self._listen()]
        loading = threading.Thread(target=self._load_aside, args=(loop,), name="load", daemon=True)
        serving = asyncio.ensure_future(self._server.serve(sockets))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._say(f"listening at http://{shown}:{port}, loading the model")
        loading.start()
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        await self._drain()
        self._server.should_exit = True
        await serving
        if self._error is not None:
            raise self._error

    def _listen(self) -> socket.socket:
        host, port = self._address.host, self._address.port
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family)
        except OSError as error:
            why = (error.strerror or str(error)).partition(" (")[0]
            raise UsageError(f"port: got {host}:{port}, which cannot be had: {why}") from error

    def _signalled(self) -> None:
        if self._state.is_draining:  # the second time
            self._say("stopped at once")
            sys.stderr.flush()
            self._state.limits_over = True
        self._stop.set()

    async def _drain(self) -> None:
        state = self._state
        state.is_draining = True
        if not isinstance(state.data, str):
            await asyncio.to_thread(state.data.worker.stop)  # their rows run when it starts again
        if state.num_open:
            self._say(f"finishing what is under way ({state.num_open}), no more is taken")
        loop = asyncio.get_running_loop()
        end = loop.time() + state.limits.drain_s
        while state.num_open and loop.time() < end and not state.limits_over:
            await asyncio.sleep(_LOOK_S)
        if state.loaded is not None:
            # what is left gets an error event, as the service ends
            await asyncio.to_thread(state.loaded.service.close)
        while state.num_open and loop.time() < end + 5:
            await asyncio.sleep(_LOOK_S)

    def _load_aside(self, loop: asyncio.AbstractEventLoop) -> None:
        def note(what: str) -> None:
            self._state.loading = what

        try:
            loaded = self._load(note)
        except WindlassError as error:
            loop.call_soon_threadsafe(self._failed, error)
        except Exception as error:  # noqa: BLE001  thread boundary: the server ends with it
            loop.call_soon_threadsafe(self._failed, WindlassError(f"loading failed: {error!r}"))
        else:
            loop.call_soon_threadsafe(self._has_loaded, loaded)

    def _has_loaded(self, loaded: Loaded) -> None:
        self._state.loaded = loaded
        self._say(f"ready: {', '.join(self._state.names)}")

    def _failed(self, error: WindlassError) -> None:
        self._state.failure = str(error)
        self._error = error
        self._stop.set()
