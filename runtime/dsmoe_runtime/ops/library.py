"""One library for the namespace `dsmoe`, and the four registrations that every operator of it has."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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


def register_training(name: str, training: str, outputs: int) -> None:
    """Where an input asks for a gradient, run `dsmoe::training` for `dsmoe::name`; return its first `outputs` results.

    It takes the same arguments, also returns what its backward would otherwise compute again, and has the gradient.
    Graphs made for inference, and those that matchers see, keep `dsmoe::name`.
    """
    operator = getattr(torch.ops.dsmoe, name).default

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            results = getattr(torch.ops.dsmoe, training)(*inputs)
            return results[0] if outputs == 1 else tuple(results[:outputs])
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def refuse_second_backward(name: str) -> None:
    """Make the gradient of a backward operator an error that names it; silence would be a wrong second derivative."""
    refuse_backward(
        name, "the operators have first derivatives only. For a second one differentiate the eager model (dsmoe_model)"
    )


def refuse_backward(name: str, reason: str) -> None:
    """Make the gradient of `dsmoe::name` an error that says why there is none."""

    def backward(ctx: Any, *_: Any) -> None:
        raise CaptureError(f"dsmoe::{name} has no gradient of its own: {reason}")

    register_autograd(name, backward, lambda ctx, inputs, output: None)
