"""The mixture-of-experts layer against eq. (9) written token by token, and what must not change it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_model.config import ModelConfig
from dsmoe_model.mlp import MLP, activation
from dsmoe_model.moe import MoE
from dsmoe_model.presets import PRESETS
from dsmoe_model.router import Routing

BASE = replace(
    PRESETS["deepseek-moe-tiny"],
    hidden_size=24,
    n_routed_experts=7,
    num_experts_per_tok=3,
    n_shared_experts=2,
    moe_intermediate_size=13,
    routed_scaling_factor=4.0,  # brings the routed part to order 1
)


def layer(config: ModelConfig = BASE, dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return moe.to(dtype).requires_grad_(False)


def token_by_token(moe: MoE, x_TH: Tensor, routing: Routing) -> Tensor:
    """Eq. (9) for a float64 layer: every token through its own experts, the shared ones by halves."""
    rows = []
    for x, weights, experts in zip(x_TH, routing.weights_TK, routing.experts_TK, strict=True):
        row = torch.zeros_like(x)
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ x).chunk(2)
            row += weight * (moe.experts.down_proj[expert] @ activation(gate, up, moe.experts.config))
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            for half in (slice(0, 13), slice(13, 26)):  # two experts of width 13: one feed-forward of width 26
                gate, up = shared.gate_proj.weight[half] @ x, shared.up_proj.weight[half] @ x
                row += shared.down_proj.weight[:, half] @ activation(gate, up, moe.experts.config)
        rows.append(row)
    return torch.stack(rows)


def row_error(actual: Tensor, exact: Tensor) -> float:
    """The worst row's relative error; the exact rows must be of order 1 for it to mean anything."""
    assert 0.1 < exact.square().mean().sqrt() < 10
    return float(((actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("act", ["silu", "silu_clamped", "swiglu_oai"])
@pytest.mark.parametrize("shared", [0, 2])
def test_layer_is_equation_9(act: str, shared: int) -> None:
    moe = layer(replace(BASE, hidden_act=act, n_shared_experts=shared, swiglu_limit=0.7))
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    y, routing = moe(x)
    assert row_error(y.reshape(15, 24), token_by_token(moe, x.reshape(15, 24), routing)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float64_given_the_routing(dtype: torch.dtype) -> None:
    moe = layer(dtype=dtype)
    x = torch.randn(1, 60, 24).to(dtype)
    y, routing = moe(x)
    exact, _ = deepcopy(moe).double()(x.double(), None, routing.experts_TK)
    assert y.dtype == dtype
    assert row_error(y[0], exact[0]) < max(2 * torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("shape", [(1, 0, 24), (0, 4, 24), (1, 1, 24), (2, 3, 24)])
def test_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    y, routing = layer()(torch.randn(shape, dtype=torch.float64))
    assert y.shape == shape
    assert routing.experts_TK.shape == (shape[0] * shape[1], 3)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 7), (7, 1)])
def test_one_expert_and_all_experts(experts: int, top_k: int) -> None:
    moe = layer(replace(BASE, n_routed_experts=experts, num_experts_per_tok=top_k))
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    y, routing = moe(x)
    assert row_error(y[0], token_by_token(moe, x[0], routing)) < 1e-14


def test_expert_numbering_is_immaterial() -> None:
    moe, turned = layer(), layer()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    for parameter in (turned.router.weight, turned.experts.gate_up_proj, turned.experts.down_proj):
        parameter.copy_(parameter[order])
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    assert row_error(turned(x)[0][0], moe(x)[0][0]) < 1e-14


def test_tokens_do_not_see_each_other() -> None:
    """A row of NaN, all tokens on one expert, other neighbours: the row's bits stay."""
    moe = layer(dtype=torch.float32)
    x = torch.randn(1, 8, 24)
    y, _ = moe(x)
    x[0, 3] = float("nan")
    spoilt, _ = moe(x)
    others = [row for row in range(8) if row != 3]
    assert spoilt[0, 3].isnan().all()
    assert row_error(spoilt[0, others], y[0, others].double()) < 1e-6
    crowded, _ = moe(x[:, :1].expand(1, 50, 24))
    assert row_error(crowded[0], y[0, :1].double().expand(50, 24)) < 1e-6
    assert torch.equal(moe(x)[0][0, others], spoilt[0, others])


def test_ids_out_of_range_are_skipped_slots() -> None:
    moe = layer()
    x = torch.randn(6, 24, dtype=torch.float64)
    weights, ids, _ = moe.router(x)
    weights_dropped, ids_dropped = weights.clone(), ids.clone()
    weights_dropped[:, 1], ids_dropped[:, 1] = 0.0, 0
    ids[:3, 1], ids[3:, 1] = -1, 7
    assert row_error(moe.experts(x, weights, ids), moe.experts(x, weights_dropped, ids_dropped)) < 1e-14


def test_gradients_reach_every_parameter_and_are_right() -> None:
    moe = layer().requires_grad_(True)
    x = torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True)
    experts = moe(x)[1].experts_TK
    parameters = (x, *moe.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: moe(x, None, experts)[0], parameters, fast_mode=True, nondet_tol=0, atol=1e-8, rtol=1e-6
    )
    moe(x)[0].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in moe.parameters())


def test_shared_experts_alone_are_dense_x16() -> None:
    moe = layer(replace(BASE, n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=16))
    assert moe.router is None
    assert isinstance(moe.shared_experts, MLP)
    assert moe.shared_experts.gate_proj.weight.shape == (16 * 13, 24)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    y, routing = moe(x)
    assert routing is None
    assert torch.equal(y, moe.shared_experts(x.reshape(6, 24)).reshape(2, 3, 24))
