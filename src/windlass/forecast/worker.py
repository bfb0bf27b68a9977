"""Work beside a pass: a thread of its own, or none, where a virtual clock must decide."""

import queue
import threading
from collections.abc import Callable
from typing import Protocol

Work = Callable[[], None]

# Pieces for a worker that has fallen behind; more than a pass gives it.
_MOST_WAITING = 256


class Executor(Protocol):
    """Does pieces of work one after the other."""

    def submit(self, work: Work) -> bool:
        """Soon; False: too much waits, it is not done."""
        ...

    def check(self) -> None:
        """Raises what a piece of work raised."""
        ...

    def close(self) -> None:
        """Does what waits, and ends. Raises what nobody was told of."""
        ...


class Inline:
    """At once."""

    def submit(self, work: Work) -> bool:
        work()
        return True

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class Worker:
    """A thread of its own. After a failure it does no more."""

    def __init__(self, name: str) -> None:
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._is_told = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> bool:
        if not self._thread.is_alive() or self._waiting.qsize() >= _MOST_WAITING:
            return False
        self._waiting.put(work)
        return True

    def check(self) -> None:
        if self._failure is not None:
            self._is_told = True
            raise self._failure

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()
        if not self._is_told:
            self.check()

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  thread boundary: raised by `check`
                self._failure = error
                return
