"""Copies on the `down` stream of a device, and who says that they are there. Knows no weights."""

from queue import SimpleQueue

from windlass.device.base import Copy, DeviceMemory, Done
from windlass.device.streams import Event, Streams


class Lane:
    """Copies from memory of the host, in the order in which they are submitted, by any thread.
    A device has a thread of its own in `serve`: the host computes while copies are made, and is
    told of each when it has ended."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._under_way: SimpleQueue[tuple[Event, Done] | None] = SimpleQueue()

    def submit(self, copy: Copy, done: Done) -> None:
        """See `Device.submit`."""
        source, into, down = copy.source, copy.destination, self._streams.down
        assert isinstance(source, DeviceMemory), f"{copy.label}: a device copies from memory"
        down.wait(into.last_use)
        with self._streams.on(down):
            into.data.copy_(source.data, non_blocking=True)
        self._under_way.put((down.record(), done))

    def arrive(self) -> bool:
        """Waits for the copy that was submitted first of those under way, and says `done`. False
        where there is none, and will be none: the lane is closed."""
        one = self._under_way.get()
        if one is None:
            return False
        event, done = one
        error: Exception | None = None
        try:
            event.synchronize()
        except Exception as caught:  # noqa: BLE001  thread boundary: `done` hands it on
            error = caught
        done(error)
        return True

    def serve(self) -> None:
        """Until the lane is closed and its last copy has ended."""
        while self.arrive():
            pass

    def close(self) -> None:
        """Ends `serve`; nothing may be submitted afterwards."""
        self._under_way.put(None)
