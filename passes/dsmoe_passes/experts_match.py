"""What every reader of routed experts returns, and the small checks that the spellings share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.activations import Activation
from dsmoe_passes.index_meaning import meaning
from dsmoe_passes.region import is_symbol, is_weight, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim, aten.unsqueeze.default}
ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}
FILLED = {aten.full.default, aten.full_like.default}


@dataclass(frozen=True)
class Match:
    """Routed experts as `dsmoe::experts` takes them; `result` is the node that the operator's output replaces.

    `x` and `weights` are cast to `x_dtype` and `weights_dtype` first, where the graph rounds them on the way.
    """

    spelling: str
    x: fx.Node
    experts: fx.Node
    weights: fx.Node
    gate_up: fx.Node
    down: fx.Node
    gate_up_bias: fx.Node | None
    down_bias: fx.Node | None
    activation: Activation
    layout: str
    result: fx.Node
    x_dtype: torch.dtype
    weights_dtype: torch.dtype


def only_user(node: fx.Node, what: str) -> fx.Node:
    """The one tensor that is computed from `node`. Raises: Mismatch if there are others, or none."""
    users = [user for user in node.users if not is_symbol(user)]
    if len(users) != 1:
        names = ", ".join(user.name for user in users) or "nothing"
        because = f"{what} ({node.name}) must be used once, in the sum over experts; it is used by {names}"
        raise Mismatch(node, because + (": a norm, perhaps, which dsmoe::experts has not" if len(users) > 1 else ""))
    return users[0]


def stored(node: fx.Node, what: str) -> fx.Node:
    """`node`, if it is a parameter or an input. Raises: Mismatch otherwise."""
    if not is_weight(node):
        because = f"the {what} is computed in the graph ({node.name}, {node.target}), not a parameter"
        raise Mismatch(node, because)
    return node


def untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """`node` without a swap of its last two of three dimensions, and whether there was one."""
    swapped = False
    while node.op == "call_function":
        if node.target is aten.transpose.int:
            dims = {d % 3 for d in node.args[1:]}  # type: ignore[operator]
        elif node.target is aten.permute.default:
            dims = {i for i, d in enumerate(node.args[1]) if d % 3 != i}  # type: ignore[arg-type, operator]
        else:
            break
        if value(node).dim() != 3 or dims != {1, 2}:
            break
        swapped, node = not swapped, node.args[0]  # type: ignore[assignment]
    return node, swapped


@dataclass(frozen=True)
class Layer:
    """Whose rows are read: the `[T, K]` expert ids, and how many experts there are."""

    ids: fx.Node
    n_experts: int

    @property
    def top_k(self) -> int:
        return int(value(self.ids).shape[1])

    def masks_strangers(self, node: fx.Node, source: fx.Node, sort: fx.Node | None) -> bool:
        """Whether `node` zeroes the rows of `source` that belong to no expert, which `dsmoe::experts` skips anyway.

        The rows lie in the order of `sort`, or of the slots.
        """
        if node.target is not aten.masked_fill.Scalar or node.args[0] is not source or node.args[2] != 0:
            return False
        found = meaning(node.args[1])
        if found is None or found.kind != "beyond" or found.number < self.n_experts:
            return False
        return found.source is (self.ids if sort is None else sort)


def are_zeros(node: object) -> bool:
    """Whether `node` is a tensor of zeros."""
    if not isinstance(node, fx.Node):
        return False
    return node.target in ZEROS or (node.target in FILLED and node.args[1] in (0, 0.0))


def keeps_precision(node: fx.Node, dtype: torch.dtype) -> None:
    """Raises: Mismatch if `node` holds sums or products in less precision than `dtype`."""
    held = value(node).dtype
    if torch.promote_types(held, dtype) != held:
        raise Mismatch(node, f"outputs are weighted in {held}; dsmoe::experts does so in {dtype} or wider")


def result_of(total: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node that holds the sum in `dtype`: the sum itself, or the one cast that follows it."""
    if value(total).dtype == dtype:
        return total
    users = list(total.users)
    if len(users) == 1 and users[0].target is aten._to_copy.default and value(users[0]).dtype == dtype:
        return users[0]
    raise Mismatch(total, f"the sum is used in {value(total).dtype}, before it is rounded to {dtype}")
