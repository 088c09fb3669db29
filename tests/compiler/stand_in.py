"""A runner without a package: the eager model with every MoE layer replaced by dsmoe::moe, or by a faulty one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dsmoe_runtime.ops  # noqa: F401  registers dsmoe::
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.verify import FusedLayer, Verification, verify
from dsmoe_compiler.verify.trace import EagerRunner
from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE
from dsmoe_model.router import Router, Routing
from dsmoe_model.transformer import Transformer, build

Op = Callable[..., tuple[Tensor, Tensor]]
CAPACITY = 80

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.125,  # 1 / sqrt(64): activations about 1
}
MOE = BASE | {
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}


def model_of(dtype: torch.dtype, *, seed: int = 0, **changes: Any) -> Transformer:
    """A small random model; `changes` are fields of its config."""
    return build(ModelConfig(**(MOE | changes)), dtype=dtype, seed=seed)


def moe_arguments(module: MoE, *, shared: bool = True) -> tuple[Any, ...]:
    """What dsmoe::moe takes after x, for one layer of the oracle."""
    config, router, experts = module.router.config, module.router, module.experts
    assert isinstance(router, Router)
    assert experts is not None
    gate_up = down = None
    if shared and module.shared_experts is not None:
        mlp = module.shared_experts
        gate_up, down = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight
    return (
        *(router.weight, None, router.e_score_correction_bias, config.num_experts_per_tok, config.scoring_func),
        *(config.n_group, config.topk_group, config.group_score, config.norm_topk_prob, config.norm_eps),
        *(config.routed_scaling_factor, config.router_dtype, experts.gate_up_proj, experts.down_proj, None, None),
        *(config.hidden_act, config.swiglu_alpha, config.swiglu_limit, "concat", gate_up, down, None),
    )


class FusedMoE(nn.Module):
    """An oracle layer's interface around `op`."""

    def __init__(self, module: MoE, op: Op) -> None:
        super().__init__()
        self.arguments, self.op = moe_arguments(module), op

    def forward(self, x_BSH: Tensor, _token_ids: Tensor, _experts_TK: Tensor | None) -> tuple[Tensor, Routing]:
        y_TH, experts_TK = self.op(x_BSH.reshape(-1, x_BSH.shape[-1]), *self.arguments)
        return y_TH.reshape(x_BSH.shape), Routing(y_TH.new_empty(0), experts_TK, y_TH.new_empty(0))


def fused_layers(model: Transformer, ops: dict[int, Op] | None = None) -> list[FusedLayer]:
    """Every routed layer as the compiler would hand it over, with the ops of some layers replaced."""

    def bound(module: MoE, op: Op, *, shared: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        arguments = moe_arguments(module, shared=shared)
        return lambda x_TH: op(x_TH, *arguments)

    layers = []
    for index, block in enumerate(model.layers):
        module = block.mlp
        if isinstance(module, MoE) and module.router is not None:
            op = (ops or {}).get(index, torch.ops.dsmoe.moe)
            alone = bound(module, op, shared=False) if module.shared_experts is not None else None
            layers.append(FusedLayer(f"layers.{index}.mlp", module, bound(module, op, shared=True), alone))
    return layers


class StandInRunner(EagerRunner):
    """`model`, fused; `ops` replaces the operator of some layers."""

    def __init__(self, model: Transformer, ops: dict[int, Op] | None = None, *, batch_size: int = 1) -> None:
        fused = copy.deepcopy(model)
        for index, block in enumerate(fused.layers):
            if isinstance(block.mlp, MoE) and block.mlp.router is not None:
                block.mlp = FusedMoE(block.mlp, (ops or {}).get(index, torch.ops.dsmoe.moe))
        super().__init__(fused, batch_size=batch_size, capacity=CAPACITY)


def verified(model: Transformer, runner: Any | None = None, layers: list[FusedLayer] | None = None) -> Verification:
    """`verify` with everything faithful that is not given."""
    return verify(
        model,
        StandInRunner(model) if runner is None else runner,
        fused_layers(model) if layers is None else layers,
        config=CompileConfig(target="cpu"),
    )
