"""The narrow waist: dsmoe::route, dsmoe::experts, dsmoe::moe. Importing this package registers them."""

from dsmoe_runtime.ops import experts, moe, route

__all__ = ["experts", "moe", "route"]
