"""dsmoe::moe on the CPU by our own kernels: gate, routed experts and shared experts in one call, rounded once.

The shared experts are one expert that every token has, with weight 1, or the sigmoid of its gate (Qwen2-MoE); they run
through the same kernels as the routed ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.experts_lowering import ExpertsSpec
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.gate_up import Activation
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.linear import in_rows
from dsmoe_runtime.mlir.moe_lowering import MoeSpec, moe_function
from dsmoe_runtime.mlir.route_lowering import RouteSpec
from dsmoe_runtime.ops.moe import moe_fake


def moe(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
    router_dtype: str,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    *,
    level: Level | None = None,
) -> tuple[Tensor, Tensor]:
    """dsmoe::moe: `y [T, H]` and the `experts [T, K]` that made it, by the rule and arguments of ops/moe.py."""
    y, ids = moe_fake(
        x, router_weight, router_bias, selection_bias, top_k, score, n_group, topk_group, group_score, renormalize,
        eps, scale, router_dtype, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout,
        shared_gate_up, shared_down, shared_gate,
    )  # fmt: skip
    if router_dtype == "activation" and x.dtype != torch.float32:
        raise TargetError(f"router_dtype is 'activation' and x {x.dtype}; the mlir-cpu gate computes in float32")
    if x.device.type != "cpu":
        raise TargetError(f"x is on {x.device}; the mlir-cpu kernels take tensors on the CPU")
    level = level or best_level()
    biases = [None if bias is None else type_of(bias.dtype) for bias in (router_bias, selection_bias)]
    spec = MoeSpec(
        ExpertsSpec(
            type_of(x.dtype), Activation(activation, alpha, limit), layout, gate_up_bias is not None,
            down_bias is not None, level,
        ),
        RouteSpec(
            top_k, score, n_group, topk_group, group_score, renormalize, eps, scale, biases[1], level
        ),
        type_of(router_weight.dtype), biases[0], shared_gate_up is not None, shared_gate is not None,
    )  # fmt: skip
    given = (
        x, router_weight, router_bias, selection_bias, gate_up, down, gate_up_bias, down_bias, shared_gate_up,
        shared_down, shared_gate,
    )  # fmt: skip
    moe_kernel(spec)([*(in_rows(tensor) for tensor in given if tensor is not None), y, ids])
    return y, ids


@functools.cache
def moe_kernel(spec: MoeSpec) -> Kernel:
    """Its compiled code."""
    return kernel(moe_function(spec), spec.experts.level)
