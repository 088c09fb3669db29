"""dsmoe::route, dsmoe::experts and dsmoe::moe for torch.onnx.export: routing and shared experts in standard operators.

    logits -> scores -> (+ bias, groups) -> TopK -> weights      in float32, whatever the activations are
    DsMoE(x, experts, weights, ...) + shared(x)

ONNX Runtime's CPU multiplies no bfloat16, so by default shared experts are computed in float32 behind casts of x and of
their weights; `translations(native=True)` multiplies in the activations' dtype, for CUDA. Weights stay as torch has
them, [N, K], behind Gemm's transB: nothing is left to fold into a transposed copy.

No tokens at all: ONNX Runtime before 1.32 gets sums over axis -1 wrong, so axes are counted from the front; before 1.31
its CPU's TopK ends the process.

T tokens, E experts, K experts a token, G groups of M experts, S shared width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dsmoe_runtime.ops  # noqa: F401  (registers the operators)
from dsmoe_compiler.targets.onnx.layer import Gate, register_layer, why_not
from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, VERSION, register_schema
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops.activation import has_gate
from dsmoe_runtime.ops.route import check_routing

Value = Any  # an onnx_ir.Value; those that stand for torch's tensors know their dtype and shape
FLOAT, INT64, BOOL, FLOAT16, DOUBLE, BFLOAT16 = 1, 7, 9, 10, 11, 16  # onnx.TensorProto's numbers


def translations(*, native: bool = False, layers: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` takes.

    Args:
        native: multiply the shared experts in the activations' dtype, not in float32.
        layers: dsmoe::moe as one DsMoELayer node (see `layer`), where its kernels can do all of it.
    """
    # Functions without annotations, so that the exporter hands arguments on as they are.
    return {
        torch.ops.dsmoe.route.default: lambda *inputs: route(*inputs),
        torch.ops.dsmoe.experts.default: lambda *inputs: experts(*inputs),
        torch.ops.dsmoe.moe.default: lambda *inputs: (one_node if layers else moe)(*inputs, native=native),
    }


def route(
    logits: Value,
    bias: Value | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[Value, Value]:
    """`dsmoe_runtime.ops.route.route`: weights [T, K] in float32 and experts [T, K].

    In float32. Logits in half precision (v1's gate) are rounded wherever torch rounds what it makes of them.
    """
    op, dtype = _opset(), int(logits.dtype)
    if dtype == DOUBLE:
        raise TargetError(
            "the logits of a gate are float64, the op takes weights in float32; cast the model to float32"
        )
    num_experts = logits.shape[1]
    check_routing(num_experts, top_k, score, n_group, topk_group, group_score)
    scores = rounded(_scores(floated(logits), score), dtype)
    selection, joint = scores, dtype  # the dtype in which torch selects
    if bias is not None:
        joint = dtype if int(bias.dtype) == dtype else FLOAT
        selection = rounded(op.Add(scores, floated(bias)), joint)
    # As the largest of all, NaN reaches the weights of its token; TopK itself promises nothing about it.
    selection = op.Where(op.IsNaN(selection), float("inf"), selection)
    if topk_group < n_group:
        grouped = op.Reshape(selection, _ints(-1, n_group, num_experts // n_group))
        best, _ = op.TopK(grouped, _ints(1 if group_score == "max" else 2))
        groups = rounded(op.ReduceSum(best, _ints(2), keepdims=0), joint)
        _, kept = op.TopK(groups, _ints(topk_group))
        same = op.Equal(op.Unsqueeze(kept, _ints(-1)), _ints(*range(n_group)))
        is_kept = op.Cast(op.ReduceMax(op.Cast(same, to=FLOAT), _ints(1), keepdims=0), to=BOOL)
        grouped = op.Where(op.Unsqueeze(is_kept, _ints(-1)), grouped, float("-inf"))
        selection = op.Reshape(grouped, _ints(-1, num_experts))
    _, chosen = op.TopK(selection, _ints(top_k))  # of equals the lowest index first
    weights = op.GatherElements(scores, chosen, axis=1)
    if score == "softmax_after_topk":
        weights = rounded(op.Softmax(weights, axis=1), dtype)
    if renormalize:
        total = rounded(op.ReduceSum(weights, _ints(1), keepdims=1), dtype)
        weights = rounded(op.Div(weights, rounded(op.Add(total, eps), dtype)), dtype)
    if scale != 1.0:
        weights = rounded(op.Mul(weights, scale), dtype)
    return weights, chosen


def experts(
    x: Value,
    experts: Value,
    weights: Value,
    gate_up: Value,
    down: Value,
    gate_up_bias: Value | None,
    down_bias: Value | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
) -> Value:
    """`dsmoe_runtime.ops.experts.experts`: one DsMoE node; of a single bias the other becomes zeros."""
    from onnxscript import values

    op = _opset()
    register_schema()
    if int(x.dtype) not in (FLOAT, FLOAT16, BFLOAT16):
        raise TargetError(f"x of an experts layer is {x.dtype}; {OP_TYPE} takes float32, float16 and bfloat16")
    if gate_up_bias is None and down_bias is not None:
        columns = gate_up.shape[2 if layout.endswith("_transposed") else 1]
        gate_up_bias = op.CastLike(op.ConstantOfShape(_ints(gate_up.shape[0], columns)), x)
    elif gate_up_bias is not None and down_bias is None:
        down_bias = op.CastLike(op.ConstantOfShape(_ints(gate_up.shape[0], x.shape[1])), x)
    biases = () if gate_up_bias is None else (gate_up_bias, down_bias)
    inputs = (x, experts, weights, gate_up, down, *biases)
    own = values.Opset(DOMAIN, VERSION)
    return own.DsMoE(*inputs, activation=activation, alpha=float(alpha), limit=float(limit), layout=layout)


def moe(
    x: Value,
    router_weight: Value,
    router_bias: Value | None,
    selection_bias: Value | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    renormalize: bool,
    eps: float,
    scale: float,
    router_dtype: str,
    gate_up: Value,
    down: Value,
    gate_up_bias: Value | None,
    down_bias: Value | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    shared_gate_up: Value | None,
    shared_down: Value | None,
    shared_gate: Value | None,
    *,
    native: bool = False,
) -> tuple[Value, Value]:
    """`dsmoe_runtime.ops.moe.moe`: y [T, H] and the experts [T, K] that made it."""
    import onnx_ir as ir

    op = _opset()
    wide, wide_bias = floated(router_weight), None if router_bias is None else floated(router_bias)
    logits = op.Gemm(floated(x), wide, wide_bias, transB=1)
    if router_dtype == "activation":
        logits = op.Cast(logits, to=int(x.dtype))
    logits.dtype = x.dtype if router_dtype == "activation" else ir.DataType.FLOAT
    logits.shape = ir.Shape([x.shape[0], router_weight.shape[0]])
    weights, chosen = route(
        logits, selection_bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale
    )
    y = experts(x, chosen, weights, gate_up, down, gate_up_bias, down_bias, activation, alpha, limit, layout)
    if shared_gate_up is not None and shared_down is not None:
        dtype = int(x.dtype) if native else FLOAT
        answer = _shared(x, shared_gate_up, shared_down, shared_gate, activation, alpha, limit, layout, dtype)
        y = op.CastLike(op.Add(op.Cast(y, to=FLOAT), answer), x)
    return y, chosen


def one_node(x: Value, *others: Any, native: bool) -> tuple[Value, Value]:
    """`moe` as one DsMoELayer node, or as `moe` spells it where that is refused."""
    from onnxscript import values

    router, gate, routed, shared = others[:3], others[3:12], others[12:20], others[20:]
    gate_up, down, *biases, activation, alpha, limit, layout = routed
    shared_gate_up, shared_down, shared_gate = shared
    width = down.shape[1 if layout.endswith("_transposed") else 2]
    one_bias = sum(bias is None for bias in biases) == 1
    if one_bias or why_not(gate_up.shape[0], gate[0], width, layout, shared_down, shared_gate) is not None:
        return moe(x, *others, native=native)
    register_layer()
    inputs = [x, *router, gate_up, down, *biases, shared_gate_up, shared_down]
    while inputs[-1] is None:
        inputs.pop()
    said = Gate(*gate)._replace(renormalize=int(gate[Gate._fields.index("renormalize")]))
    own = values.Opset(DOMAIN, VERSION)
    return own.DsMoELayer(
        *inputs, **said._asdict(), activation=activation, alpha=float(alpha), limit=float(limit), layout=layout
    )


def _scores(logits: Value, score: str) -> Value:
    op = _opset()
    if score == "softmax":
        return op.Softmax(logits, axis=1)
    if score == "sigmoid":  # not Sigmoid: ONNX Runtime's CPU rounds it to a multiple of 2^-24 or so, and to 0 below -18
        return op.Reciprocal(op.Add(op.Exp(op.Neg(logits)), 1.0))
    if score == "sqrtsoftplus":
        # max(l, 0) + log(1 + u), u = exp(-|l|). Softplus loses a small u in its sum; of that u, log sees (1 + u) - 1.
        u = op.Exp(op.Neg(op.Abs(logits)))
        one_u = op.Add(u, 1.0)
        seen = op.Sub(one_u, 1.0)
        log_1u = op.Where(op.Equal(seen, 0.0), u, op.Mul(op.Log(one_u), op.Div(u, seen)))
        return op.Sqrt(op.Add(op.Relu(logits), log_1u))
    return logits


def _shared(
    x: Value,
    gate_up: Value,
    down: Value,
    shared_gate: Value | None,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
    dtype: int,
) -> Value:
    """The shared experts' answer in float32, with products in `dtype` and all between them in float32."""
    op = _opset()
    x = _cast(x, dtype)
    joint = op.Gemm(x, _cast(gate_up, dtype), transB=1)
    joint = joint if dtype == FLOAT else op.Cast(joint, to=FLOAT)
    gate, up = op.Split(joint, axis=1, num_outputs=2) if has_gate(layout) else (joint, None)
    hidden = _activate(gate, up, activation, alpha, limit)
    hidden = hidden if dtype == FLOAT else op.Cast(hidden, to=dtype)
    answer = op.Cast(op.Gemm(hidden, _cast(down, dtype), transB=1), to=FLOAT)
    if shared_gate is None:
        return answer
    return op.Mul(answer, op.Sigmoid(op.Cast(op.Gemm(x, _cast(shared_gate, dtype), transB=1), to=FLOAT)))


def _activate(gate: Value, up: Value | None, activation: str, alpha: float, limit: float) -> Value:
    """`dsmoe_runtime.ops.activation.activate` in float32."""
    op = _opset()
    if activation in ("silu_clamped", "swiglu_oai"):
        gate, up = op.Min(gate, limit), op.Max(op.Min(up, limit), -limit)
        if activation == "swiglu_oai":
            return op.Mul(op.Add(up, 1.0), op.Mul(gate, op.Sigmoid(op.Mul(gate, alpha))))
    if activation == "gelu":
        hidden = op.Gelu(gate)
    elif activation == "gelu_tanh":
        hidden = op.Gelu(gate, approximate="tanh")
    elif activation in ("relu", "relu2"):
        hidden = op.Relu(gate)
        hidden = op.Mul(hidden, hidden) if activation == "relu2" else hidden
    else:
        hidden = op.Mul(gate, op.Sigmoid(gate))
    return hidden if up is None else op.Mul(hidden, up)


def rounded(value: Value, dtype: int) -> Value:
    """`value`, float32, as if it had been stored in `dtype`."""
    op = _opset()
    return value if dtype == FLOAT else op.Cast(op.Cast(value, to=dtype), to=FLOAT)


def floated(value: Value) -> Value:
    return _cast(value, FLOAT)


def _cast(value: Value, dtype: int) -> Value:
    """`value`, whose type is known, in `dtype`."""
    return value if int(value.dtype) == dtype else _opset().Cast(value, to=dtype)


def _ints(*values: int) -> Value:
    import onnx_ir as ir

    return _opset().Constant(value=ir.tensor(values, dtype=ir.DataType.INT64))


def _opset() -> Any:
    from onnxscript import opset23

    return opset23


TRANSLATIONS = translations()
