"""Every system of the DeepSeekMoE paper as a config, and one small enough for two CPU cores.

What the paper leaves open is filled in so: the feed-forward is SwiGLU, as in the released code, of standard width 8d/3
(8 d^2 parameters, which the paper's own counts imply). The validation models keep that width unrounded, the released
and the 145B-scale ones round up to a multiple of 64. "8K" vocabulary is 8192, "100K" is the released 102400. GShard
and Switch are the paper's eq. (3)-(5) with K = 2 and 1: no renormalisation, no capacity, no jitter. Hash: weight 1, a
seeded, balanced, random table. Balance factors are the paper's; at 2B and 137B scale the baselines take those of the
model they are compared with. The 13B-scale systems are not here: the paper does not give their shape.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import ConfigError

# Table 1, 2, 8, 9: nine layers, every feed-forward replaced, 16 standard feed-forwards' worth of experts.
_DENSE = ModelConfig(
    vocab_size=8192,
    hidden_size=1280,
    num_hidden_layers=9,
    num_attention_heads=10,
    num_key_value_heads=10,
    head_dim=128,
    intermediate_size=3413,  # 8 * 1280 / 3 = 3413.3
    max_position_embeddings=2048,
)
_GSHARD = replace(_DENSE, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=3413, aux_loss_alpha=0.01)
_DEEPSEEK_7B = ModelConfig(
    vocab_size=102400,
    hidden_size=4096,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    intermediate_size=11008,
    max_position_embeddings=4096,
    bos_token_id=100000,
    eos_token_id=100001,
)
_MOE_145B = replace(
    _DEEPSEEK_7B,
    num_hidden_layers=62,
    intermediate_size=21888,  # the first layer: two standard feed-forwards, 2 * 10922.7 rounded up
    n_routed_experts=128,
    n_shared_experts=4,
    num_experts_per_tok=12,
    moe_intermediate_size=1408,  # an eighth of 10922.7, rounded up
    first_k_dense_replace=1,
    aux_loss_alpha=0.003,
    device_loss_alpha=0.05,
    n_devices=4,
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek-moe-2b": replace(
        _GSHARD, n_routed_experts=63, n_shared_experts=1, num_experts_per_tok=7, moe_intermediate_size=853
    ),
    "gshard-2b": _GSHARD,
    "gshard-x1.2": replace(_GSHARD, moe_intermediate_size=4096),
    "gshard-2.9b": replace(_GSHARD, moe_intermediate_size=5120),
    "switch-2b": replace(_GSHARD, num_experts_per_tok=1),
    "hash-2b": replace(_GSHARD, num_experts_per_tok=1, hash_routing=True, aux_loss_alpha=0.0),
    "dense-0.2b": _DENSE,
    "dense-x4": replace(_DENSE, n_shared_experts=4, moe_intermediate_size=3413),
    "dense-x16": replace(_DENSE, n_shared_experts=16, moe_intermediate_size=3413),
    "deepseek-moe-16b": ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        intermediate_size=10944,
        max_position_embeddings=4096,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        aux_loss_alpha=0.001,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    "deepseek-7b": _DEEPSEEK_7B,
    "llama2-7b": replace(
        _DEEPSEEK_7B,
        vocab_size=32000,
        num_hidden_layers=32,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "deepseek-moe-145b": _MOE_145B,
    # The first layer is one standard feed-forward, as many as are activated: 374.5T FLOPs; two would make it 377.8T.
    "deepseek-moe-142b-half": replace(_MOE_145B, n_shared_experts=2, num_experts_per_tok=6, intermediate_size=10944),
    "gshard-137b": replace(
        _MOE_145B,
        n_routed_experts=16,
        n_shared_experts=0,
        num_experts_per_tok=2,
        moe_intermediate_size=10944,
        device_loss_alpha=0.0,
        n_devices=1,
    ),
    "deepseek-67b": replace(
        _DEEPSEEK_7B,
        hidden_size=8192,
        num_hidden_layers=95,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=22016,
    ),
    # Not of the paper: the 16B's structure at a size that speaks bytes (256 = bos, 257 = eos) on two CPU cores.
    "deepseek-moe-tiny": ModelConfig(
        vocab_size=260,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=512,
        initializer_range=0.06,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        first_k_dense_replace=1,
        aux_loss_alpha=0.001,
        bos_token_id=256,
        eos_token_id=257,
    ),
}


def preset(name: str) -> ModelConfig:
    """The config of that name. Raises `ConfigError` listing the names, the closest first."""
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    names = ", ".join([*near, *(known for known in PRESETS if known not in near)])
    raise ConfigError(f"no preset is called {name[:60]!r}; the presets are {names}")
