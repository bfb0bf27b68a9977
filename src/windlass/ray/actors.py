"""Replicas as Ray actors. The only module that imports ray."""

from typing import Any

import ray


def actor_class() -> Any:
    """The class of a replica's actor, not yet given to `ray.remote`. It is pickled whole, not by
    name: on a node with another version it can say so."""

    class WindlassReplica:
        """One engine. What is raised comes back as a kind and a line, which any version reads."""

        def __init__(self) -> None:
            self._replica: Any = None

        def look(self) -> dict[str, Any]:
            """Where it is; `error` where windlass cannot be used there."""
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

        def compute(self, rows: Any) -> Any:
            return self._replica.compute(rows)

        def close(self) -> None:
            if self._replica is not None:
                self._replica.close()
            self._replica = None

    return WindlassReplica


def start_actor(**options: Any) -> Any:
    """A handle of a new actor. `options`: Ray's own, as num_cpus and scheduling_strategy."""
    return ray.remote(actor_class()).options(**options).remote()
