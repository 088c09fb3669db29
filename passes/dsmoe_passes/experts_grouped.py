"""Experts as grouped GEMMs: rows sorted by expert, and offsets that say where each expert's rows end.

    sorted_S, order_S = sort(ids_TK.flatten())
    offsets_E         = cumsum(histc(sorted_S, bins=E, min=0, max=E - 1))
    hidden_SN         = grouped_mm(x_TH[order_S // K], gate_up_EHN, offsets_E)

S = T K rows, H model width, N what the GEMM gives a row, E experts.
"""

from __future__ import annotations

import torch
from torch import fx

from dsmoe_passes.experts_match import stored, untransposed
from dsmoe_passes.experts_pair import Gemm
from dsmoe_passes.index_meaning import meaning
from dsmoe_passes.region import argument, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
FALLBACKS = {"transformers.grouped_mm_fallback.default"}  # by name: the library that registers it is optional


def is_grouped(node: fx.Node) -> bool:
    """Whether `node` is a GEMM over groups of rows."""
    return node.op == "call_function" and (node.target is aten._grouped_mm.default or str(node.target) in FALLBACKS)


def read_grouped(node: fx.Node) -> Gemm:
    """A grouped GEMM and the ids that group its rows. Raises: Mismatch."""
    rows, operand, offsets = node.args[0], node.args[1], argument(node, 2, "offs")
    assert isinstance(rows, fx.Node)
    assert isinstance(operand, fx.Node)
    if argument(node, 3, "bias") is not None:
        raise Mismatch(node, "the grouped GEMM has a bias of its own, which is one for all experts")
    if value(rows).dim() != 2 or value(operand).dim() != 3:
        shapes = f"{tuple(value(rows).shape)} and {tuple(value(operand).shape)}"
        raise Mismatch(node, f"the grouped GEMM multiplies {shapes}, not rows [S, H] and weights [E, H, N]")
    weight, swapped = untransposed(operand)
    stored(weight, "stacked weight of the experts")
    found, n_experts = meaning(offsets), value(weight).shape[0]
    if found is None or found.kind != "offsets":
        because = f"the groups end at {offsets}, which is no cumulative sum of how many rows each expert has"
        raise Mismatch(node, because)
    if found.number != n_experts:
        raise Mismatch(node, f"the groups are counted for {found.number} experts, the weights hold {n_experts}")
    return Gemm(node, rows, weight, not swapped, found)
