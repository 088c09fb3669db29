"""The narrow waist: dsmoe::route, experts, moe, attend and gemv. Importing this package registers them."""

from dsmoe_runtime.ops import (
    attend,
    experts,
    experts_backward,
    experts_training,
    gemv,
    moe,
    moe_backward,
    moe_training,
    route,
)

__all__ = [
    "attend",
    "experts",
    "experts_backward",
    "experts_training",
    "gemv",
    "moe",
    "moe_backward",
    "moe_training",
    "route",
]
