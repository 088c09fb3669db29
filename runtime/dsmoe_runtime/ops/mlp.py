"""One MLP, an expert or the shared experts, in the spelling that plain torch runs fastest on a CPU.

Tokens are columns inside: `weight [N, K] @ x^T [K, M]` reads the weight once, row by row, and gate and up are blocks of
rows. M tokens, H hidden size, I width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmoe_runtime.ops.activation import activate

# Times are of one [2816, 2048] projection of M rows on two Zen 3 cores (AVX2, no bfloat16 instructions), torch 2.13.
FEW_ROWS = 4  # bfloat16, native and upcast: 1.4 and 2.3 ms (M = 2), 2.0 and 3.1 (3), 2.7 and 2.6 (4), 5.2 and 3.9 (8)
BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32 stay in cache; upcasting the whole matrix takes 1.2 times as long


def mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    interleaved: bool,
    gated: bool = True,
) -> Tensor:
    """`[M, H]` from x `[M, H]`, gate_up `[2I, H]`, down `[H, I]`; in x's dtype, or wider where that is faster.

    Not `gated`: gate_up is `[I, H]`, one projection, and its activation is the hidden state.
    """
    joint_2IM = project(gate_up, x)
    if gate_up_bias is not None:
        joint_2IM = joint_2IM + gate_up_bias[:, None]
    gate_IM, up_IM = joint_2IM, None
    if gated:
        gate_IM, up_IM = (joint_2IM[0::2], joint_2IM[1::2]) if interleaved else joint_2IM.chunk(2)
    hidden_IM = activate(gate_IM, up_IM, activation, alpha, limit)
    answer_HM = project(down, hidden_IM.mT.contiguous())
    if down_bias is not None:
        answer_HM = answer_HM + down_bias[:, None]
    return answer_HM.mT


def project(weight: Tensor, x: Tensor) -> Tensor:
    """`weight [N, K] @ x [M, K]^T -> [N, M]`, in weight's dtype, or float32 for half precision on a CPU.

    x is contiguous: of another x, products with few rows take twice the time.
    """
    rows = x.shape[0]
    if rows == 0:
        return weight.new_empty(weight.shape[0], 0)
    if rows == 1:
        return torch.mv(weight, x[0].to(weight.dtype))[:, None]
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return _product(weight, x)
    if rows <= FEW_ROWS:
        return F.linear(x.to(weight.dtype), weight).mT
    # Without bfloat16 instructions its GEMM takes 150 ms for M = 256; this takes 23, the copies included.
    x = x.float()
    block = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    return torch.cat([_product(_float(part), x) for part in weight.split(block)])


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """A row-major [N, M] takes 1.8 ms for M = 2 and 21.5 for M = 256 where F.linear's [M, N] takes 3.2 and 24.7; of a
    transposed weight the former takes 20 times as long up to M = 8."""
    return weight @ x.mT if weight.stride(-1) == 1 else F.linear(x, weight).mT


def _float(weight: Tensor) -> Tensor:
    """A float32 copy that keeps the order of strides (of a block of columns `.float()` does not)."""
    return weight.float() if weight.stride(-1) == 1 else weight.mT.float().mT
