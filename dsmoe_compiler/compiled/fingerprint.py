"""A text that is equal for two models whose graphs are equal: modules, their code, their settings, their tensors.

    layers.1.mlp  dsmoe_model.moe.MoE  training=False
      forward     the bytecode of each method, of the functions that it calls, and the constants that it reads
      weight      (64, 256) float32, its strides, and which other tensor lies in the same memory
      config      ModelConfig(...)

Values of tensors are left out: a graph holds their names. A class changed in memory is told by its bytecode, as a file
that changed is by the key of our sources. What could change a graph and cannot be read off here is refused by name.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, Enum, range)
# Of a class; what its __init__ made of a module is read off the module.
NOT_CODE = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"),
    *("__init__", "__dataclass_fields__", "__dataclass_params__", "__slotnames__"),
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OWN = frozenset(vars(nn.Module())) - {"training"}
STABLE = sys.stdlib_module_names | {"torch"}  # told by their versions
OURS = ("dsmoe_model", "dsmoe_passes", "dsmoe_runtime", "dsmoe_compiler")


class Unusual(Exception):
    """Something about a model that its graph may depend on and that no text stands for."""


def fingerprint(model: nn.Module) -> str:
    """Raises: Unusual, saying where and what."""
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(nn.modules.module, kind, None):
            raise Unusual("torch has hooks for all modules")
    lines, code, memory = [], _Code(), dict[tuple[int, int], str]()
    for name, module in model.named_modules(remove_duplicate=False):
        where = name or "the model"
        lines.append(f"{name} {_qualified(type(module))} {code.of_class(type(module), where)}")
        lines += [f"  {setting} {_plain(value, f'{where}.{setting}')}" for setting, value in _settings(module, where)]
        lines += [f"  {row}" for row in _tensors(name, module, memory)]
    return "\n".join([*lines, *code.lines()])


def _settings(module: nn.Module, where: str) -> Iterator[tuple[str, Any]]:
    for hooks in HOOKS:
        if getattr(module, hooks, None):
            raise Unusual(f"{where} has hooks")
    if hasattr(module, "parametrizations"):
        raise Unusual(f"{where} has parametrizations")
    for name, value in sorted(vars(module).items()):
        if name in OWN:
            continue
        if name == "forward":
            raise Unusual(f"{where} has a forward of its own, beside its class's")
        yield name, value


def _tensors(path: str, module: nn.Module, memory: dict[tuple[int, int], str]) -> Iterator[str]:
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    own: list[tuple[str, Tensor]] = [*parameters, *buffers]
    for name, tensor in own:
        full = f"{path}.{name}"
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Unusual(f"{full} is a {type(tensor).__name__}, not a plain tensor")
        place = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()))
        first = memory.setdefault(place, full)
        tied = "" if first == full else f" in the memory of {first}"
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.stride()} {tensor.device.type}{tied}"


def _plain(value: Any, where: str) -> str:
    """A value as text. Raises: Unusual, for one whose text does not say all of it."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_plain(v, where) for v in value)})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(_plain(v, where) for v in value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_plain(k, where)}: {_plain(v, where)}' for k, v in value.items())})"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{f.name}={_plain(getattr(value, f.name), where)}" for f in fields(value))
        return f"{_qualified(type(value))}({inside})"
    raise Unusual(f"{where} is a {type(value).__name__}")


class _Code:
    """The code that classes run, followed into the functions and constants that they name; torch's own is left out."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[str, Any]] = {}
        self.found: list[str] = []

    def lines(self) -> list[str]:
        return self.found

    def of_class(self, kind: type, where: str) -> str:
        """Its name; its methods and those of its bases become lines."""
        if kind.__module__.split(".")[0] in STABLE:
            return _qualified(kind)
        if id(kind) not in self.seen:
            self.seen[id(kind)] = (_qualified(kind), kind)
            for base in kind.__mro__[1:]:
                self.of_class(base, where)
            rows = [f"{name} {self.value(v, f'{where}: {kind.__name__}.{name}')}" for name, v in _members(kind)]
            self.found.append(f"class {_qualified(kind)} {[_qualified(base) for base in kind.__mro__]} {rows}")
        return self.seen[id(kind)][0]

    def value(self, value: Any, where: str) -> str:
        """Of a class's member, or of what a function names."""
        if isinstance(value, staticmethod | classmethod):
            return f"{type(value).__name__} {self.value(value.__func__, where)}"
        if isinstance(value, property):
            return f"property {[self.value(f, where) for f in (value.fget, value.fset) if f is not None]}"
        if isinstance(value, types.FunctionType):
            return self.function(value, where)
        if isinstance(value, type):
            return self.of_class(value, where)
        if isinstance(value, dict):
            return f"dict {[(self.value(k, where), self.value(v, where)) for k, v in value.items()]}"
        if isinstance(value, tuple | list):
            return f"{type(value).__name__} {[self.value(v, where) for v in value]}"
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in (*STABLE, *OURS):
                raise Unusual(f"{where} reads the module {value.__name__}, whose code is not followed")
            return f"module {value.__name__}"
        module = getattr(value, "__module__", None) or type(value).__module__
        if str(module).split(".")[0] in STABLE or isinstance(value, types.BuiltinFunctionType):
            return getattr(value, "__qualname__", None) or repr(value) if callable(value) else _plain(value, where)
        wrapped = getattr(value, "__wrapped__", None)
        return f"{type(value).__name__} {self.value(wrapped, where)}" if wrapped is not None else _plain(value, where)

    def function(self, function: types.FunctionType, where: str) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        if str(function.__module__).split(".")[0] in STABLE or id(function) in self.seen:
            return self.seen.get(id(function), (name,))[0]
        self.seen[id(function)] = (name, function)
        inside = f"{where}: {function.__name__}"
        cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
        held = [self.value(v, inside) for v in (function.__defaults__, function.__kwdefaults__, *cells)]
        known = function.__globals__
        named = [f"{n}={self.value(known[n], inside)}" for n in sorted(_names(function.__code__)) if n in known]
        self.found.append(f"def {name} {_bytecode(function.__code__)} {held} {named}")
        return name


def _members(kind: type) -> list[tuple[str, Any]]:
    own = sorted(vars(kind).items())
    return [(name, value) for name, value in own if name not in NOT_CODE and not _is_slot(value)]


def _is_slot(value: Any) -> bool:
    slots = types.MemberDescriptorType | types.GetSetDescriptorType | types.WrapperDescriptorType
    return isinstance(value, slots) or type(value).__name__ == "_tuplegetter"  # a field of a named tuple


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def _names(code: types.CodeType) -> set[str]:
    """What a function and those inside it call by a global name."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _bytecode(code: types.CodeType) -> str:
    consts = [_bytecode(const) if isinstance(const, types.CodeType) else _constant(const) for const in code.co_consts]
    return f"{code.co_code.hex()} {consts} {code.co_names} {code.co_varnames} {code.co_flags}"


def _constant(value: Any) -> str:
    return f"frozenset {sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
