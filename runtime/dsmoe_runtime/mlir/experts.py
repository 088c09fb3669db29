"""dsmoe::experts on the CPU by our own kernels: checks, and one call into compiled code.

    y = experts(x, ids, weights, gate_up, down, None, None, "silu", 1.702, 7.0, "concat")

The rule and its arguments are those of ops/experts.py. Weights are read where they lie.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.experts_lowering import ExpertsSpec, experts_function
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.gate_up import Activation
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.linear import in_rows
from dsmoe_runtime.ops.experts import check_call


def experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    *,
    level: Level | None = None,
) -> Tensor:
    """dsmoe::experts; `level` is the feature level, by default the best that this processor has."""
    check_call(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
    spec = ExpertsSpec(
        type_of(x.dtype),
        Activation(activation, alpha, limit),
        layout,
        gate_up_bias is not None,
        down_bias is not None,
        level or best_level(),
    )
    if x.device.type != "cpu":
        raise TargetError(f"x is on {x.device}; the mlir-cpu kernels take tensors on the CPU")
    y = x.new_empty(x.shape)
    biases = [bias for bias in (gate_up_bias, down_bias) if bias is not None]
    given = (x, experts.to(torch.int64), weights.float(), gate_up, down, *biases)
    experts_kernel(spec)([*(in_rows(tensor) for tensor in given), y])
    return y


@functools.cache
def experts_kernel(spec: ExpertsSpec) -> Kernel:
    """Its compiled code."""
    return kernel(experts_function(spec), spec.level)
