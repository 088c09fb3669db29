"""An independent witness: the same weights in transformers' own classes, which were written by others.

`deepseek_ocr2_text` is v1's architecture (Llama attention, and the mixture of experts of V2 with a greedy gate), so a
whole model can be compared; DeepSeek-V2 and -V3 have another attention, so of them only the blocks can.
Needs transformers (`pip install 'dsmoe-compiler[test]'`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer


class TextWithHead(nn.Module):
    """transformers' text model, which stops before the head, and the head. Keys are those of a causal LM checkpoint."""

    def __init__(self, model: nn.Module, lm_head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits `[B, S, V]` of token ids `[B, S]` int64, float32 at least, plain causal attention."""
        logits = self.lm_head(self.model(ids_BS, use_cache=False).last_hidden_state)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def to_transformers(model: Transformer, *, experts_implementation: str = "eager") -> TextWithHead:
    """`deepseek_ocr2_text` with the very same tensors (shared, not copied), in eval mode.

    `experts_implementation`: "eager", "batched_mm" or "grouped_mm". Raises ValueError if the config has something that
    architecture cannot express, and ImportError without transformers.
    """
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

    config = model.config
    _require(config, _ocr2_limits(config), "deepseek_ocr2_text")
    sparse = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    theirs = DeepseekOcr2TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        mlp_layer_types=["sparse" if moe else "dense" for moe in sparse],
        **_gate_v2(config),
    )
    theirs._attn_implementation = "sdpa"
    theirs._experts_implementation = experts_implementation
    with torch.device("meta"):
        text = DeepseekOcr2TextModel(theirs)
    text.rotary_emb = type(text.rotary_emb)(theirs)  # its tables are not weights: make them for real
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    whole = TextWithHead(text, head)
    whole.load_state_dict(_renamed(model), strict=True, assign=True)
    return whole.to(model.embed_tokens.weight.device).eval().requires_grad_(False)


def block_to_transformers(block: MoE, config: ModelConfig, *, experts_implementation: str = "eager") -> nn.Module:
    """A DeepseekV3MoE (sigmoid gate) or DeepseekV2Moe (softmax) of the same tensors; `x [B, S, H]` -> `y [B, S, H]`."""
    if config.scoring_func == "sigmoid":
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        _require(config, {"selection_bias": True, "group_score": "top2", "hidden_act": "silu"}, "deepseek_v3")
        groups: dict[str, Any] = {"n_group": config.n_group, "topk_group": config.topk_group}
        theirs: Any = DeepseekV3Config(
            hidden_size=config.hidden_size, norm_topk_prob=config.norm_topk_prob, **groups, **_experts(config)
        )
        make: type[nn.Module] = DeepseekV3MoE
    else:
        from transformers import DeepseekV2Config
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

        _require(config, _v2_limits(), "deepseek_v2")
        theirs = DeepseekV2Config(hidden_size=config.hidden_size, **_gate_v2(config))
        make = DeepseekV2Moe
    theirs._experts_implementation = experts_implementation
    with torch.device("meta"):
        moe = make(theirs)
    moe.load_state_dict(
        {_their_name(name): tensor for name, tensor in block.state_dict().items()}, strict=True, assign=True
    )
    return moe.eval().requires_grad_(False)


def _renamed(model: Transformer) -> dict[str, Tensor]:
    """Our state dict under transformers' names; experts are stacked the same way in both."""
    return {
        name if name.startswith("lm_head.") else f"model.{_their_name(name)}": tensor
        for name, tensor in model.state_dict().items()
    }


def _their_name(name: str) -> str:
    return name.replace("router.", "gate.")


def _experts(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "routed_scaling_factor": config.routed_scaling_factor,
    }


def _gate_v2(config: ModelConfig) -> dict[str, Any]:
    if config.n_group == 1:
        return {**_experts(config), "topk_method": "greedy"}
    groups = {"n_group": config.n_group, "topk_group": config.topk_group}
    return {**_experts(config), **groups, "topk_method": "group_limited_greedy"}


def _v2_limits() -> dict[str, Any]:
    return {
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "group_score": "max",
        "selection_bias": False,
        "hash_routing": False,
        "router_dtype": "float32",
        "hidden_act": "silu",
    }


def _ocr2_limits(config: ModelConfig) -> dict[str, Any]:
    return {**_v2_limits(), "head_dim": config.hidden_size // config.num_attention_heads}


def _require(config: ModelConfig, limits: dict[str, Any], family: str) -> None:
    """Refuse, by name, a config the other side would silently read as something else."""
    for field, value in limits.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field} = {getattr(config, field)!r}: transformers' {family} has only {value!r}.")
    if not config.n_routed_experts or not config.n_shared_experts:
        raise ValueError(
            f"n_routed_experts = {config.n_routed_experts}, n_shared_experts = {config.n_shared_experts}: "
            f"transformers' {family} needs both."
        )
