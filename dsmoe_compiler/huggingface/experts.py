"""The experts of transformers by `dsmoe::experts`: what `model.set_experts_implementation("dsmoe")` runs.

The weights, their layout and the biases are read off the module's flags. The activation is recognised by what the
module's own `_apply_gate` (or `act_fn`, without a gate) computes on random numbers. What the operator cannot express
is an error that says so.

T tokens, H hidden size, K experts a token.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch._dynamo
from torch import Tensor, fx, nn

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_passes.activations import identify_alone, identify_joined
from dsmoe_passes.result import Mismatch
from dsmoe_runtime.errors import ConfigError

ROWS = 64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Plan = tuple[str, float, float, str]  # activation, alpha, limit, layout

_PLANS: WeakKeyDictionary[nn.Module, tuple[str, Plan]] = WeakKeyDictionary()


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`hidden_states [T, H]`, `top_k_index` and `top_k_weights` `[T, K]` -> `[T, H]`, by `dsmoe::experts`.

    Like transformers' own implementations it computes in the weights' dtype, and skips slots whose id is no expert.
    Raises: ConfigError, if the operator cannot express this module.
    """
    activation, alpha, limit, layout = _plan_at(id(self)) if torch.compiler.is_dynamo_compiling() else plan(self)
    gated, biased = getattr(self, "has_gate", True), getattr(self, "has_bias", False)
    up = self.gate_up_proj if gated else self.up_proj
    up_bias = (self.gate_up_proj_bias if gated else self.up_proj_bias) if biased else None
    down_bias = self.down_proj_bias if biased else None
    out = torch.ops.dsmoe.experts(
        hidden_states.to(up.dtype),  # type: ignore[arg-type]
        top_k_index,
        top_k_weights,
        up,
        self.down_proj,
        up_bias,
        down_bias,
        activation,
        alpha,
        limit,
        layout,
    )
    return out.to(hidden_states.dtype)


@torch._dynamo.assume_constant_result
def _plan_at(address: int) -> Plan:
    """`plan` of the module whose `id` this is: Dynamo of torch 2.11 calls a function on constants only."""
    module: nn.Module = ctypes.cast(address, ctypes.py_object).value
    return plan(module)


def plan(module: nn.Module) -> Plan:
    """Activation, alpha, limit and layout of an experts module. Found once for a module and its settings.

    Raises: ConfigError with module, reason and way out.
    """
    settings = _settings(module)
    known = _PLANS.get(module)
    if known is not None and known[0] == settings:
        return known[1]
    reason = why_not(module)
    if reason is not None:
        raise _refusal(module, reason)
    # In a thread of its own nobody's tracing mode is on: the numbers tried out there are real and enter no graph.
    with ThreadPoolExecutor(1) as clean:
        found = clean.submit(_identify, module).result()
    _PLANS[module] = settings, found
    return found


def why_not(module: nn.Module) -> str | None:
    """What the operator cannot express, as far as the module's flags tell."""
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's output before weighting it"
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    for name in names:
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"its {name} is not one stacked [E, ., .] tensor"
        if weight.dtype not in DTYPES:
            return f"its {name} is {weight.dtype}: quantised weights have no kernels here"
    return None


def _identify(module: nn.Module) -> Plan:
    gated, transposed = getattr(module, "has_gate", True), getattr(module, "is_transposed", False)
    weight = module.gate_up_proj if gated else module.up_proj
    assert isinstance(weight, Tensor)
    width = weight.shape[-1 if transposed else -2]
    hidden, result = _call(module._apply_gate if gated else module.act_fn, width, width // 2 if gated else width)
    try:
        if gated:
            activation, layout = identify_joined([result], hidden, result, width)
        else:
            activation, layout = identify_alone([result], hidden, result, width), "ungated"
    except Mismatch as no:
        raise _refusal(module, str(no)) from None
    return activation.name, activation.alpha, activation.limit, layout + "_transposed" * transposed


def _call(function: Any, width: int, result_width: int) -> tuple[fx.Node, fx.Node]:
    """A region of one node, the call of `function`, as the recognition of activations reads it: input and result."""
    graph = fx.Graph()
    hidden = graph.placeholder("hidden")
    result = graph.call_function(lambda rows: function(rows), (hidden,))
    hidden.meta["val"], result.meta["val"] = torch.empty(ROWS, width), torch.empty(ROWS, result_width)
    return hidden, result


def _settings(module: nn.Module) -> str:
    """The plain values that a module was set up with: another value may be another activation."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    return f"{plain} {module._modules}"


def _refusal(module: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"dsmoe::experts cannot compute {type(module).__name__}: {reason}. "
        'Way out: model.set_experts_implementation("grouped_mm")'
    )
