"""`torch.compile(model, backend="dsmoe", options={"target": "mlir-cpu"})`: a fused graph as a program of this target.

Dynamo hands parameters over as inputs, so nothing is copied: each call passes addresses. Inference only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_compiler.targets.mlir.layout import memory_order, shape_of
from dsmoe_compiler.targets.mlir.program import compile_program
from dsmoe_runtime.errors import TargetError

log = logging.getLogger(__name__)
NAME = "mlir-cpu"


def compile_inference(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A function of the graph's inputs. Raises: TargetError, for a graph that trains, or is not on the CPU."""
    check(graph, example_inputs)
    if any(value.numel() == 0 for value in example_inputs if isinstance(value, Tensor)):
        log.info("an input of the graph is empty, and nothing worth compiling is left: torch runs it")
        return graph.forward
    program = compile_program(graph, "graph")
    dense = [i for i, place in enumerate(graph.graph.find_nodes(op="placeholder")) if with_gaps(place)]
    if dense:
        raise TargetError(f"input {dense[0]} of the graph lies with gaps in memory; mlir-cpu wants it contiguous")

    def run(*inputs: Any) -> tuple[Any, ...]:
        return tuple(program(inputs))

    return run


def check(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Raises: TargetError, if this target cannot run the graph at all."""
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise TargetError(
            f"target {NAME} runs inference only, and this call wants gradients: call the model under "
            "torch.no_grad(), or leave the target out to train through Inductor"
        )
    elsewhere = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if elsewhere is not None:
        raise TargetError(f"target {NAME} runs on the CPU; an input of the graph is on {elsewhere}")


def with_gaps(place: fx.Node) -> bool:
    """Whether an input is a tensor that does not fill its memory."""
    value = place.meta.get("val")
    return isinstance(value, Tensor) and memory_order(*shape_of(value)) is None
