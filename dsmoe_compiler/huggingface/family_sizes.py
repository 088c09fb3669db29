"""Small sizes by the names of config fields, and what some families need besides.

A field that a family's config does not have is not passed. Vocabulary 96, hidden size 32, two layers (or as many as a
pattern of layer kinds needs), eight experts, two a token.
"""

from __future__ import annotations

from typing import Any

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
PATTERNED = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
KDA = {"linear_head_dim": 16, "linear_num_heads": 2}
FAMILY: dict[str, dict[str, Any]] = {
    "bailing_hybrid": PATTERNED,
    "deepseek_v4": {"mlp_layer_types": None},
    "diffusion_gemma": {"top_k_experts": 2, "global_head_dim": 16, "num_key_value_heads": 1},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 10000.0},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
    },
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}},
    "glm5_next": KDA
    | {
        "layer_types": ["linear_attention", "indexed_attention"],
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "index_topk": 16,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_kpool": 2,
    },
    "granitemoehybrid": PATTERNED | {"mamba_n_heads": 4, "mamba_d_state": 16},
    "jamba": {"num_hidden_layers": 4, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": PATTERNED | KDA | {"q_lora_rank": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"layer_types": ["full_attention", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
    },
    "qwen3_5_moe": PATTERNED | LINEAR,
    "qwen3_next": PATTERNED | LINEAR,
    "qwen4_exp": PATTERNED
    | LINEAR
    | {
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
CLASSES: dict[str, str] = {}
