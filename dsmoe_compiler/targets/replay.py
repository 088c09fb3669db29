"""A program on a GPU as a CUDA graph: all kernels of a call in one launch, for inputs that stay where they are.

A decode step of a deep model is hundreds of short kernels; launching them one by one takes longer than running them. A
graph holds the addresses of what it reads and writes, so there is one for each cache: inputs that move (ids, position)
are copied to a place of their own, outputs are copied from one.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmoe_compiler.targets.package import Program

log = logging.getLogger(__name__)
MOST_GRAPHS = 8  # caches in turn; the one not used for longest is forgotten


class Graph(NamedTuple):
    """A captured call and where it leaves its outputs."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Tensor]


class Replayed:
    """`program`, replayed: the same function, whose first `moving` inputs may lie anywhere, the others in few places.

    The first call with inputs in new places runs the program itself: kernels are loaded then, which no capture allows.
    The second makes the graph. Calls wait for one another, whatever their threads and streams. Where the program cannot
    be captured, it goes on without a graph, and the log says why.
    """

    def __init__(self, program: Program, *, moving: int, device: torch.device) -> None:
        self.program, self.moving, self.device = program, moving, device
        self.graphs: OrderedDict[tuple[int, ...], Graph | None] = OrderedDict()
        self.places: list[Tensor] = []
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None
        self.able = True
        self.turn = threading.Lock()

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        moving, fixed = inputs[: self.moving], inputs[self.moving :]
        with self.turn, torch.cuda.device(self.device):
            if not self.able or torch.cuda.is_current_stream_capturing():
                return self.program(inputs)
            key = tuple(tensor.data_ptr() for tensor in fixed)
            if key not in self.graphs:
                self.graphs[key] = None
                if len(self.graphs) > MOST_GRAPHS:
                    self.graphs.popitem(last=False)
                return self.program(inputs)
            self.graphs.move_to_end(key)
            graph = self.graphs[key]
            if graph is None:
                try:
                    graph = self.graphs[key] = self.capture(moving, fixed)
                except RuntimeError as error:
                    self.able = False
                    log.warning("no CUDA graph, so each kernel is launched by itself: %s", str(error).splitlines()[0])
                    return self.program(inputs)
            return self.replay(graph, moving)

    def capture(self, moving: list[Tensor], fixed: list[Tensor]) -> Graph:
        """Record a call; nothing runs. All graphs share one memory pool: they never run at the same time."""
        if not self.places:
            self.places = [tensor.clone() for tensor in moving]
            self.pool, self.done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self.program([*self.places, *fixed])
        return Graph(graph, outputs)

    def replay(self, graph: Graph, moving: list[Tensor]) -> list[Tensor]:
        """Run a graph with these inputs on the current stream, after the replay before it."""
        assert self.done is not None
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        for place, tensor in zip(self.places, moving, strict=True):
            place.copy_(tensor)
        graph.graph.replay()
        outputs = [output.clone() for output in graph.outputs]
        self.done.record(stream)
        return outputs
