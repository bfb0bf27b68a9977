"""Work that a CUDA device keeps and does again, as torch has it: graphs of one pool of memory."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from windlass.device.graphs import Graph

# ruff: noqa: TID251  beside cuda.py, the one place that may touch torch.cuda

_Result = TypeVar("_Result")


class CudaGraphs:
    """Implements `Graphs`. Other threads may go on asking the device for copies meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], _Result]) -> tuple[Graph, _Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # not torch.cuda.graph, which waits for the device and collects garbage each time
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = body()
            except BaseException:
                with suppress(RuntimeError):  # of what has failed already
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, result
