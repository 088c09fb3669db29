"""dsmoe::route on the CPU by our own kernel: float32 logits to the experts of each token and their weights."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import InputError, TargetError
from dsmoe_runtime.mlir.descriptors import Arguments, of_memory, of_tensor
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.route_lowering import RouteSpec, lower_route
from dsmoe_runtime.mlir.team import COUNTER_SPACING
from dsmoe_runtime.mlir.workspace import Workspace
from dsmoe_runtime.ops.route import check_routing


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
    *,
    level: Level | None = None,
) -> tuple[Tensor, Tensor]:
    """dsmoe::route: `weights [T, K]` and `experts [T, K]`, by the rule and arguments of ops/route.py.

    Logits are float32: half-precision scores are rounded by torch after every step, which no kernel here repeats.
    """
    if logits.dim() != 2 or logits.device.type != "cpu":
        raise InputError(f"logits must be [T, E] on the CPU, not {tuple(logits.shape)} on {logits.device}")
    if logits.dtype != torch.float32:
        raise TargetError(f"logits are {logits.dtype}; the mlir-cpu gate takes float32 (router_dtype 'float32')")
    tokens, num_experts = logits.shape
    check_routing(num_experts, top_k, score, n_group, topk_group, group_score)
    if bias is not None and (bias.shape != (num_experts,) or bias.dtype != torch.float32):
        raise InputError(f"bias is {bias.dtype} {tuple(bias.shape)}; the mlir-cpu gate wants float32 [{num_experts}]")
    weights = logits.new_empty(tokens, top_k)
    experts = torch.empty(tokens, top_k, dtype=torch.int64)
    if tokens == 0:
        return weights, experts
    spec = RouteSpec(score, group_score, bias is not None, renormalize, level or best_level())
    threads, lanes = torch.get_num_threads(), spec.level.lanes
    space = Workspace()
    counters = space.take(2 * COUNTER_SPACING)
    scores = space.take(threads, -(-num_experts // lanes) * lanes, element=4)
    keys = space.take(threads, num_experts + n_group, element=4)
    sizes, scalars = (ctypes.c_int64 * 3)(top_k, n_group, topk_group), (ctypes.c_float * 2)(eps, scale)
    kept = [logits.contiguous(), *([bias.contiguous()] if bias is not None else [])]
    base = space.address()
    arguments = Arguments(
        [
            *(of_tensor(tensor) for tensor in (*kept, weights, experts)), of_memory(ctypes.addressof(sizes), 3),
            of_memory(ctypes.addressof(scalars), 2),
            *(of_memory(base + offset, *shape) for offset, *shape in (counters, scores, keys)),
        ]
    )  # fmt: skip
    route_kernel(spec)(arguments, threads)
    return weights, experts


@functools.cache
def route_kernel(spec: RouteSpec) -> Kernel:
    """Its compiled code."""
    return kernel(lower_route(spec), spec.level, "route")
