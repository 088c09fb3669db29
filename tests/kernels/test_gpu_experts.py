"""The experts on a GPU: every regime and dtype, tiles as they are used, real routing, any memory, the same bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dsmoe_runtime.kernels.plan import Plan, Tile
from tests.kernels.cases import ON_GPU, case_of, check, run, verdict
from tests.runtime.op_cases import attributes

TOKENS = (0, 1, 7, 63, 300)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT = Plan("sorted", Tile(32, 32, 32, 4, 2), Tile(32, 64, 32, 4, 2))
REGIMES = {
    "pairs": Plan("pairs", Tile(1, 4, 256, 4, 1), Tile(1, 4, 256, 4, 4)),
    "scan": Plan("scan", Tile(16, 32, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "sorted": Plan("sorted", Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)),
}
WIDE = Plan("sorted", Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))
CUTS = {
    "16 rows": Plan("sorted", Tile(16, 64, 64, 4, 4), Tile(16, 128, 64, 4, 4)),
    "128 rows, half height": replace(WIDE, half=True),
    "weights asked for ahead, hidden by pointers": replace(REGIMES["sorted"], ahead=256, tma_rows=False),
    "programs that walk": replace(REGIMES["sorted"], resident=1, group=2),
}
# One round of what the interpreter takes in full: (layout, activation, biases) by regime and dtype
ROUND = [
    ("concat", "silu", False), ("interleaved", "swiglu_oai", True), ("concat_transposed", "silu_clamped", False),
    ("interleaved_transposed", "silu", True), ("concat", "swiglu_oai", True), ("interleaved", "silu", False),
    ("concat", "silu_clamped", True), ("concat_transposed", "silu", False),
    ("interleaved_transposed", "silu_clamped", True),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("poison")


def plan_of(regime: str, dtype: torch.dtype) -> Plan:
    return FLOAT if regime == "sorted" and dtype == torch.float32 else REGIMES[regime]


@ON_GPU
@pytest.mark.parametrize(
    ("regime", "dtype", "layout", "activation", "bias"),
    [(*key, *rest) for key, rest in zip(itertools.product(REGIMES, DTYPES), ROUND, strict=True)],
)
def test_every_regime_and_dtype(device, regime, dtype, layout, activation, bias):
    for tokens in TOKENS[: 4 if regime == "scan" else 5]:
        case = case_of(tokens, "aligned", layout=layout, bias=bias, dtype=dtype)
        check(device, case, plan_of(regime, dtype), activation, layout)


@ON_GPU
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("activation", "layout"), [("gelu", "concat"), ("gelu_tanh", "concat"), ("relu2", "ungated"), ("gelu", "ungated")]
)
def test_activations_that_the_oracle_has_not(device, activation, layout, regime):
    for dtype in DTYPES:
        case = case_of(7, "aligned", layout=layout, bias=dtype != torch.bfloat16, dtype=dtype)
        check(device, case, plan_of(regime, dtype), activation, layout)


@ON_GPU
@pytest.mark.parametrize("cut", CUTS)
def test_every_kind_of_tile(device, cut):
    for tokens in TOKENS:
        check(device, case_of(tokens, "aligned", dtype=torch.bfloat16), CUTS[cut])


@ON_GPU
@pytest.mark.parametrize("regime", REGIMES)
def test_rows_that_the_copy_engine_cannot_read(device, regime):
    case = case_of(63, "unaligned", bias=True, dtype=torch.bfloat16)
    check(device, case, REGIMES[regime])


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(device, dtype):
    """By the plans that are chosen, from decode to prefill; it runs kernels and not the rule."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dsmoe::experts", "CUDA")
    for tokens in TOKENS:
        case = case_of(tokens, "aligned", dtype=dtype)
        given = {name: None if value is None else value.to(device) for name, value in case.items()}
        found = verdict(torch.ops.dsmoe.experts(**given, **attributes()).cpu(), case)
        assert found.ok, f"{tokens}: {found}"


@ON_GPU
@pytest.mark.parametrize("regime", REGIMES)
def test_same_input_same_bits(device, regime):
    """100 runs, each into memory that the one before has used."""
    case = case_of(63, "aligned", dtype=torch.bfloat16)
    first = run(device, case, REGIMES[regime])
    assert all(torch.equal(run(device, case, REGIMES[regime]), first) for _ in range(100))


@ON_GPU
@pytest.mark.parametrize("plan", [REGIMES["sorted"], CUTS["128 rows, half height"]])
@pytest.mark.parametrize("routing", ["one expert", "skewed"])
def test_routing_that_is_not_even(device, routing, plan):
    """All tokens on one expert; and one expert in two chosen, the next in four, and so on, as Zipf has it."""
    case = case_of(300, "aligned", dtype=torch.bfloat16, skip=False)
    if routing == "one expert":
        case["experts"].fill_(7)
    else:
        share = (1 / torch.arange(1.0, 10)).expand(300, 9)
        case["experts"] = torch.multinomial(share, 4, generator=torch.Generator().manual_seed(3))
    check(device, case, plan)


@ON_GPU
def test_planted_faults_are_seen_here_too(device):
    case = case_of(300, "aligned", dtype=torch.bfloat16, skip=False)
    right = run(device, case, REGIMES["sorted"])
    assert verdict(right, case).ok
    dropped = case | {"experts": case["experts"].masked_fill(case["experts"] == 1, -1)}
    heavier = case | {"weights": case["weights"] * 1.02}
    swapped = case | {"gate_up": torch.cat(case["gate_up"].chunk(2, dim=1)[::-1], dim=1)}
    for wrong in (dropped, heavier, swapped):
        assert not verdict(run(device, wrong, REGIMES["sorted"]), case).ok
    assert not verdict(right.index_fill(0, torch.tensor([299]), torch.nan), case).ok
