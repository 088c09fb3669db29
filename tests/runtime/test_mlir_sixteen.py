"""The kernels with sixteen lanes, as AVX512 has them, on any processor with AVX2: LLVM makes two vectors of each.

What the lanes decide (tiles, panels, padding, blocks) is then run here; what only AVX512 has is LLVM's to know. With
blocks of 96 rows, a half of which is no whole number of steps of 32, the experts were wrong on every AVX512 processor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("torch_mlir")

from dsmoe_runtime.mlir import attention, experts, linear, moe, route
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from tests.runtime import test_mlir_attention, test_mlir_experts, test_mlir_linear, test_mlir_moe, test_mlir_route
from tests.runtime.op_cases import expert_case, small_config
from tests.runtime.test_mlir_experts import two_threads  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
SIXTEEN = replace(LEVELS["avx2"], name="sixteen lanes", lanes=16, tile_rows=12)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def sixteen_lanes(monkeypatch):
    for module in (attention, experts, linear, moe, route):
        monkeypatch.setattr(module, "best_level", lambda: SIXTEEN)


@pytest.mark.parametrize("tokens", [*range(1, 36), 63, 129, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_every_mixture_of_tiles(tokens, dtype):
    test_mlir_experts.check(expert_case(tokens, hidden=300, width=118, num_experts=1, top_k=1, dtype=dtype))


@pytest.mark.parametrize(
    ("hidden", "width", "num_experts", "top_k"), [(128, 853, 63, 7), (7, 5, 1, 1), (577, 96, 5, 5)]
)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "concat_transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_odd_sizes(hidden, width, num_experts, top_k, layout, dtype):
    sizes = {"hidden": hidden, "width": width, "num_experts": num_experts, "top_k": top_k}
    test_mlir_experts.check(expert_case(50, **sizes, dtype=dtype), layout=layout)


@pytest.mark.parametrize("tokens", [7, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_by_any_number_of_threads(tokens, dtype, two_threads):  # noqa: F811
    """Wide enough for two blocks and two threads: an item that writes beyond its block shows."""
    case = expert_case(tokens, hidden=300, width=400, dtype=dtype)
    torch.set_num_threads(1)
    expected = test_mlir_experts.check(case)
    torch.set_num_threads(2)
    for _ in range(5):
        assert torch.equal(test_mlir_experts.compiled(case), expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 17, 63, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(tokens, dtype):
    test_mlir_linear.check(*test_mlir_linear.case(tokens, 200, 300, dtype, bias=True))


@pytest.mark.parametrize("tokens", [1, 7, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_layers(tokens, dtype):
    test_mlir_moe.check(small_config(), tokens, dtype)


@pytest.mark.parametrize("queries", [1, 3, 16, 63, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(queries, dtype):
    test_mlir_attention.check(*test_mlir_attention.case(1, 4, 2, queries, queries, 64, 40, dtype), causal=True)


@pytest.mark.parametrize("name", test_mlir_route.GATES)
def test_routes(name):
    test_mlir_route.test_every_gate(name, 50, True)
