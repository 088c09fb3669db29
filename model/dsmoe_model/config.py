"""The one configuration: every system of the DeepSeekMoE paper, and its successors' gates, by values alone.

Field names are Hugging Face's for `model_type: "deepseek"`; `model/README.md` has the table against V2/V3, DeepSeek's
inference code and the paper's symbols. Validation allocates nothing, so a hostile config costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from dsmoe_model.errors import ConfigError

# Inclusive. Generous against what exists (the largest released: 160k vocabulary, 7168 wide, 384 experts, 92 layers),
# and small enough that the element count of every tensor stays below 2**63.
_BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 4096),
    "intermediate_size": (1, 2**20),
    "max_position_embeddings": (1, 2**24),
    "rope_theta": (1.0, 1e12),
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 10.0),
    "n_routed_experts": (0, 65536),
    "n_shared_experts": (0, 1024),
    "num_experts_per_tok": (0, 65536),
    "moe_intermediate_size": (0, 2**20),
    "first_k_dense_replace": (0, 1024),
    "moe_layer_freq": (1, 1024),
    "norm_eps": (0.0, 1.0),
    "routed_scaling_factor": (1e-6, 1e6),
    "n_group": (1, 65536),
    "topk_group": (1, 65536),
    "swiglu_alpha": (1e-6, 1e6),
    "swiglu_limit": (1e-6, 1e6),
    "aux_loss_alpha": (0.0, 1e3),
    "device_loss_alpha": (0.0, 1e3),
    "n_devices": (1, 65536),
    "bos_token_id": (0, 2**24),
    "eos_token_id": (0, 2**24),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"),
    "group_score": ("max", "top2"),
    "router_dtype": ("float32", "activation"),
    "hidden_act": ("silu", "silu_clamped", "swiglu_oai"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and rules of one model. Raises `ConfigError` naming the fields and their values.

    A layer is a mixture-of-experts layer when there are experts at all, its index is at least `first_k_dense_replace`
    and a multiple of `moe_layer_freq`; otherwise it is a dense feed-forward of `intermediate_size`. With
    `n_routed_experts = 0` and `n_shared_experts = s` such a layer is s always-on experts (the paper's Dense x4, x16).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # even, for RoPE
    intermediate_size: int  # width of a dense feed-forward
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006  # the paper's; official config files say 0.02
    hidden_act: str = "silu"  # "silu" SwiGLU | "silu_clamped" | "swiglu_oai"
    swiglu_alpha: float = 1.702  # read by "swiglu_oai"
    swiglu_limit: float = 7.0  # read by "silu_clamped" and "swiglu_oai"

    n_routed_experts: int = 0  # the shared ones are not counted in
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0  # routed experts per token
    moe_intermediate_size: int = 0  # width of one expert
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1

    scoring_func: str = "softmax"  # "softmax" | "sigmoid" | "sqrtsoftplus" | "softmax_after_topk"
    norm_topk_prob: bool = False
    norm_eps: float = 1e-20
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"  # "max" (V2) | "top2" (V3: the sum of a group's two best)
    selection_bias: bool = False  # V3's e_score_correction_bias: chooses, never weighs
    hash_routing: bool = False  # a fixed token id -> expert table instead of a gate
    router_dtype: str = "float32"  # "activation": v1 parity, the gate in the activations' dtype

    aux_loss_alpha: float = 0.0  # alpha_1 of eq. (12)
    device_loss_alpha: float = 0.0  # alpha_2 of eq. (15)
    n_devices: int = 1  # D of eq. (15)
    seq_aux: bool = True  # balance per sequence, or over the whole batch

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(self, field.name, str(field.type))
        _check_attention(self)
        _check_experts(self)
        _check_groups(self)
        if self.hash_routing:
            _check_hash(self)

    @property
    def shared_intermediate_size(self) -> int:
        """The shared experts are one feed-forward of this width (exact: SwiGLU is element-wise)."""
        return self.n_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts."""
        has_experts = self.n_routed_experts > 0 or self.n_shared_experts > 0
        return has_experts and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in field order; `ModelConfig.from_dict` gives the same config back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Unknown and missing names are refused by name."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a model config must be a mapping of field names to values, got {type(values).__name__}")
        known = {field.name: field for field in fields(cls)}
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown config field {_short(name)}{hint}")
        missing = [name for name in list(known)[:8] if name not in values]
        if missing:
            raise ConfigError(f"config lacks {', '.join(missing)}")
        return cls(**values)


def _short(value: object) -> str:
    """A value fit for an error message, however large it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return repr(value) if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"


def _check_field(config: ModelConfig, name: str, kind: str) -> None:
    """Type, then choice or bounds, of one field. An int where a float is due is stored as a float."""
    value = getattr(config, name)
    if kind == "bool":
        if type(value) is not bool:
            raise ConfigError(f"{name} must be true or false, got {_short(value)} ({type(value).__name__})")
        return
    if kind == "str":
        if not isinstance(value, str) or value not in _CHOICES[name]:
            raise ConfigError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {_short(value)}")
        return
    if value is None and kind == "int | None":
        return
    accepted, due = ((int, float), "a number") if kind == "float" else ((int,), "an integer")
    if type(value) not in accepted:  # `type`, not isinstance: True is an int in Python
        raise ConfigError(f"{name} must be {due}, got {_short(value)} ({type(value).__name__})")
    low, high = _BOUNDS[name]
    if not low <= value <= high:  # NaN fails here too
        raise ConfigError(f"{name} = {_short(value)} is outside [{low:g}, {high:g}]")
    if kind == "float":
        object.__setattr__(config, name, float(value))
        assert math.isfinite(getattr(config, name))


def _check_attention(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads = {config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads = {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim = {config.head_dim} must be even: RoPE rotates pairs")
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name)
        if token is not None and token >= config.vocab_size:
            raise ConfigError(f"{name} = {token} must be below vocab_size = {config.vocab_size}")
    if config.first_k_dense_replace > config.num_hidden_layers:
        raise ConfigError(
            f"first_k_dense_replace = {config.first_k_dense_replace} exceeds "
            f"num_hidden_layers = {config.num_hidden_layers}"
        )


def _check_experts(config: ModelConfig) -> None:
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    if top_k > experts:
        raise ConfigError(f"num_experts_per_tok = {top_k} exceeds n_routed_experts = {experts}")
    if experts and not top_k:
        raise ConfigError(f"num_experts_per_tok = 0 leaves n_routed_experts = {experts} without a token")
    if (experts or config.n_shared_experts) and not config.moe_intermediate_size:
        raise ConfigError(
            f"moe_intermediate_size = 0, but n_routed_experts = {experts} and "
            f"n_shared_experts = {config.n_shared_experts} need a width"
        )
    if config.n_devices > 1 and experts % config.n_devices:
        raise ConfigError(f"n_routed_experts = {experts} must be a multiple of n_devices = {config.n_devices}")


def _check_groups(config: ModelConfig) -> None:
    experts, n_group, topk_group = config.n_routed_experts, config.n_group, config.topk_group
    if topk_group > n_group:
        raise ConfigError(f"topk_group = {topk_group} exceeds n_group = {n_group}")
    if n_group == 1:
        return
    if experts == 0 or experts % n_group:
        raise ConfigError(f"n_routed_experts = {experts} must be a positive multiple of n_group = {n_group}")
    size = experts // n_group
    if config.group_score == "top2" and size < 2:
        raise ConfigError(
            f"group_score = 'top2' needs two experts a group; n_routed_experts = {experts} in "
            f"n_group = {n_group} groups leaves {size}"
        )
    if config.num_experts_per_tok > topk_group * size:
        raise ConfigError(
            f"num_experts_per_tok = {config.num_experts_per_tok} exceeds the {topk_group * size} experts that "
            f"topk_group = {topk_group} of n_group = {n_group} groups leave"
        )


def _check_hash(config: ModelConfig) -> None:
    """Hash routing has no scores, so every field that speaks about scores must be left alone."""
    wanted = {
        "num_experts_per_tok": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "selection_bias": False,
        "aux_loss_alpha": 0.0,
        "device_loss_alpha": 0.0,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(f"hash_routing = True needs {name} = {value!r}, got {_short(getattr(config, name))}")
