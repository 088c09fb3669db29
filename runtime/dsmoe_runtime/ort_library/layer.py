"""Nodes of our operators that the same kernels serve."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

ROUTER = ("router_weight", "router_bias", "selection_bias")


@dataclass(frozen=True)
class Layer:
    """What one program for DsMoE is made for: sizes, dtype as in "bfloat16", and the attributes of the operator."""

    hidden: int
    width: int
    experts: int
    top_k: int
    dtype: str
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    layout: str = "concat"
    gate_up_bias: bool = False
    down_bias: bool = False

    inputs = ("x", "experts", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    outputs = ("y",)

    @property
    def routed(self) -> Layer:
        """What there is of it besides a gate and shared experts: all."""
        return self

    def key(self) -> str:
        """One line that tells it from others; the library makes the same one of a node (`cuda_node.cpp`)."""
        return f"DsMoE {_words(vars(self))}"


@dataclass(frozen=True)
class MoELayer:
    """What one program for DsMoELayer is made for.

    score ... router_dtype: the attributes of the gate. router_weight ... selection_bias: their dtypes, None where there
    is no bias. shared_width: S; 0: no shared experts.
    """

    routed: Layer
    score: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    renormalize: bool = False
    eps: float = 1e-20
    scale: float = 1.0
    router_dtype: str = "float32"
    router_weight: str = "float32"
    router_bias: str | None = None
    selection_bias: str | None = None
    shared_width: int = 0

    inputs = ("x", *ROUTER, *Layer.inputs[3:], "shared_gate_up", "shared_down")
    outputs = ("y", "experts")

    @property
    def dtype(self) -> str:
        """Of the tokens, of the experts' weights, and of what comes out."""
        return self.routed.dtype

    def key(self) -> str:
        """As that of a `Layer`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return f"DsMoELayer {_words(vars(self.routed))} {_words(own)}"


@dataclass(frozen=True)
class Gemv:
    """What one program for DsGemv is made for: a row of `depth` values times a weight of `rows` rows."""

    depth: int
    rows: int
    dtype: str

    inputs = ("x", "weight")
    outputs = ("y",)

    def key(self) -> str:
        """As that of a `Layer`."""
        return f"DsGemv {_words(vars(self))}"


@dataclass(frozen=True)
class DecodeAttention:
    """What one program for DsDecodeAttention is made for: A heads of queries and G of keys, C slots, P positions."""

    heads: int
    groups: int
    width: int
    slots: int
    positions: int
    scale: float
    dtype: str

    inputs = ("qkv", "cos", "sin", "position", "past_key", "past_value")
    outputs = ("y", "present_key", "present_value")

    def key(self) -> str:
        """As that of a `Layer`."""
        return f"DsDecodeAttention {_words(vars(self))}"


OneToken = Gemv | DecodeAttention  # what takes one token alone


def float32(value: float) -> float:
    """As an attribute of a node holds it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _words(named: Mapping[str, Any]) -> str:
    """`name=value`, apart by blanks; of a float as many digits as tell any two apart."""

    def written(value: Any) -> str:
        if value is None:
            return "none"
        if isinstance(value, float):
            return f"{float32(value):.9g}"
        return str(int(value) if isinstance(value, bool) else value)

    return " ".join(f"{name}={written(value)}" for name, value in named.items())
