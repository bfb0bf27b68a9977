"""A runtime whose attention is computed as late as the schedule allows, as that of another
processor may be."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from windlass.build import open as build
from windlass.models.spec import Recurrent
from windlass.runtime.host import HostRuntime
from windlass.schedule.batch import MicroBatch
from windlass.weights.store import Lease


class DeferredRuntime(HostRuntime):
    """What `attend` begins is done when `attended` asks: all of it, or, by chance, what follows
    after keys and values are written."""

    def __init__(self, *given: Any, seed: int) -> None:
        super().__init__(*given)
        self._chance = random.Random(seed)
        self.most_begun = 0  # micro-batches at once
        self._begun = 0

    def attend(self, layer: int, weights: Lease, hidden: torch.Tensor, rows: MicroBatch) -> Any:
        self._begun += 1
        self.most_begun = max(self.most_begun, self._begun)
        attention = self._spec.blocks[layer].attention
        if isinstance(attention, Recurrent) or self._chance.random() < 0.5:
            return lambda: super(DeferredRuntime, self).attend(layer, weights, hidden, rows)
        assert attention is not None
        ops, metadata, w = self._attention, self._metadata[rows.first_token], weights.tensors
        x_TD = hidden[rows.first_token : rows.first_token + rows.num_tokens]
        got = ops.project(layer, attention, w, x_TD, metadata)
        ops.write(layer, got, metadata)

        def finish() -> None:
            o_THv = ops.attend(layer, attention, w, got, metadata)
            ops.finish(layer, w, x_TD, o_THv, got.gate_THv)

        return finish

    def attended(
        self,
        layer: int,
        weights: Lease,
        hidden: torch.Tensor,
        rows: MicroBatch,
        begun: Any,
    ) -> None:
        begun()
        self._begun -= 1


@contextmanager
def deferred(*, seed: int) -> Iterator[list[DeferredRuntime]]:
    """Engines that are opened meanwhile have such a runtime; those that were made."""
    made: list[DeferredRuntime] = []

    def make(*given: Any) -> DeferredRuntime:
        made.append(DeferredRuntime(*given, seed=seed))
        return made[-1]

    with mock.patch.object(build, "HostRuntime", make):
        yield made
