"""Work of a device that is kept, to be given to it again at once."""

from collections.abc import Callable
from typing import Protocol, TypeVar

_Result = TypeVar("_Result")


class Graph(Protocol):
    """Operations on memory that stays where it is."""

    def replay(self) -> None:
        """Gives them to the stream that this thread is on: with what their memory holds then."""
        ...


class Graphs(Protocol):
    """Makes them on one device."""

    def capture(self, body: Callable[[], _Result]) -> tuple[Graph, _Result]:
        """What `body` asks of the device, on a stream that is not the default one, is kept and not
        done. Memory that it makes is of one pool for all graphs: what its result holds is the
        graph's, the rest is used again by others, so that no two may run at once. RuntimeError
        where the device cannot keep it, as what waits for it."""
        ...
