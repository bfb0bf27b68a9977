"""A cluster as the pool sees it: nodes, processes on them that hold a replica, and calls that come
back. Knows no ray."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that may compute. `address`: the same for nodes that share a machine. `cpus`, of 1
    or more, and `gpus`: what the cluster was told that it has."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: int


class Failure(NamedTuple):
    """Why a call brought nothing. `is_refusal`: the replica said so, and would say it again; else
    it is gone."""

    text: str
    is_refusal: bool


class Outcome(NamedTuple):
    """What a call brought."""

    handle: Hashable
    value: Any
    failure: Failure | None


class Cluster(Protocol):
    """Starts replicas and carries calls to them, one at a time to each."""

    def nodes(self) -> list[Node]:
        """Those that are alive. Raises JobError where the cluster itself is gone."""
        ...

    def start(self, node: Node, *, cpus: float, gpus: int) -> Hashable:
        """A process on `node`, which takes so many of its processors and devices."""
        ...

    def call(self, handle: Hashable, method: str, *arguments: Any) -> None: ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Of calls that have ended, waiting for one at most so long."""
        ...

    def kill(self, handle: Hashable) -> None:
        """Its call brings nothing any more."""
        ...
