"""Experts as batched GEMMs: each row meets its own copy of its expert's weights.

    hidden_SN1 = bmm(gate_up_ENH[ids_S], rows_SH1)      or, with transposed weights,
    hidden_S1N = bmm(rows_S1H, gate_up_EHN[ids_S])

S = T K rows, H model width, N what the GEMM gives a row, E experts.
"""

from __future__ import annotations

import torch
from torch import fx

from dsmoe_passes.experts_match import stored, untransposed
from dsmoe_passes.experts_pair import Gemm
from dsmoe_passes.experts_rows import GATHERS, places_of
from dsmoe_passes.index_meaning import meaning
from dsmoe_passes.region import same_size, value
from dsmoe_passes.result import Mismatch

aten = torch.ops.aten
GEMMS = {aten.bmm.default, aten.matmul.default}
COLUMNS = {aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def is_batched(node: fx.Node) -> bool:
    """Whether `node` multiplies with stacked weights that are gathered one for each row."""
    return node.target in GEMMS and _gathered(node) is not None


def _gathered(node: fx.Node) -> int | None:
    """Which operand of a product is a gather from a tensor of three dimensions."""
    for side, operand in enumerate(node.args[:2]):
        if not isinstance(operand, fx.Node):
            continue
        gather, _ = untransposed(operand)
        if gather.target in GATHERS and value(gather).dim() == 3 and places_of(gather) is not None:
            source = gather.args[0]
            if isinstance(source, fx.Node) and value(source).dim() == 3 and value(places_of(gather)).dim() == 1:  # type: ignore[arg-type]
                return side
    return None


def read_batched(node: fx.Node) -> Gemm:
    """A batched GEMM and the ids that gather its weights. Raises: Mismatch."""
    side = _gathered(node)
    assert side is not None
    operand, thin = node.args[side], node.args[1 - side]
    assert isinstance(operand, fx.Node)
    assert isinstance(thin, fx.Node)
    gather, swapped = untransposed(operand)
    weight, swapped_before = untransposed(gather.args[0])  # type: ignore[arg-type]
    stored(weight, "stacked weight of the experts")
    # On the left the weights are [N, H] for each row, on the right [H, N].
    transposed = (side == 1) != (swapped != swapped_before)
    found = meaning(places_of(gather))
    if found is None or found.kind not in ("ids", "sorted"):
        raise Mismatch(gather, f"weights are gathered by {places_of(gather)}, not by the flattened ids of the experts")
    thin_dim = 1 if side == 1 else 2
    if value(thin).dim() != 3 or not same_size(value(thin).shape[thin_dim], 1):
        raise Mismatch(node, f"each expert's copy multiplies {tuple(value(thin).shape)}, not one row")
    rows = thin.args[0] if thin.target in COLUMNS else None
    if not isinstance(rows, fx.Node) or value(rows).dim() != 2:
        raise Mismatch(thin, f"{thin.name} ({thin.target}) is no row of each slot")
    return Gemm(node, rows, weight, transposed, found)
