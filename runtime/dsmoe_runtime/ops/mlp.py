"""One gated MLP, an expert or the shared experts, in the spelling that plain torch runs fastest on a CPU.

Tokens are columns inside: `weight [N, K] @ x^T [K, M]` reads the weight once, row by row, and gate and up are blocks of
rows. M tokens, H hidden size, I width.
"""

import torch
from torch import Tensor

from dsmoe_runtime.ops.activation import activate

# Times are of one [2816, 2048] projection on two Zen 3 cores (AVX2, no bfloat16 instructions), torch 2.13.
MV_ROWS = 4  # bfloat16, M = 4: 2.5 ms by mv, 2.6 by upcast; M = 8: 5.2 and 3.9; M = 256: 150 (F.linear) and 23
BLOCK_ELEMENTS = 1 << 20  # float32 copies of 4 MiB at a time stay in cache; whole matrices cost 1.3 times as much


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
) -> Tensor:
    """`[M, H]` from x `[M, H]`, gate_up `[2I, H]`, down `[H, I]`; in x's dtype, or wider where that is faster."""
    joint_2IM = project(gate_up, x)
    if gate_up_bias is not None:
        joint_2IM = joint_2IM + gate_up_bias[:, None]
    gate_IM, up_IM = (joint_2IM[0::2], joint_2IM[1::2]) if interleaved else joint_2IM.chunk(2)
    answer_HM = project(down, activate(gate_IM, up_IM, activation, alpha, limit).mT)
    if down_bias is not None:
        answer_HM = answer_HM + down_bias[:, None]
    return answer_HM.mT


def project(weight: Tensor, x: Tensor) -> Tensor:
    """`weight [N, K] @ x [M, K]^T -> [N, M]`, in weight's dtype, or float32 for half precision and many rows."""
    rows = x.shape[0]
    half = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    if rows == 1:
        return torch.mv(weight, x[0].to(weight.dtype))[:, None]
    if half and 0 < rows <= MV_ROWS:
        return torch.stack([torch.mv(weight, row) for row in x.to(weight.dtype)], dim=1)
    if half:
        # Without bfloat16 instructions a GEMM in it is 5 to 7 times slower than one in float32, copies included.
        product_NM = torch.empty(weight.shape[0], rows, dtype=torch.float32)
        block = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
        for weight_block, product_block in zip(weight.split(block), product_NM.split(block), strict=True):
            torch.mm(weight_block.float(), x.float().mT, out=product_block)
        return product_NM
    # A row-major [N, M] is 1.3 (M = 256) to 2.6 (M = 4) times as fast as F.linear's [M, N] in float32.
    return weight @ x.mT
