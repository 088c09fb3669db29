"""dsmoe::experts on the CPU by our own kernels: checks, workspace, one call into compiled code.

    y = experts(x, ids, weights, gate_up, down, None, None, "silu", 1.702, 7.0, "concat")

The rule and its arguments are those of ops/experts.py. Weights are read where they lie.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.descriptors import Arguments, of_memory, of_tensor
from dsmoe_runtime.mlir.experts_lowering import PHASES, ExpertsSpec, lower_experts
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.kernel import Kernel, kernel
from dsmoe_runtime.mlir.levels import Level, best_level
from dsmoe_runtime.mlir.products import SCRATCH
from dsmoe_runtime.mlir.team import COUNTER_SPACING
from dsmoe_runtime.mlir.workspace import Workspace
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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dsmoe::experts; `level` is the feature level, by default the best that this processor has.

    `dtype` is that of the result: x's, or float32 for a caller that adds to it before it is rounded.
    """
    check_call(x, experts, weights, gate_up, down, gate_up_bias, down_bias, activation, layout)
    spec = ExpertsSpec(
        type_of(x.dtype),
        activation,
        layout,
        gate_up_bias is not None,
        down_bias is not None,
        level or best_level(),
        type_of(dtype or x.dtype),
    )
    if x.device.type != "cpu":
        raise TargetError(f"x is on {x.device}; the mlir-cpu kernels take tensors on the CPU")
    y = x.new_empty(x.shape, dtype=dtype or x.dtype)
    if y.numel() == 0:
        return y
    tokens, top_k = experts.shape
    num_experts, hidden = gate_up.shape[0], x.shape[1]
    if spec.transposed:
        gate_up, down = gate_up.mT, down.mT
    width, lanes, threads = down.shape[2], spec.level.lanes, torch.get_num_threads()
    rows = spec.panels.rows(tokens * top_k, num_experts)
    pitches = [_pitch(size, lanes) for size in (hidden, width)]
    space = Workspace()
    counters = space.take(len(PHASES) * COUNTER_SPACING)
    first, total, hits, panels, row_panels, panel_slot, order, place = (
        space.take(count)
        for count in (num_experts, 3, num_experts, num_experts + 1, num_experts, rows + 1, rows, tokens * top_k)
    )
    packed, hidden_state = (space.take(rows, pitch, element=4) for pitch in pitches)
    answers, scratch = space.take(rows, pitches[0], element=4), space.take(threads, SCRATCH, element=4)
    scalars = (ctypes.c_float * 2)(alpha, limit)
    kept = [_rows_in_order(tensor, spec) for tensor in (x, gate_up, down)]
    ids, factors = experts.to(torch.int64).contiguous(), weights.float().contiguous()
    biases = [bias.contiguous() for bias in (gate_up_bias, down_bias) if bias is not None]
    base = space.address()
    arguments = Arguments(
        [
            of_tensor(kept[0]), of_memory(ids.data_ptr(), tokens * top_k), of_tensor(factors), of_tensor(kept[1]),
            of_tensor(kept[2]), *(of_tensor(bias) for bias in biases), of_tensor(y),
            of_memory(ctypes.addressof(scalars), 2),
            *(of_memory(base + offset, *sizes) for offset, *sizes in (
                counters, first, total, hits, panels, row_panels, panel_slot, order, place, packed, hidden_state,
                answers, scratch)),
        ]
    )  # fmt: skip
    experts_kernel(spec)(arguments, threads)
    return y


def _rows_in_order(tensor: Tensor, spec: ExpertsSpec) -> Tensor:
    """The tensor itself if values of a row lie side by side, else a copy in which they do."""
    return tensor if (spec.transposed and tensor.dim() == 3) or tensor.stride(-1) == 1 else tensor.contiguous()


def _pitch(size: int, lanes: int) -> int:
    """Of a row of the workspace: whole steps, and no power of two, which would put all rows in the same cache sets."""
    step = 2 * lanes
    return (-(-size // step) + 1) * step


@functools.cache
def experts_kernel(spec: ExpertsSpec) -> Kernel:
    """Its compiled code."""
    return kernel(lower_experts(spec), spec.level, "experts")
