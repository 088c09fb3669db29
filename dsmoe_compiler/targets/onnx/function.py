"""DsMoE's body in standard ONNX operators: what runtimes without our library run, and the op's executable meaning.

Scan hands each expert its slices of the weights, without a copy in ONNX Runtime, and `If` reads them only where a token
chose that expert. An expert's answers fill a block of C rows that a row of zeros closes, and each slot then fetches its
answer from a block. No sum is scattered, so the same input gives the same bits with any number of threads.

C = min(largest share, max(16, 2 N / E)) keeps all blocks together within about twice the N slots; experts with a larger
share take the rest in further rounds. Everything is float32 between the casts of what an expert reads and that of y.

T tokens, K experts a token, N = T K slots, E experts, B = E + 1 buckets, M slots of one expert, R = E (C + 1) rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, Attributes, check_nodes
from dsmoe_runtime.errors import TargetError

if TYPE_CHECKING:
    import onnx

LEAST_OPSET = 21  # below, operators that the body names (Gelu, Split, Cast) are others or know fewer types
OVERLOAD_IR = 10  # the first version of the file format with overloads
LEAST_ONNXRUNTIME = "1.23"  # the oldest that the body was run in
OVERLOADS_SINCE = "1.27"  # ONNX Runtime before it takes one function for all nodes, without a word

BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <activation: string = "silu", alpha: float = 1.0, limit: float = 0.0, layout: string = "concat">
(x, experts, weights, gate_up, down{bias_inputs}) => (y)
{{
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  two = Constant<value_int = 2>()
  few = Constant<value_int = 16>()
  one_1 = Constant<value_ints = [1]>()
  zero_1 = Constant<value_ints = [0]>()
  rest_1 = Constant<value_ints = [-1]>()
  nothing = Constant<value_float = 0.0>()
  nothing_11 = Constant<value = float[1, 1] {{0.0}}>()
  always = Constant<value = bool {{1}}>()
  {constants}
  T_1 = Shape<start = 0, end = 1>(x)
  H_1 = Shape<start = 1, end = 2>(x)
  K_1 = Shape<start = 1, end = 2>(experts)
  E_1 = Shape<start = 0, end = 1>(gate_up)
  E = Squeeze(E_1)
  K = Squeeze(K_1)
  N = Size(experts)
  N_1 = Unsqueeze(N, zero_1)

  # A slot's bucket is its expert, or E if it is to be skipped.
  id_N = Reshape(experts, rest_1)
  below_N = Less(id_N, zero)
  above_N = GreaterOrEqual(id_N, E)
  skipped_N = Or(below_N, above_N)
  bucket_N = Where(skipped_N, E, id_N)

  # Slots sorted by bucket, then by their own number: keys are distinct, so that no rule about ties is needed.
  slot_N = Range(zero, N, one)
  base_N = Mul(bucket_N, N)
  key_N = Add(base_N, slot_N)
  sorted_N, order_N = TopK<largest = 0>(key_N, N_1)
  position_N = ScatterElements(slot_N, order_N, slot_N)

  # How many slots a bucket has, where they start in that order, and which of them a slot is.
  buckets_1 = Add(E_1, one_1)
  none_B = ConstantOfShape<value = int64[1] {{0}}>(buckets_1)
  ones_N = Expand(one, N_1)
  count_B = ScatterElements<reduction = "add">(none_B, bucket_N, ones_N)
  start_B = CumSum<exclusive = 1>(count_B, zero)
  count_E = Slice(count_B, zero_1, E_1)
  start_E = Slice(start_B, zero_1, E_1)
  start_N = Gather(start_B, bucket_N)
  rank_N = Sub(position_N, start_N)

  largest = ReduceMax<keepdims = 0>(count_E)
  slots_twice = Mul(N, two)
  share_twice = Div(slots_twice, E)
  allowed = Max(share_twice, few)
  rows = Min(largest, allowed)
  step = Max(rows, one)
  padded = Add(largest, step)
  counted = Sub(padded, one)
  rounds_needed = Div(counted, step)
  rounds = Max(rounds_needed, one)

  # The row that is zero closes the block of each expert; skipped slots, and those of other rounds, fetch expert 0's.
  block = Add(rows, one)
  block_1 = Unsqueeze(block, zero_1)
  block_shape = Concat<axis = 0>(block_1, H_1)
  rows_shape = Concat<axis = 0>(rest_1, H_1)
  first_N = Mul(bucket_N, block)

  answer_NH = Loop(rounds, always, nothing_11) <
      body = one_round (int64 round, bool go, before_NH) => (go_on, after_NH) {{
    go_on = Identity(go)
    done = Mul(round, step)
    remain_E = Sub(count_E, done)
    from_E = Add(start_E, done)
    block_ECH = Scan(remain_E, from_E, gate_up, down{bias_inputs}) <
        num_scan_inputs = {scanned}, body = one_expert (remain, from, gate_up_e, down_e{bias_slices})
        => (float[rows_C, columns_H] block_CH) {{
      any = Greater(remain, zero)
      block_CH = If(any) <then_branch = hit () => (hit_CH) {{
        count = Min(remain, rows)
        count_1 = Unsqueeze(count, zero_1)
        from_1 = Unsqueeze(from, zero_1)
        to_1 = Add(from_1, count_1)
        slot_M = Slice(order_N, from_1, to_1)
        token_M = Div(slot_M, K)
        x_MH = Gather(x, token_M)
        x_float = Cast<to = 1>(x_MH)
        gate_up_float = Cast<to = 1>(gate_up_e)
        down_float = Cast<to = 1>(down_e)
        {bias_casts}
        joint = Gemm<transB = {trans}>(x_float, gate_up_float{gate_up_bias})
        {activation}
        out_MH = Gemm<transB = {trans}>(hidden, down_float{down_bias})
        unused_1 = Sub(block_1, count_1)
        unused_shape = Concat<axis = 0>(unused_1, H_1)
        unused = ConstantOfShape(unused_shape)
        hit_CH = Concat<axis = 0>(out_MH, unused)
      }}, else_branch = missed () => (missed_CH) {{
        missed_CH = ConstantOfShape(block_shape)
      }}>
    }}>
    block_RH = Reshape(block_ECH, rows_shape)
    row_N = Sub(rank_N, done)
    early_N = Less(row_N, zero)
    late_N = GreaterOrEqual(row_N, rows)
    other_N = Or(early_N, late_N)
    absent_N = Or(other_N, skipped_N)
    own_N = Add(first_N, row_N)
    place_N = Where(absent_N, rows, own_N)
    now_NH = Gather(block_RH, place_N)
    after_NH = Add(before_NH, now_NH)
  }}>

  # A skipped slot counts for nothing whatever its weight, NaN included.
  weight_N = Reshape(weights, rest_1)
  kept_N = Where(skipped_N, nothing, weight_N)
  weight_shape = Concat<axis = 0>(T_1, one_1, K_1)
  weight_T1K = Reshape<allowzero = 1>(kept_N, weight_shape)
  answer_TKH_shape = Concat<axis = 0>(T_1, K_1, H_1)
  answer_TKH = Reshape<allowzero = 1>(answer_NH, answer_TKH_shape)
  sum_T1H = MatMul(weight_T1K, answer_TKH)
  sum_TH = Squeeze(sum_T1H, one_1)
  y = CastLike(sum_TH, x)
}}
"""

SPLIT = {
    "concat": "gate, up = Split<axis = 1, num_outputs = 2>(joint)",
    "interleaved": """gate = Slice(joint, zero_1, far_1, one_1, two_1)
        up = Slice(joint, one_1, far_1, one_1, two_1)""",
    "ungated": "gate = Identity(joint)",
}
CLAMP = """gate_low = Min(gate, limit)
        up_low = Min(up, limit)
        up_both = Max(up_low, limit_below)"""
HIDDEN = {  # `active` from gate, or `hidden` from gate and up
    "silu": "sigmoid = Sigmoid(gate)\nactive = Mul(gate, sigmoid)",
    "silu_clamped": f"""{CLAMP}
        sigmoid = Sigmoid(gate_low)
        active = Mul(gate_low, sigmoid)
        hidden = Mul(active, up_both)""",
    "swiglu_oai": f"""{CLAMP}
        steep = Mul(gate_low, alpha)
        sigmoid = Sigmoid(steep)
        active = Mul(gate_low, sigmoid)
        up_one = Add(up_both, unit)
        hidden = Mul(up_one, active)""",
    "gelu": "active = Gelu(gate)",
    "gelu_tanh": 'active = Gelu<approximate = "tanh">(gate)',
    "relu": "active = Relu(gate)",
    "relu2": "positive = Relu(gate)\nactive = Mul(positive, positive)",
}
LIMITS = """limit = Constant<value = float {{{limit!r}}}>()
  limit_below = Neg(limit)
"""
CONSTANTS = {
    "interleaved": """two_1 = Constant<value_ints = [2]>()
  far_1 = Constant<value_ints = [9223372036854775807]>()
""",
    "silu_clamped": LIMITS,
    "swiglu_oai": LIMITS
    + """alpha = Constant<value = float {{{alpha!r}}}>()
  unit = Constant<value = float {{1.0}}>()
""",
}
CASTS = """gate_up_bias_float = Cast<to = 1>(gate_up_bias_e)
        down_bias_float = Cast<to = 1>(down_bias_e)"""


def function(
    activation: str, alpha: float, limit: float, layout: str, *, biases: bool, opset: int, overload: str = ""
) -> onnx.FunctionProto:
    """The body for nodes with these attributes, with both biases or neither; `opset` is that of the model."""
    import onnx.parser

    Attributes(activation, alpha, limit, layout).check()
    form = layout.removesuffix("_transposed")
    hidden = HIDDEN[activation]
    if "hidden =" not in hidden:
        hidden += "\nhidden = Identity(active)" if form == "ungated" else "\nhidden = Mul(active, up)"
    text = BODY.format(
        domain=DOMAIN,
        op_type=OP_TYPE,
        opset=opset,
        constants=CONSTANTS.get(form, "") + CONSTANTS.get(activation, "").format(alpha=alpha, limit=limit),
        activation=f"{SPLIT[form]}\n{hidden}",
        trans=0 if layout.endswith("_transposed") else 1,
        scanned=6 if biases else 4,
        bias_inputs=", gate_up_bias, down_bias" if biases else "",
        bias_slices=", gate_up_bias_e, down_bias_e" if biases else "",
        bias_casts=CASTS if biases else "",
        gate_up_bias=", gate_up_bias_float" if biases else "",
        down_bias=", down_bias_float" if biases else "",
    )
    made = onnx.parser.parse_function(text)
    made.overload = overload
    return made


def add_functions(model: onnx.ModelProto) -> None:
    """Give every DsMoE node of a model its body, in place; bodies that are there already are made anew.

    Where nodes differ in their attributes or in having biases, each kind gets a function of its own, told apart by
    `overload`: ONNX Runtime since 1.27 and onnx's inliner read it, onnx's ReferenceEvaluator (1.23) does not.
    """
    found = check_nodes(model, functions=False)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if found and opset < LEAST_OPSET:
        raise TargetError(f"the model has opset {opset}; the body of {OP_TYPE} needs {LEAST_OPSET}: export with that")
    kinds = list(dict.fromkeys((attributes, biases) for _, attributes, biases in found))
    others = [made for made in model.functions if (made.domain, made.name) != (DOMAIN, OP_TYPE)]
    names = {kind: "" if len(kinds) == 1 else _overload(*kind) for kind in kinds}
    for node, attributes, biases in found:
        node.overload = names[attributes, biases]
    del model.functions[:]
    model.functions.extend(others)
    for attributes, biases in kinds:
        overload = names[attributes, biases]
        model.functions.append(function(*attributes, biases=biases, opset=opset, overload=overload))
    if len(kinds) > 1:
        model.ir_version = max(model.ir_version, OVERLOAD_IR)


def minimum_onnxruntime(model: onnx.ModelProto) -> str:
    """The oldest version that runs the bodies in a model right, for its metadata."""
    several = len({made.overload for made in model.functions if made.domain == DOMAIN}) > 1
    return OVERLOADS_SINCE if several else LEAST_ONNXRUNTIME


def _overload(attributes: Attributes, biases: bool) -> str:
    return "-".join((*map(str, attributes), "biases" if biases else "plain"))
