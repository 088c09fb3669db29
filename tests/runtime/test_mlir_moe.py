"""dsmoe::moe through MLIR against the oracle's layer in float64, with its own choice of experts, for every gate."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_mlir")

from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from dsmoe_runtime.mlir.moe import moe
from tests.runtime.op_cases import GATES, layer_of, moe_arguments, normal, small_config, weight

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
COMPILED = {name: gate for name, gate in GATES.items() if gate.get("router_dtype") != "activation"}


def check(config, tokens, dtype):
    layer = layer_of(config, dtype).requires_grad_(False)
    exact_layer = layer_of(config, dtype).requires_grad_(False).double()
    x = normal(tokens, config.hidden_size, seed=7, dtype=dtype)
    y, ids = moe(x, *moe_arguments(layer))
    eager, eager_ids = torch.ops.dsmoe.moe(x, *moe_arguments(layer))
    same = (ids == eager_ids).all(dim=1)
    assert tokens == 0 or same.float().mean() > 0.98
    if tokens:
        exact, _ = exact_layer(x.double()[None], experts_TK=eager_ids)
        assert_within_budget(y[same], eager=eager[same], exact=exact[0][same])
    assert y.shape == x.shape
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COMPILED)
def test_every_gate(name, dtype):
    check(small_config(**COMPILED[name]), 50, dtype)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_tokens(tokens):
    check(small_config(), tokens, torch.bfloat16)


def test_without_shared_experts():
    check(small_config(n_shared_experts=0), 20, torch.float32)


def test_shared_experts_with_a_gate():
    layer = layer_of(small_config()).requires_grad_(False)
    x, gate = normal(9, 42, seed=1), weight(1, 42, seed=2)
    arguments = (*moe_arguments(layer)[:-1], gate)
    exact = torch.ops.dsmoe.moe(x.double(), *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))[0]
    assert_within_budget(moe(x, *arguments)[0], eager=torch.ops.dsmoe.moe(x, *arguments)[0], exact=exact)


def test_a_gate_in_the_activations_dtype_is_refused():
    layer = layer_of(small_config(router_dtype="activation"), torch.bfloat16)
    with pytest.raises(TargetError, match="computes in float32"):
        moe(normal(3, 42, seed=1, dtype=torch.bfloat16), *moe_arguments(layer))
