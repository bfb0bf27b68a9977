"""A cluster that Ray runs, and replicas as its actors. The only module that imports ray."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from windlass.errors import JobError, UsageError, WindlassError
from windlass.ray.cluster import Failure, Node, Outcome

AUTO, LOCAL = "auto", "local"  # of an address: the cluster of this machine, or one of our own
_CONNECT_S = 5.0  # for a machine to accept a connection
_JOIN_S = 60.0  # for a head node to let a driver in
_JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=50)"
_MOST_MESSAGE = 300  # characters of what Ray says of a process that is gone


def import_ray() -> Any:
    """Ray. UsageError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "replicas: got no package ray, allowed with it: pip install -e '.[ray]' in a checkout"
            f" of Windlass ({error})"
        ) from error
    return ray


def actor_class() -> Any:
    """The class of a replica's actor, not yet given to `ray.remote`. It is pickled whole, not by
    name: on a node with another version it can say so."""

    class WindlassReplica:
        """One engine. `cpus`: what Ray gave it."""

        def __init__(self, cpus: float = 0.0) -> None:
            self._replica: Any = None
            # Ray's way to limit threads, which would hide the cores from torch
            if os.environ.get("OMP_NUM_THREADS") == str(max(1, int(cpus))):
                del os.environ["OMP_NUM_THREADS"]

        def look(self) -> dict[str, Any]:
            """Its version; `error` where windlass cannot be used there."""
            try:
                from windlass.version import VERSION
            except ImportError as error:
                return {"version": None, "error": f"{type(error).__name__}: {error}"}
            return {"version": VERSION, "error": None}

        def place(self) -> Any:
            from windlass.ray.replica import look

            return look()

        def open(self, spec: Any) -> Any:
            """Its facts. Opening again closes what was open."""
            from windlass.ray.replica import open_replica

            self.close()
            self._replica = open_replica(spec)
            return self._replica.facts()

        def exchange(self, rows: Any, timeout_s: float) -> Any:
            return self._replica.exchange(rows, timeout_s)

        def close(self) -> None:
            if self._replica is not None:
                self._replica.close()
            self._replica = None

    return WindlassReplica


class RayCluster:
    """Implements `Cluster` on a Ray that this process is connected to."""

    def __init__(self) -> None:
        self._ray = import_ray()
        self._actor = self._ray.remote(actor_class())
        self._calls: dict[Any, Hashable] = {}  # Ray's reference -> the actor's handle

    def nodes(self) -> list[Node]:
        """As `Cluster.nodes`."""
        try:
            found = self._ray.nodes()
        except Exception as error:  # Ray has many, and none of them is ours
            raise JobError(f"ray: the cluster does not answer: {_short(error)}") from error
        return [
            Node(
                id=node["NodeID"],
                host=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                cpus=node["Resources"]["CPU"],
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in found
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        ]

    def start(self, node: Node, *, cpus: float, gpus: int) -> Hashable:
        """As `Cluster.start`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Ray takes fractions of whole processors below one alone
        cpus = float(int(cpus)) if cpus >= 1 else cpus
        where = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked = self._actor.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=where)
        handle: Hashable = asked.remote(cpus)
        return handle

    def call(self, handle: Any, method: str, *arguments: Any) -> None:
        """As `Cluster.call`."""
        self._calls[getattr(handle, method).remote(*arguments)] = handle

    def wait(self, timeout_s: float) -> list[Outcome]:
        """As `Cluster.wait`."""
        if not self._calls:
            time.sleep(timeout_s)
            return []
        references = list(self._calls)
        ready, _ = self._ray.wait(references, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return [self._outcome(reference) for reference in ready]

    def kill(self, handle: Any) -> None:
        """As `Cluster.kill`."""
        self._calls = {call: own for call, own in self._calls.items() if own != handle}
        self._ray.kill(handle, no_restart=True)

    def _outcome(self, reference: Any) -> Outcome:
        handle = self._calls.pop(reference)
        try:
            return Outcome(handle, self._ray.get(reference), None)
        except WindlassError as error:  # raised there: Ray's error is of that kind, too
            cause = getattr(error, "cause", error)
            return Outcome(handle, None, Failure(str(cause), True))
        except Exception as error:  # noqa: BLE001  process boundary: Ray's own, and an engine's
            cause = getattr(error, "cause", None) or error
            return Outcome(handle, None, Failure(_short(cause), False))


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """The cluster at `address`: HOST:PORT, `auto` for the one that runs on this machine, `local`
    for one that lasts as long as this. UsageError where there is none."""
    ray = import_ray()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False, **quiet)
    elif address == AUTO:
        try:
            ray.init(address=AUTO, **quiet)
        except ConnectionError as error:
            raise UsageError(
                "ray-address: got auto, but no Ray runs on this machine: start it with `ray start"
                " --head`, or say HOST:PORT of its head or local"
            ) from error
    else:
        _check_address(address)
        ray.init(address=address, **quiet)
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():  # Ray ends the process at SIGTERM
            if handler is not None:
                signal.signal(number, handler)
    try:
        yield RayCluster()
    finally:
        ray.shutdown()


def actor_pool(least: int, most: int, *, calls: int) -> Any:
    """Ray Data's: between so many actors, each with `calls` calls at once."""
    import_ray()
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(min_size=least, max_size=most, max_concurrent_calls_per_actor=calls)


def _check_address(address: str) -> None:
    """Raises UsageError where no head node answers. In a process of its own: Ray ends the one that
    it fails in, after minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"ray-address: got {address!r}, allowed auto, local or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        raise UsageError(f"ray-address: got {address!r}: nothing answers there: {error}") from error
    try:
        subprocess.run(
            [sys.executable, "-c", _JOIN, address], capture_output=True, timeout=_JOIN_S, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        why = said[-1][:_MOST_MESSAGE] if isinstance(error, subprocess.CalledProcessError) else ""
        raise UsageError(
            f"ray-address: got {address!r}: no head of a Ray cluster answered within"
            f" {_JOIN_S:.0f} s{': ' + why if why else ''}"
        ) from error


def _short(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:_MOST_MESSAGE]
