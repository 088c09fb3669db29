"""dsmoe::route on the CPU by our own kernel: float32 logits to the experts of each token and their weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import InputError, TargetError
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.linear import in_rows
from dsmoe_runtime.mlir.route_lowering import RouteSpec, route_function
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
    spec = RouteSpec(
        top_k, score, n_group, topk_group, group_score, renormalize, eps, scale, None if bias is None else "f32",
        level or best_level(),
    )  # fmt: skip
    given = [in_rows(tensor) for tensor in (logits, bias) if tensor is not None]
    route_kernel(spec)([*given, weights, experts])
    return weights, experts


@functools.cache
def route_kernel(spec: RouteSpec) -> Kernel:
    """Its compiled code."""
    return kernel(route_function(spec), spec.level)
