"""What the tests of the kernels share: cases of experts, plans to run them by, and the judge.

T tokens, H hidden size, E experts, I expert width, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_runtime.agreement import Agreement, within_budget
from dsmoe_runtime.kernels import experts as kernels
from dsmoe_runtime.kernels.launch import INTERPRETED
from dsmoe_runtime.kernels.plan import Plan, Tile
from dsmoe_runtime.ops.experts import experts as rule
from tests.runtime.op_cases import attributes, exact, expert_case, laid_out

IN_INTERPRETER = pytest.mark.parametrize("device", ["cpu"], indirect=True)
ON_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)

# Of E, K, H and I: no powers of two, no multiples of the blocks below
SIZES: dict[str, dict[str, int]] = {
    "even": {"num_experts": 5, "top_k": 3, "hidden": 40, "width": 24},
    "odd": {"num_experts": 7, "top_k": 2, "hidden": 33, "width": 19},
    "one expert": {"num_experts": 1, "top_k": 1, "hidden": 48, "width": 16},
    "many experts": {"num_experts": 63, "top_k": 6, "hidden": 20, "width": 12},
    # GPU: rows that the copy engine can read, and rows that it cannot
    "aligned": {"num_experts": 9, "top_k": 4, "hidden": 264, "width": 176},
    "unaligned": {"num_experts": 9, "top_k": 4, "hidden": 129, "width": 65},
}
PAIRS = Plan("pairs", Tile(1, 16, 32, 4, 1), Tile(1, 32, 32, 4, 2))
SCAN = Plan("scan", Tile(16, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2))
SORTED = Plan("sorted", Tile(16, 16, 32, 4, 2), Tile(16, 32, 16, 4, 2), group=2)
PLANS = {
    "pairs": PAIRS,
    "pairs, a block of the width at a time": replace(PAIRS, up=Tile(1, 32, 64, 4, 1), down=Tile(1, 64, 16, 4, 0)),
    "scan": SCAN,
    "sorted": SORTED,
    "sorted, half height": Plan("sorted", Tile(32, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2), group=1, half=True),
    "sorted, tall tiles": replace(SORTED, up=Tile(64, 8, 64, 4, 2), down=Tile(64, 64, 8, 4, 2), group=8),
}


def case_of(
    tokens: int, sizes: str = "even", *, layout: str = "concat", skip: bool = True, **changes: Any
) -> dict[str, Any]:
    """A case in `layout`; skip: two slots have ids out of range, and NaN for weights of an expert without tokens."""
    case = expert_case(tokens, **(SIZES[sizes] | changes))
    num_experts = len(case["gate_up"])
    if skip and tokens > 2:
        case["experts"][1, 0], case["experts"][2, -1] = -1, num_experts
        case["weights"][1, 0] = torch.nan
    if skip and num_experts > 2:
        case["experts"].masked_fill_(case["experts"] == 2, 0)
        case["gate_up"][2], case["down"][2] = torch.nan, torch.nan
    return laid_out(case, layout)


def run(
    device: str,
    case: dict[str, Any],
    plan: Plan,
    activation: str = "silu",
    layout: str = "concat",
    shared: tuple[Tensor, Tensor, int] | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """The kernels' answer by `plan`, on the CPU; shared: the weights of so many shared slices."""
    given = {name: None if value is None else value.to(device) for name, value in case.items()}
    x, experts, weights = (given.pop(name) for name in ("x", "experts", "weights"))
    w = kernels.Weights.of(**given, **attributes(activation, layout))
    if shared is not None:
        w = w._replace(shared_gate_up=shared[0].to(device), shared_down=shared[1].to(device), n_shared=shared[2])
    return kernels.run(x, experts, weights, w, plan, None if extra is None else extra.to(device)).cpu()


def verdict(
    actual: Tensor, case: dict[str, Any], activation: str = "silu", layout: str = "concat", added: Any = None
) -> Agreement:
    """Agreement with the rule in float64, by the budget that the rule in the same dtype sets, for all tokens at once.

    added: what a function of the case gives to the answer beside the routed experts.
    The budget is `widened` for what differs from the CPU that eager ran on.
    """
    results = []
    for given in (case, exact(case)):
        answer = rule(**given, **attributes(activation, layout))
        results.append(answer if added is None else answer + added(given))
    return within_budget(actual, eager=results[0], exact=results[1], factor=widened(actual.dtype))


def widened(dtype: torch.dtype) -> float:
    """Budget factor, for what differs from the CPU that eager ran on.

    Triton's interpreter cuts bfloat16 off where a GPU rounds; and a GPU adds float32 one after another where the CPU
    adds in sixteen lanes: 1.2 times the usual budget was seen.
    """
    if dtype == torch.bfloat16:
        return 6.0 if INTERPRETED else 2.0
    return 4.0 if dtype == torch.float32 and not INTERPRETED else 2.0


def check(
    device: str, case: dict[str, Any], plan: Plan, activation: str = "silu", layout: str = "concat", **options: Any
) -> Tensor:
    """Run and judge; returns the answer, whose scale is that at which a budget means something."""
    actual = run(device, case, plan, activation, layout, **options)
    found = verdict(actual, case, activation, layout)
    assert found.ok, f"{plan}: {found}"
    return actual
