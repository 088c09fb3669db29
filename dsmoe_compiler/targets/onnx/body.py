"""DsMoE's body in standard ONNX operators: what runtimes without our library run, and the op's executable meaning.

Scan hands each expert its slices of the weights, without a copy in ONNX Runtime, and `If` reads them only where a token
chose that expert. An expert's answers fill a block of C rows, and each slot then fetches its own from there. No sum is
scattered, so the same input gives the same bits with any number of threads.

C = min(largest share, max(16, 2 N / E)) keeps all blocks together within about twice the N slots; experts with a larger
share take the rest in further rounds. Everything is float32 between the casts of what an expert reads and that of y.
What stands inside Scan runs E times, so nearly all is worked out before it, for all experts at once.

T tokens, K experts a token, N = T K slots, E experts, M slots of one expert, R = E C rows.
"""

from __future__ import annotations

from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, Attributes

BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <activation: string = "silu", alpha: float = 1.0, limit: float = 0.0, layout: string = "concat">
(x, experts, weights, gate_up, down{bias_inputs}) => (y)
{{
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  two = Constant<value_int = 2>()
  few = Constant<value_int = 16>()
  never = Constant<value_int = -1>()
  one_1 = Constant<value_ints = [1]>()
  zero_1 = Constant<value_ints = [0]>()
  rest_1 = Constant<value_ints = [-1]>()
  nothing = Constant<value_float = 0.0>()
  nothing_11 = Constant<value = float[1, 1] {{0.0}}>()
  always = Constant<value = bool {{1}}>()
  {constants}
  H_1 = Shape<start = 1, end = 2>(x)
  K_1 = Shape<start = 1, end = 2>(experts)
  E_1 = Shape<start = 0, end = 1>(gate_up)
  E = Squeeze(E_1)
  K = Squeeze(K_1)
  last = Sub(E, one)

  # A slot's expert; one that names no expert is skipped: it stands for some other, and is sorted behind all of them.
  id_N = Reshape(experts, rest_1)
  expert_N = Clip(id_N, zero, last)
  kept_N = Equal(expert_N, id_N)
  bucket_N = Where(kept_N, id_N, E)

  # Slots sorted by bucket; how those of one stand among themselves matters to nobody.
  N = Size(experts)
  N_1 = Unsqueeze(N, zero_1)
  slot_N = Range(zero, N, one)
  sorted_N, order_N = TopK<largest = 0>(bucket_N, N_1)
  position_N = ScatterElements(slot_N, order_N, slot_N)
  token_N = Div(order_N, K)

  # How many slots an expert has, where they start in that order, and which of them a slot is.
  none_E = ConstantOfShape<value = int64[1] {{0}}>(E_1)
  counts_N = Cast<to = 7>(kept_N)
  count_E = ScatterElements<reduction = "add">(none_E, expert_N, counts_N)
  start_E = CumSum<exclusive = 1>(count_E, zero)
  start_N = Gather(start_E, expert_N)
  rank_N = Sub(position_N, start_N)

  half = Div(E, two)
  half_E = Max(half, one)
  share_twice = Div(N, half_E)
  allowed = Max(share_twice, few)
  largest = ReduceMax<keepdims = 0>(count_E)
  C = Clip(largest, one, allowed)

  # In which round a slot has its answer, and in which of that round's rows.
  within_N = Mod(rank_N, C)
  first_N = Mul(expert_N, C)
  row_N = Add(first_N, within_N)
  its_round_N = Div(rank_N, C)
  round_N = Where(kept_N, its_round_N, never)
  round_N1 = Unsqueeze(round_N, one_1)

  none_E1 = Unsqueeze(none_E, one_1)
  count_E1 = Unsqueeze(count_E, one_1)
  start_E1 = Unsqueeze(start_E, one_1)
  end_E1 = Add(start_E1, count_E1)
  C_1 = Unsqueeze(C, zero_1)
  block_shape = Concat<axis = 0>(C_1, H_1)
  rows_shape = Concat<axis = 0>(rest_1, H_1)

  answer_NH = Loop(, always, nothing_11) <
      body = one_round (int64 round, bool go, before_NH) => (go_on, after_NH) {{
    done = Mul(round, C)
    from_E1 = Add(start_E1, done)
    full_E1 = Add(from_E1, C)
    to_E1 = Min(full_E1, end_E1)
    any_E1 = Less(from_E1, end_E1)
    unused_E1 = Sub(full_E1, to_E1)
    pads_E2 = Concat<axis = 1>(none_E1, unused_E1)
    block_ECH = Scan(any_E1, from_E1, to_E1, pads_E2, gate_up, down{bias_inputs}) <
        num_scan_inputs = {scanned}, body = one_expert (any, from_1, to_1, pads_2, gate_up_e, down_e{bias_slices})
        => (float[rows_C, columns_H] block_CH) {{
      block_CH = If(any) <then_branch = hit () => (hit_CH) {{
        token_M = Slice(token_N, from_1, to_1)
        x_MH = Gather(x, token_M)
        x_float = Cast<to = 1>(x_MH)
        gate_up_float = Cast<to = 1>(gate_up_e)
        down_float = Cast<to = 1>(down_e)
        {bias_casts}
        joint = Gemm<transB = {trans}>(x_float, gate_up_float{gate_up_bias})
        {activation}
        out_MH = Gemm<transB = {trans}>(hidden, down_float{down_bias})
        hit_CH = Pad(out_MH, pads_2, , zero_1)
      }}, else_branch = missed () => (missed_CH) {{
        missed_CH = ConstantOfShape(block_shape)
      }}>
    }}>
    block_RH = Reshape(block_ECH, rows_shape)
    now_NH = Gather(block_RH, row_N)
    now_N1 = Equal(round_N1, round)
    after_NH = Where(now_N1, now_NH, before_NH)
    next = Add(done, C)
    go_on = Less(next, largest)
  }}>

  # A skipped slot counts for nothing whatever its weight, NaN included.
  weight_N = Reshape(weights, rest_1)
  kept_weight_N = Where(kept_N, weight_N, nothing)
  weight_shape = Concat<axis = 0>(rest_1, one_1, K_1)
  weight_T1K = Reshape(kept_weight_N, weight_shape)
  answer_shape = Concat<axis = 0>(rest_1, K_1, H_1)
  answer_TKH = Reshape(answer_NH, answer_shape)
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


def body(attributes: Attributes, biases: bool, opset: int) -> str:
    """The function of nodes with these attributes, with both biases or neither, in ONNX's text."""
    form = attributes.layout.removesuffix("_transposed")
    constants = CONSTANTS.get(form, "") + CONSTANTS.get(attributes.activation, "")
    hidden = HIDDEN[attributes.activation]
    if "hidden =" not in hidden:
        hidden += "\nhidden = Identity(active)" if form == "ungated" else "\nhidden = Mul(active, up)"
    return BODY.format(
        domain=DOMAIN,
        op_type=OP_TYPE,
        opset=opset,
        constants=constants.format(alpha=attributes.alpha, limit=attributes.limit),
        activation=f"{SPLIT[form]}\n{hidden}",
        trans=1 if form == attributes.layout else 0,
        scanned=8 if biases else 6,
        bias_inputs=", gate_up_bias, down_bias" if biases else "",
        bias_slices=", gate_up_bias_e, down_bias_e" if biases else "",
        bias_casts=CASTS if biases else "",
        gate_up_bias=", gate_up_bias_float" if biases else "",
        down_bias=", down_bias_float" if biases else "",
    )
