"""An engine on a thread of its own: streams, aborts, ends, and what goes wrong."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fake_engine import FakeEngine
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Delta, Request, StepResult
from windlass.engine.service import Service
from windlass.errors import RequestError, UsageError
from windlass.params import SamplingParams


def request(name: str, text: str = "hello", *, max_tokens: int = 9, **params: Any) -> Request:
    settings = SamplingParams(max_tokens=max_tokens, **params)
    return Request(name, tuple(text.encode()), settings, seed_key=name)


class GatedEngine(FakeEngine):
    """Each step waits until it is let through; says which threads it was used on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate, self.entered = threading.Semaphore(0), threading.Semaphore(0)
        self.threads: set[str] = set()

    def step(self) -> StepResult:
        self.threads.add(threading.current_thread().name)
        self.entered.release()
        assert self.gate.acquire(timeout=120)
        return super().step()

    def add(self, request: Request) -> None:
        self.threads.add(threading.current_thread().name)
        super().add(request)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        super().close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[Service]:
    with Service(engine) as service:
        yield service


def test_a_stream_brings_deltas_then_the_result(service: Service) -> None:
    came = list(service.submit(request("a", max_tokens=9, n=2)))
    deltas = [each for each in came if isinstance(each, Delta)]
    output = came[-1]
    assert isinstance(output, RequestOutput) and came[:-1] == deltas
    for choice in output.outputs:
        assert "".join(d.text for d in deltas if d.index == choice.index) == choice.text
    assert list(service.open()) == []


def test_results_do_not_depend_on_when_requests_arrive(service: Service) -> None:
    names = [f"r{i}" for i in range(40)]
    texts: dict[str, str] = {}
    with service.open() as stream:
        stream.submit([request(name, name, max_tokens=5 + len(name)) for name in names])
        texts = {out.request_id: out.outputs[0].text for out in stream}  # type: ignore[union-attr]
    found: dict[str, str] = {}

    def ask(name: str) -> None:
        *_, output = service.submit(request(name, name, max_tokens=5 + len(name)))
        assert isinstance(output, RequestOutput)
        found[name] = output.outputs[0].text

    threads = [threading.Thread(target=ask, args=(name,)) for name in reversed(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == texts and len(found) == 40


def test_what_is_submitted_together_takes_part_in_one_pass() -> None:
    engine = GatedEngine(capacity=8)
    with Service(engine) as service:
        stream = service.open()
        stream.submit([request(str(i), max_tokens=3) for i in range(8)])
        engine.gate.release(9)
        assert len(list(stream)) == 8
        assert service.stats().passes == 1
        engine.gate.release(9)
    assert engine.threads == {"engine"} and engine.is_closed


def test_bad_requests_are_refused_at_once_and_together(
    service: Service, engine: FakeEngine
) -> None:
    bad = Request("bad", (999,), SamplingParams(max_tokens=1), "")
    with pytest.raises(RequestError, match="outside the vocabulary"):
        service.submit(bad)
    stream = service.open()
    with pytest.raises(RequestError, match="outside the vocabulary"):
        stream.submit([request("good"), bad])
    with pytest.raises(RequestError, match="'twice' is already running"):
        stream.submit([request("twice"), request("twice")])
    assert list(stream) == [] and engine.added == []


def test_an_id_is_free_again_after_its_end(service: Service) -> None:
    for _ in range(3):
        assert len(list(service.submit(request("a", max_tokens=3)))) == 2


def test_closing_a_stream_aborts_and_others_go_on() -> None:
    engine = GatedEngine()
    with Service(engine) as service:
        gone, kept = service.submit(request("a")), service.submit(request("b", max_tokens=3))
        assert engine.entered.acquire(timeout=120)  # a pass is under way
        gone.close()
        with pytest.raises(RequestError, match="'a' is already running"):
            service.submit(request("a"))  # until the engine has heard of it
        assert list(gone) == []
        engine.gate.release(99)
        assert any(isinstance(each, RequestOutput) for each in kept)
        assert engine.aborted == ["a"]
        service.abort("b")  # has ended: nothing happens
        assert engine.aborted == ["a"]


def test_an_aborted_request_leaves_its_stream(service: Service, engine: FakeEngine) -> None:
    with service.open() as stream:
        stream.submit([request("a", max_tokens=3), request("b", max_tokens=200)])
        service.abort("b")
        assert [each.request_id for each in stream] == ["a"]


def test_a_look_at_the_stream_need_not_wait() -> None:
    engine = GatedEngine()
    with Service(engine) as service:
        stream = service.submit(request("a", max_tokens=3))
        begin = time.monotonic()
        assert stream.take(0.01) == StepResult((), ())
        assert service.stats().passes == 0  # of before the pass under way
        assert time.monotonic() - begin < 10
        engine.gate.release()
        assert len(stream.take().finished) == 1 and stream.take() == StepResult((), ())
        assert service.stats().passes == 1


def test_draining_ends_what_runs_and_takes_no_more(service: Service) -> None:
    stream = service.submit(request("a", max_tokens=60))
    service.drain()
    with pytest.raises(UsageError, match=r"after drain\(\)"):
        service.submit(request("b"))
    assert isinstance(list(stream)[-1], RequestOutput)


def test_closing_finishes_the_pass_under_way_and_keeps_what_came() -> None:
    engine = GatedEngine()
    service = Service(engine)
    short, long = service.submit(request("a", max_tokens=3)), service.submit(request("b"))
    engine.gate.release()
    while not short.finished:  # both may have come to one pass or to two
        engine.gate.release()
        time.sleep(0.001)
    engine.gate.release(99)
    service.close()
    service.close()
    assert engine.is_closed
    assert isinstance(list(short)[-1], RequestOutput)
    if long.open_ids:
        with pytest.raises(UsageError, match="closed while 1 request ran"):
            list(long)
    with pytest.raises(UsageError, match=r"after close\(\)"):
        service.submit(request("c"))


class BrokenEngine(FakeEngine):
    def step(self) -> StepResult:
        if self.stats().passes == 1:
            raise OSError(5, "weights vanished")
        return super().step()


def test_what_the_engine_raises_reaches_every_stream_once_and_later_requests() -> None:
    engine = BrokenEngine()
    with Service(engine) as service:
        with service.open() as first, service.open() as second:
            first.submit([request("a", max_tokens=3), request("b")])
            with pytest.raises(OSError, match="vanished"):
                list(first)
            try:
                second.submit([request("c")])
            except OSError:
                pass
            else:
                with pytest.raises(OSError, match="vanished"):
                    list(second)
            assert list(first) == list(second) == []
        for _ in range(2):
            with pytest.raises(OSError, match="vanished"):
                service.submit(request("d"))
        service.drain()
    assert engine.is_closed


def test_what_closing_the_engine_raises_reaches_whoever_closes() -> None:
    class Full(FakeEngine):
        def close(self) -> None:
            super().close()
            raise OSError(28, "no room for the trace")

    service = Service(Full())
    with pytest.raises(OSError, match="no room"):
        service.close()
    service.close()


def test_a_dropped_service_closes_its_engine() -> None:
    engine = FakeEngine()
    service = Service(engine)
    service.submit(request("a", max_tokens=200))
    kept = weakref.ref(service)
    del service
    until = time.monotonic() + 120
    while not engine.is_closed and time.monotonic() < until:
        gc.collect()
        time.sleep(0.001)
    assert engine.is_closed and kept() is None


def test_an_end_before_the_thread_began_is_quiet(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come between the making of the thread and its start."""

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    registered: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Service(engine)
    for at_exit in registered:
        at_exit()
