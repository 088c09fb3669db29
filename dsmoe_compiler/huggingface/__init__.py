"""Models that transformers builds: experts by our operator, the eager loop made traceable, what was fused, a survey."""

from dsmoe_compiler.huggingface.eager_loop import traceable_experts, traces_eager_experts
from dsmoe_compiler.huggingface.registration import Registration, register_experts, use_experts

__all__ = ["Registration", "register_experts", "traceable_experts", "traces_eager_experts", "use_experts"]
