"""The narrow waist: dsmoe::route, dsmoe::experts, dsmoe::moe. Importing this package registers them."""

from dsmoe_runtime.ops import experts, experts_backward, experts_training, moe, moe_backward, moe_training, route

__all__ = ["experts", "experts_backward", "experts_training", "moe", "moe_backward", "moe_training", "route"]
