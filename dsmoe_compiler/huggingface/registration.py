"""`dsmoe` among the experts implementations of transformers, and off again without a trace.

    with dsmoe.use_experts(model):                     # registers, sets, and puts both back at the end
        model.generate(**inputs)

    handle = dsmoe.register_experts()                  # or by hand: only registers the name
    model.set_experts_implementation("dsmoe")
    ...
    handle.remove()

The name goes into the mapping of transformers' one interface object, not into the class's; importing registers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dsmoe_compiler.huggingface.experts import experts_forward, plan
from dsmoe_compiler.huggingface.versions import check
from dsmoe_runtime.errors import ConfigError

NAME = "dsmoe"


class Registration:
    """The name `dsmoe` in transformers' registry, until `remove()` or the end of a `with`."""

    def __init__(self, *, new: bool) -> None:
        self._ours = new

    def remove(self) -> None:
        """Take the name out, if this registration put it in; models that are still set to it will not run."""
        if self._ours:
            self._ours = False
            _interface().pop(NAME, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_experts() -> Registration:
    """Make `model.set_experts_implementation("dsmoe")` possible, in eager, generate(), training and torch.compile.

    Registering twice is harmless: only the first registration's `remove` takes the name out.

    Raises: ConfigError, if transformers is missing or of a version that this code does not know, or the name is taken.
    """
    check("register_experts")
    interface = _interface()
    present = interface.get(NAME)
    if present not in (None, experts_forward):
        raise ConfigError(f"transformers already has an experts implementation {NAME!r}, which is not ours: {present}")
    interface[NAME] = experts_forward
    return Registration(new=present is None)


@contextmanager
def use_experts(model: nn.Module) -> Iterator[nn.Module]:
    """While open, every experts module of `model` runs `dsmoe::experts`; afterwards registry and configs are as before.

    Raises: ConfigError that names the first module that the operator cannot express; nothing is changed then.
    """
    with register_experts():
        configs = check_experts(model)
        before = [config._experts_implementation_internal for config in configs]
        try:
            for config in configs:
                config._experts_implementation_internal = NAME
            yield model
        finally:
            for config, value in zip(configs, before, strict=True):
                config._experts_implementation_internal = value


def check_experts(model: nn.Module) -> list[Any]:
    """The configs that choose the experts implementation in `model`.

    Raises: ConfigError, naming the module, if there is none or the operator cannot express one.
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        try:
            plan(module)
        except ConfigError as no:
            raise ConfigError(f"{name}: {no}") from None
        found[id(module.config)] = module.config
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts on transformers' experts interface. "
            'torch.compile(model, backend="dsmoe") needs none: it matches what is computed'
        )
    return list(found.values())


def is_experts(module: nn.Module) -> bool:
    """Whether `module` chooses its forward through transformers' experts interface."""
    return all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "has_gate", "config"))


def _interface() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS
