"""A fake device whose links and worker take time on a virtual clock, so that what an engine does on
it can be compared, step by step, with what the planner's clock says it does."""

from collections.abc import Callable
from typing import Any

from fake_cuda import FakeCuda
from windlass.device.base import Copy, Done
from windlass.runtime.clock import Clock, Lanes

LANES = ("disk", "down", "host", "device")


class TimedCuda(FakeCuda):
    """Blocks take `block_s` of their link, jobs of the worker `job_s`; what the device computes is
    said by whoever asks for it (`spend`)."""

    def __init__(self, *, block_s: dict[str, float], job_s: float) -> None:
        super().__init__(name="device", seed=1)
        self.lanes = Lanes(Clock(), LANES)
        self._block_s = block_s
        self._submit_file = self.below.submit
        self.below.submit = self._read  # type: ignore[method-assign]
        give = self.worker.submit

        def job(work: Callable[[], Any]) -> Any:
            pending = give(work)
            self.lanes["host"].put(job_s, self.worker.do_next)
            return pending

        self.worker.submit = job  # type: ignore[method-assign]

    def submit(self, copy: Copy, done: Done) -> None:
        super().submit(copy, done)
        self.lanes["down"].put(self._block_s["down"], self._arrive)

    def _read(self, copy: Copy, done: Done) -> None:
        def arrive() -> None:
            self.below.pending[:] = [(copy, done)]
            self.below.arrive()

        self.lanes["disk"].put(self._block_s["disk"], arrive)

    def _maybe_arrive(self) -> None:
        pass  # nothing but time brings it

    def wait(self) -> None:
        self.lanes.clock.wait()

    def spend(self, seconds: float) -> None:
        """The device computes, and the host waits for it."""
        over: list[bool] = []
        self.lanes["device"].put(seconds, lambda: over.append(True))
        while not over:
            self.lanes.clock.wait()

    def synchronize(self) -> None:
        self.order.run_until(lambda: not any(stream.queue for stream in self.order.streams))
