"""The backward's launches that move and sum rows; `kernels.backward_gemms` has those that multiply.

T tokens, H hidden size, E experts, I expert width, K experts per token, P = T K slots. Row r is that of slot slots[r].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dsmoe_runtime.kernels.device import dgrad, sort_rows, sums
from dsmoe_runtime.kernels.dispatch import carved, most_tiles
from dsmoe_runtime.kernels.launch import chained, launch

CHUNK = 1024
ROWS = 4  # that a program of `back_through_activation` takes


@dataclass(frozen=True)
class Saved:
    """What the forward kept: joint `[P, 2I]`, ungated `[P, I]`, not activated, its rows in the order of slots."""

    joint: Tensor
    slots: Tensor
    offsets: Tensor
    num_experts: int


class Order(NamedTuple):
    """int32, on the device: the row of each slot, and of each row tile its expert and first row; how many tiles."""

    place: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_count: Tensor


def order_of(saved: Saved, block_m: int) -> Order:
    """The inverse of `saved.slots`, undefined for skipped slots, and the row tiles."""
    n_slots, num_experts, pdl = len(saved.slots), saved.num_experts, chained(saved.slots.device)
    n_tiles = most_tiles(n_slots, num_experts, block_m)
    order = Order(*carved((n_slots, n_tiles, n_tiles, 1), saved.slots.device))
    launch(
        sort_rows.place_slots, (torch.sym_max(num_experts, triton.cdiv(n_slots, CHUNK)),),
        saved.slots, saved.offsets, *order,
        EXPERTS=num_experts, LANES=triton.next_power_of_2(num_experts), BLOCK_M=block_m, CHUNK=CHUNK, PDL=pdl,
        num_warps=4, pdl=pdl,
    )  # fmt: skip
    return order


def sorted_rows(grad: Tensor, x: Tensor | None, experts: Tensor, order: Order, num_experts: int) -> tuple[Tensor, ...]:
    """`[P, H]` in sorted order: each slot's row of grad `[T, H]`, and, unless None, of x."""
    (tokens, hidden), top_k, pdl = grad.shape, experts.shape[1], chained(grad.device)
    tables = tuple(grad.new_empty((tokens * top_k, hidden)) for _ in range(1 if x is None else 2))
    source = grad if x is None else x
    launch(
        sort_rows.sort_rows, (tokens,),
        grad, grad.stride(0), source, source.stride(0), experts, order.place, tables[0], tables[-1],
        HIDDEN=hidden, EXPERTS=num_experts, TOP_K=top_k, BOTH=x is not None,
        BLOCK_H=min(2048, triton.next_power_of_2(hidden)), PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    return tables


def back_through_activation(
    grad_hidden: Tensor,
    weights: Tensor,
    saved: Saved,
    activation: tuple[str, float, float, bool],
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """grad_joint, as wide as joint, and `<grad_hidden, hidden>` `[P]`, in float32.

    activation: its name, alpha, limit, and whether gate and up are interleaved. keep_hidden: the hidden state, times
    the routing weights, is written over grad_hidden `[P, I]`.
    """
    (n_slots, width), pdl = grad_hidden.shape, chained(grad_hidden.device)
    name, alpha, limit, interleaved = activation
    grad_joint = torch.empty_like(saved.joint)
    products = grad_hidden.new_empty(n_slots, dtype=torch.float32)
    launch(
        dgrad.through_activation, (triton.cdiv(n_slots, ROWS),),
        grad_hidden, saved.joint, weights, saved.slots, saved.offsets, grad_joint, products, alpha, limit,
        WIDTH=width, EXPERTS=saved.num_experts,
        ACTIVATION=name, GATED=saved.joint.shape[1] != width, INTERLEAVED=interleaved, KEEP_HIDDEN=keep_hidden,
        ROWS=ROWS, BLOCK=min(512, triton.next_power_of_2(width)), PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    return grad_joint, products


def token_sums(
    grad: Tensor,
    weights: Tensor,
    experts: Tensor,
    grad_rows: Tensor,
    products: Tensor,
    order: Order,
    num_experts: int,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x `[T, H]` and of the routing weights `[T, K]`."""
    tokens, hidden = grad.shape
    grad_x, grad_weights, pdl = grad.new_empty((tokens, hidden)), torch.empty_like(weights), chained(grad.device)
    launch(
        sums.token_sums, (tokens,),
        grad_rows, products, experts, order.place, grad, grad.stride(0),
        None if down_bias is None else down_bias.contiguous(), grad_x, grad_weights,
        HIDDEN=hidden, EXPERTS=num_experts, TOP_K=experts.shape[1], BIASED=down_bias is not None,
        BLOCK_H=min(2048, triton.next_power_of_2(hidden)), PDL=pdl, num_warps=8, pdl=pdl,
    )  # fmt: skip
    return grad_x, grad_weights


def bias_grad(table: Tensor, weights: Tensor | None, saved: Saved) -> Tensor:
    """`[E, N]`: the sums of each expert's rows of table `[P, N]`, with weights of the rows times their slots'."""
    num_experts, columns = saved.num_experts, table.shape[1]
    out, pdl = table.new_empty((num_experts, columns)), chained(table.device)
    block = min(128, triton.next_power_of_2(columns))
    launch(
        sums.expert_sums, (num_experts, triton.cdiv(columns, block)),
        table, weights, saved.slots, saved.offsets, out,
        N=columns, WEIGHTED=weights is not None, BLOCK_R=32, BLOCK_N=block, PDL=pdl, num_warps=4, pdl=pdl,
    )  # fmt: skip
    return out
