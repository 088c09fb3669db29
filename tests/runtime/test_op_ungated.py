"""A layer without gates, and one with the activations that the oracle has not: dsmoe::moe and what it is made of."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from dsmoe_runtime.agreement import assert_within_budget, row_error
from dsmoe_runtime.errors import InputError
from dsmoe_runtime.ops.moe import moe
from dsmoe_runtime.ops.moe_training import composed
from tests.runtime.op_cases import exact, expert_case, laid_out, normal, slot_by_slot, weight

EPS = torch.finfo(torch.float64).eps
GATE = (3, "softmax", 1, 1, "max", True, 1e-20, 1.0, "float32")
KINDS = [("ungated", "relu2"), ("ungated_transposed", "gelu"), ("concat", "gelu_tanh")]
FUNCTIONS = {
    "relu2": lambda x: F.relu(x) ** 2, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")
}  # fmt: skip


def layer(layout, activation, dtype=torch.float64, tokens=9, hidden=42, width=27):
    """A case of experts laid out "concat", and the operator's arguments after x, with shared experts and their gate."""
    case = expert_case(tokens, hidden=hidden, width=width, dtype=dtype, bias=True)
    given = laid_out(case, layout)
    rows = (1 if layout.startswith("ungated") else 2) * 17
    shared = (weight(s, t, seed=30 + s, dtype=dtype) for s, t in ((rows, hidden), (hidden, 17), (1, hidden)))
    router = weight(12, hidden, seed=20, dtype=dtype)
    routed = (given["gate_up"], given["down"], given["gate_up_bias"], given["down_bias"])
    return case, (router, None, None, *GATE, *routed, activation, 0.0, 0.0, layout, *shared)


def written_out(case, arguments, experts, layout, activation):
    """The layer for `experts`, slot by slot, in the case's dtype; weights that a token's experts get are exact."""
    x, (router, *_), (gate_up, down, gate) = case["x"], arguments, arguments[-3:]
    scores = F.linear(x.double(), router.double()).softmax(-1).gather(1, experts)
    weights = scores / scores.sum(-1, keepdim=True)
    y = slot_by_slot(
        **(case | {"experts": experts, "weights": weights.to(x.dtype)}), activation=activation, layout=layout
    )
    joint = F.linear(x, gate_up)
    function = FUNCTIONS[activation]
    hidden = function(joint) if layout.startswith("ungated") else function(joint[:, :17]) * joint[:, 17:]
    return y + F.linear(hidden, down) * F.linear(x, gate).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "activation"), KINDS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_layer_is_what_it_says(layout, activation, dtype, tokens):
    case, arguments = layer(layout, activation, dtype, tokens)
    y, experts = torch.ops.dsmoe.moe(case["x"], *arguments)
    eager = written_out(case, arguments, experts, layout, activation).to(dtype)
    doubled = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    truth = written_out(exact(case), doubled, experts, layout, activation)
    assert 0.1 < truth.square().mean().sqrt() < 10
    assert_within_budget(y, eager=eager, exact=truth)


@pytest.mark.parametrize(("layout", "activation"), KINDS)
def test_gradients(layout, activation):
    case, arguments = layer(layout, activation, tokens=3, hidden=6, width=3)
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]

    def function(x, *tensors):
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return torch.ops.dsmoe.moe(x, *given)[0]

    tensors = (case["x"], *(arguments[i] for i in places))
    assert gradcheck(function, tuple(t.detach().requires_grad_() for t in tensors), fast_mode=True)


@pytest.mark.parametrize("name", ["moe", "moe_training"])
def test_opcheck(name):
    case, arguments = layer("ungated", "relu2", torch.float32, 5)
    inputs = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(getattr(torch.ops.dsmoe, name).default, (case["x"].requires_grad_(), *inputs))


@pytest.mark.parametrize(("layout", "activation"), KINDS)
def test_a_layer_composed_of_operators_is_the_layer(layout, activation):
    """As it runs where kernels are; its shared joint gives the gradients that the layer's own gives."""
    case, arguments = layer(layout, activation)
    x, router, gate, routed = case["x"], arguments[:3], arguments[3:11], arguments[12:20]
    y, experts = moe(x, *arguments)
    actual, chosen, joint, *_, shared_joint = composed(x, *router, gate, "float32", routed, arguments[20:])
    assert torch.equal(chosen, experts)
    assert row_error(actual, y).max() < 16 * EPS
    assert shared_joint.shape == (9, len(arguments[20]))
    assert joint.shape == (0, routed[0].shape[2 if layout.endswith("transposed") else 1])
    grad = normal(9, 42, seed=4, dtype=torch.float64)
    inputs = (grad, x, experts, *router[:2], gate[1], *gate[5:], "float32", *routed, *arguments[20:], True)
    again = torch.ops.dsmoe.moe_backward(*inputs)
    kept = torch.ops.dsmoe.moe_backward(*inputs, shared_joint=shared_joint)
    for one, other in zip(kept, again, strict=True):
        assert one.shape == other.shape
        assert not one.numel() or (one - other).norm() <= 64 * EPS * other.norm()


def test_shared_experts_with_a_gate_beside_routed_ones_without_are_refused():
    case, arguments = layer("ungated", "relu2")
    given = (*arguments[:20], normal(34, 42, seed=1, dtype=torch.float64), *arguments[21:])
    message = r"shared_gate_up is \(34, 42\) and shared_down \(42, 17\); x .* layout 'ungated' want \[S, 42\]"
    with pytest.raises(InputError, match=message):
        torch.ops.dsmoe.moe(case["x"], *given)
