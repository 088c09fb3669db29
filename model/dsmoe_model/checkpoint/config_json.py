"""`config.json` to `ModelConfig` and back, for the families whose weights fit the reference model.

    deepseek             deepseek-moe-16b and whatever this package saves      whole models
    llama                dense, MHA or GQA                                     whole models
    deepseek_ocr2_text   v1's architecture as transformers spells it           whole models
    deepseek_v2, _v3     multi-head latent attention, which we have not        their mixture-of-experts blocks only

What a config asks for and this model cannot do is refused by name. Python code named in a config is never run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsmoe_model.checkpoint.json_files import file_inside, read_json
from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import CheckpointError, ConfigError

CONFIG_LIMIT = 4 * 2**20  # bytes
WHOLE = ("deepseek", "llama", "deepseek_ocr2_text")
BLOCKS_ONLY = ("deepseek_v2", "deepseek_v3")

# Keys whose neutral values we can honour; anything else in them changes the function the model computes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "silu_clamped", "swiglu_oai"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc", None),
}
_LATENT = ("kv_lora_rank", "q_lora_rank")
_NOT_OF_A_BLOCK = ("attention_bias", "rope_scaling", "sliding_window", "partial_rotary_factor")
_NO_EFFECT = {  # says nothing about the function computed at inference
    *("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("use_cache", "pad_token_id", "attention_dropout", "pretraining_tp", "output_router_logits", "ep_size"),
    *("rope_parameters", "mlp_layer_types", *_LATENT, *_NEUTRAL),
}


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` says: the model, the family it was written for, and remarks for the reader."""

    config: ModelConfig
    model_type: str
    notes: tuple[str, ...]


def read_config(folder: Path, *, block_only: bool = False) -> CheckpointConfig:
    """Read `config.json`. `block_only`: the attention is not wanted, so latent attention is no obstacle.

    Raises CheckpointError or ConfigError, naming the key, its value and what would be accepted.
    """
    path = file_inside(folder, "config.json", said_by=f"{str(folder)!r}")
    if not path.exists():
        raise CheckpointError(f"{str(folder)!r} has no config.json: not a checkpoint folder.")
    raw = read_json(path, limit=CONFIG_LIMIT)
    try:
        return _translate(raw, block_only=block_only)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from None


def _translate(raw: dict[str, Any], *, block_only: bool) -> CheckpointConfig:
    model_type = raw.get("model_type")
    known = (*WHOLE, *BLOCKS_ONLY)
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"model_type {str(model_type)[:60]!r} is not read here; known: {', '.join(known)}.")
    latent = [f"{key} = {str(raw[key])[:20]}" for key in _LATENT if raw.get(key)]
    if not block_only and (latent or model_type in BLOCKS_ONLY):
        raise ConfigError(
            f"model_type {model_type!r} with {', '.join(latent) or 'its attention'} uses multi-head latent attention, "
            "which the reference model has not. Its mixture-of-experts blocks can be loaded one by one "
            "(load_moe_block); the whole model goes through transformers."
        )
    notes: list[str] = []
    for key, neutral in _NEUTRAL.items():
        if key in raw and raw[key] not in neutral and not (block_only and key in _NOT_OF_A_BLOCK):
            accepted = ", ".join(str(value) for value in neutral)
            raise ConfigError(f"{key} = {str(raw[key])[:80]} is not supported; accepted: {accepted}.")
    if raw.get("auto_map"):
        notes.append("auto_map names Python code; it is not used: this package's own model reads these weights.")

    names = {field.name for field in fields(ModelConfig)}
    values = {key: value for key, value in raw.items() if key in names and value is not None}
    _attention(raw, values, block_only=block_only)
    if model_type == "llama":
        expert_keys = [key for key in values if raw.get(key) and key in ("n_routed_experts", "n_shared_experts")]
        if expert_keys:
            raise ConfigError(f"model_type 'llama' is dense, but {expert_keys[0]} = {str(raw[expert_keys[0]])[:20]}.")
    else:
        _experts(raw, values, model_type)
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(values.get(key), list):
            values[key] = values[key][0] if values[key] else None
            notes.append(f"{key} is a list; its first entry, {values[key]}, is used.")
    unused = sorted(key for key in raw if key not in names and key not in _NO_EFFECT and raw[key] is not None)
    if unused:
        notes.append(f"config.json keys not used: {', '.join(key[:60] for key in unused[:20])}.")
    return CheckpointConfig(ModelConfig.from_dict(values), model_type, tuple(notes))


def _attention(raw: Mapping[str, Any], values: dict[str, Any], *, block_only: bool) -> None:
    """Head counts and RoPE, where Hugging Face leaves them to be derived."""
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        shown = f"num_attention_heads = {str(heads)[:20]}, hidden_size = {str(hidden)[:20]}"
        raise ConfigError(f"{shown}: both must be positive integers.")
    values.setdefault("num_key_value_heads", heads)
    if "head_dim" not in values:
        if hidden % heads and not block_only:
            raise ConfigError(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}.")
        values["head_dim"] = hidden // heads
    rope = raw.get("rope_parameters")
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters must be an object, got {type(rope).__name__}.")
    if rope.get("rope_type", "default") != "default" and not block_only:
        raise ConfigError(f"rope_parameters.rope_type = {str(rope['rope_type'])[:40]!r}: only 'default' is read.")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]


def _experts(raw: Mapping[str, Any], values: dict[str, Any], model_type: str) -> None:
    """The gate, where families spell it differently: V2 greedy or by groups, V3 always with selection bias."""
    routed = raw.get("n_routed_experts")
    if model_type in ("deepseek_v2", "deepseek_ocr2_text") and raw.get("norm_topk_prob"):
        raise ConfigError(
            f"norm_topk_prob = true with model_type {model_type!r}: DeepSeek's code renormalises, transformers does "
            "not. Set it to what the weights were trained with under model_type 'deepseek'."
        )
    if model_type == "deepseek_v3":
        needed = ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group")
        lacking = [key for key in needed if key not in raw]
        if lacking:
            raise ConfigError(f"model_type 'deepseek_v3' lacks {', '.join(lacking)}.")
        values.setdefault("scoring_func", "sigmoid")
    by_family = {"deepseek_v3": "noaux_tc", "deepseek_v2": "greedy", "deepseek_ocr2_text": "greedy"}
    method = raw.get("topk_method") or by_family.get(model_type)
    if method == "greedy":
        values["n_group"] = values["topk_group"] = 1
    elif method == "group_limited_greedy":
        values["group_score"] = "max"
    elif method == "noaux_tc":
        values["group_score"], values["selection_bias"] = "top2", True
    if model_type == "deepseek" and routed:
        values.setdefault("aux_loss_alpha", 0.001)  # the v1 class default; the official base config leaves it out
    kinds = raw.get("mlp_layer_types")
    if kinds is not None:
        dense = kinds.count("dense") if isinstance(kinds, list) else -1
        if dense < 0 or kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
            raise ConfigError(
                f"mlp_layer_types = {str(kinds)[:80]}: only dense layers first, then sparse ones, is read."
            )
        if len(kinds) != raw.get("num_hidden_layers"):
            layers = str(raw.get("num_hidden_layers"))[:20]
            raise ConfigError(f"mlp_layer_types has {len(kinds)} entries, num_hidden_layers is {layers}.")
        values["first_k_dense_replace"] = dense


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a saved model: `llama` if it has no experts, else `deepseek`. `read_config` inverts."""
    experts = bool(config.n_routed_experts or config.n_shared_experts)
    values = config.to_dict()
    if not experts:
        default = {field.name: field.default for field in fields(ModelConfig)}
        values = {key: value for key, value in values.items() if value != default[key] or key in _LLAMA_KEYS}
    family = {
        "architectures": ["DeepseekForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "deepseek" if experts else "llama",
        "torch_dtype": dtype,
    }
    return {**family, **values}


_LLAMA_KEYS = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *(
        "intermediate_size",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
    ),
    *("hidden_act", "initializer_range", "bos_token_id", "eos_token_id"),
}
