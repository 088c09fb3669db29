"""One library for the namespace `dsmoe`, and the four registrations that every operator of it has."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from dsmoe_runtime.errors import CaptureError

LIBRARY = Library("dsmoe", "DEF")


def register(schema: str, rule: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator of `schema`, with one plain-torch rule for every device, and return its default overload.

    The rule is the specification. A fused kernel for a device registers itself for that device's key, over this one.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, rule, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsmoe::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dsmoe, name).default


def register_autograd(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give the operator `dsmoe::name` its gradient."""
    torch.library.register_autograd(f"dsmoe::{name}", backward, setup_context=save, lib=LIBRARY)


def refuse_second_backward(name: str) -> None:
    """Make the gradient of a backward operator an error that names it; silence would be a wrong second derivative."""

    def backward(ctx: Any, *_: Any) -> None:
        raise CaptureError(
            f"dsmoe::{name} has no gradient of its own: the operators have first derivatives only. "
            "For a second one differentiate the eager model (dsmoe_model)"
        )

    register_autograd(name, backward, lambda ctx, inputs, output: None)
