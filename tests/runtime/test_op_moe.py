"""dsmoe::moe against the oracle's layer: every gate, activation, layout and dtype, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dsmoe_model.errors import ConfigError
from dsmoe_runtime.agreement import assert_within_budget, routing_agreement, row_error
from dsmoe_runtime.errors import InputError
from tests.runtime.op_cases import ACTIVATIONS, GATES, LAYOUTS, layer_of, moe_arguments, normal, small_config, weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def check(config, dtype, layout="concat", tokens=21):
    """The operator on the oracle's weights: same routing to the bit, values within twice the oracle's own error."""
    layer = layer_of(config, dtype)
    x = normal(tokens, config.hidden_size, seed=77, dtype=dtype)
    y, experts = torch.ops.dsmoe.moe(x, *moe_arguments(layer, layout))
    eager, routing = layer(x[None])
    assert torch.equal(experts, routing.experts_TK)
    assert y.dtype == dtype
    # In float64 the weights too are exact: only the choice of experts is taken over.
    exact, _ = layer.double()(x.double()[None], experts_TK=experts)
    if config.router_dtype == "activation":  # v1's rounded gate is part of the rule, not an error of it
        exact = layer.experts(x.double(), routing.weights_TK.double(), experts) + layer.shared_experts(x.double())
    assert 0.1 < exact.square().mean().sqrt() < 20
    assert_within_budget(y, eager=eager[0], exact=exact.view_as(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate(gate, dtype):
    """Row 16."""
    check(small_config(**GATES[gate]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation_and_layout(activation, layout, dtype):
    check(small_config(hidden_act=activation), dtype, layout)


@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize("shared", [0, 1])
def test_any_number_of_tokens(tokens, shared):
    check(small_config(n_shared_experts=shared), torch.bfloat16, tokens=tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    """Row 1."""
    layer = layer_of(small_config(), dtype)
    y, experts = torch.ops.dsmoe.moe(torch.zeros(0, 42, dtype=dtype), *moe_arguments(layer))
    assert (y.shape, y.dtype) == ((0, 42), dtype)
    assert (experts.shape, experts.dtype) == ((0, 3), torch.int64)


def test_router_bias_and_shared_gate():
    """What the oracle has not: gpt-oss's bias on the logits, Qwen2-MoE's sigmoid on the shared answer."""
    config = small_config(scoring_func="softmax_after_topk")
    layer = layer_of(config).double()
    x = normal(9, 42, seed=3, dtype=torch.float64)
    arguments = list(moe_arguments(layer))
    arguments[1] = normal(12, seed=4, dtype=torch.float64)
    arguments[-1] = weight(1, 42, seed=5, dtype=torch.float64)
    y, experts = torch.ops.dsmoe.moe(x, *arguments)
    logits = F.linear(x, layer.router.weight, arguments[1])
    top = logits.topk(3)
    assert torch.equal(experts, top.indices)
    expected = layer.experts(x, top.values.softmax(-1), experts)
    expected = expected + torch.sigmoid(x @ arguments[-1].T) * layer.shared_experts(x)
    assert row_error(y, expected).max() < 16 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_keeps_to_itself(bad):
    """Row 6: its row is NaN, its ids are distinct and in range; other rows keep their experts and, where these serve as
    many tokens as before, their bits."""
    layer = layer_of(small_config())
    x = normal(14, 42, seed=6)
    arguments = moe_arguments(layer)
    clean, clean_experts = torch.ops.dsmoe.moe(x, *arguments)
    x[5] = bad
    y, experts = torch.ops.dsmoe.moe(x, *arguments)
    assert y[5].isnan().all()
    assert len(set(experts[5].tolist())) == 3
    assert 0 <= experts[5].min() <= experts[5].max() < 12
    others = torch.arange(14) != 5
    assert torch.equal(experts[others], clean_experts[others])
    assert_within_budget(y[others], eager=clean[others], exact=layer.double()(x[others].double()[None])[0][0])
    moved = set(experts[5].tolist()) ^ set(clean_experts[5].tolist())
    same = [t for t in range(14) if t != 5 and not moved & set(experts[t].tolist())]
    assert torch.equal(y[same], clean[same])


def test_float16_router_is_float32():
    """Row 14: logits beyond 65,504 tell the experts apart; in float16 they would all be infinite."""
    layer = layer_of(small_config(n_shared_experts=0), torch.float16)
    arguments = list(moe_arguments(layer))
    arguments[0] = torch.full((12, 42), 60000.0, dtype=torch.float16)
    arguments[0][7] = 65504.0
    x = normal(3, 42, seed=1).abs().half()
    y, experts = torch.ops.dsmoe.moe(x, *arguments)
    assert experts[:, 0].tolist() == [7, 7, 7]
    assert y.isfinite().all()


def test_same_tokens_in_other_batches():
    """Row 22: alone or with others the routing agrees, flips being excused by rounding only, and so do the values."""
    config = small_config()
    layer = layer_of(config, torch.bfloat16).requires_grad_(False)
    arguments = moe_arguments(layer)
    x = normal(48, 42, seed=8, dtype=torch.bfloat16)
    _, experts = torch.ops.dsmoe.moe(x, *arguments)
    alone = [torch.ops.dsmoe.moe(row[None], *arguments) for row in x]
    y_alone, experts_alone = (torch.cat(parts) for parts in zip(*alone, strict=True))
    eager, routing = layer(x[None])
    layer.double()
    exact_scores = layer.router(x.double()).scores_TE
    verdict = routing_agreement(experts_alone, experts, exact_TE=exact_scores, eager_TE=routing.scores_TE)
    assert verdict.ok, str(verdict)
    exact, _ = layer(x.double()[None], experts_TK=experts_alone)
    exact_eager, _ = layer(x.double()[None], experts_TK=routing.experts_TK)
    assert_within_budget(y_alone, eager=eager[0], exact=exact[0], exact_eager=exact_eager[0])


def test_permuted_experts_with_their_router_rows():
    """Metamorphic: another numbering of the experts is the same layer."""
    config = small_config(n_shared_experts=0)
    layer = layer_of(config)
    x = normal(20, 42, seed=9)
    y, experts = torch.ops.dsmoe.moe(x, *moe_arguments(layer))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for parameter in layer.parameters():
        parameter.data = parameter.data[order]
    renamed, renamed_experts = torch.ops.dsmoe.moe(x, *moe_arguments(layer))
    assert torch.equal(order[renamed_experts], experts)
    assert_within_budget(renamed, eager=y, exact=layer.double()(x.double()[None])[0][0])


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_the_oracles(gate):
    """float32 against autograd of the oracle, with the oracle's own error as the budget."""
    config = small_config(**GATES[gate])
    layer = layer_of(config).train()
    x = normal(16, 42, seed=10)
    direction = normal(16, 42, seed=11)

    def gradients(run, dtype):
        inputs = x.to(dtype, copy=True).requires_grad_()
        layer.zero_grad()
        layer.to(dtype)
        (run(inputs) * direction.to(dtype)).sum().backward()
        return {"x": inputs.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}

    def oracle(inputs):
        return layer(inputs[None])[0][0]

    def operator(inputs):
        return torch.ops.dsmoe.moe(inputs, *moe_arguments(layer))[0]

    ours, eager = gradients(operator, torch.float32), gradients(oracle, torch.float32)
    exact = gradients(oracle, torch.float64)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert exact[name].abs().max() > 0
        # A row is a token, an expert's whole matrix, or the matrix: single rows of a weight's gradient may cancel.
        rows = exact[name].shape[0] if name == "x" or exact[name].dim() == 3 else 1
        of_ours, of_eager, of_exact = (grads[name].reshape(rows, -1) for grads in (ours, eager, exact))
        assert_within_budget(of_ours, eager=of_eager, exact=of_exact)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(11, 42), InputError, r"router_weight is \(11, 42\); x and gate_up want \(12, 42\)"),
        (0, torch.zeros(12, 42, device="meta"), InputError, "router_weight is on meta, x on cpu"),
        (1, torch.zeros(11), InputError, r"router_bias is \(11,\); gate_up has 12 experts"),
        (2, torch.zeros(13), InputError, r"selection_bias is \(13,\); gate_up has 12 experts"),
        (3, 13, ConfigError, "top_k is 13 with 12 experts"),
        (5, 5, ConfigError, "n_group is 5 with 12 experts"),
        (6, 2, ConfigError, "topk_group is 2 with n_group 1"),
        (11, "double", ConfigError, "router_dtype is 'double'; it must be one of float32, activation"),
        (12, torch.zeros(12, 54, 42).half(), InputError, "gate_up is torch.float16 on cpu, x is torch.float32 on cpu"),
        (20, None, InputError, "go together"),
        (21, torch.zeros(42, 53), InputError, r"shared_gate_up is \(108, 42\) and shared_down \(42, 53\)"),
        (21, torch.zeros(42, 54).bfloat16(), InputError, "shared_down is torch.bfloat16 on cpu, x is torch.float32"),
        (22, torch.zeros(2, 42), InputError, r"shared_gate is \(2, 42\).*\(1, 42\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(index, value, error, message):
    """Rows 17 and 18; also on the way to the kernels of a GPU, which would read beyond what is too small."""
    arguments = list(moe_arguments(layer_of(small_config())))
    arguments[index] = value
    with pytest.raises(error, match=message) as caught:
        torch.ops.dsmoe.moe(torch.zeros(4, 42), *arguments)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(error, match=message):
        torch.ops.dsmoe.moe.default._op_dk(torch._C.DispatchKey.CUDA, torch.zeros(4, 42), *arguments)
