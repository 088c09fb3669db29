"""What an operator launches, for every number of tokens T at once, noted without a GPU.

The host part runs on tensors without memory whose first dimension is a symbol. Grids, integers and the sizes of
workspaces then come out as expressions in T. Where the host part compares something that depends on T (how many slots
a sort can take, say), torch notes what it took for true, a *guard*: a record holds for the T for which its guards do.
So ranges are found, not written down: a plan's range is recorded from its first T, up to where a guard ends it, and
again from there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.value_ranges import ValueRanges

from dsmoe_runtime.ort_library import one_token
from dsmoe_runtime.ort_library.hosts import Plans, inputs, launched, plans_for
from dsmoe_runtime.ort_library.layer import Layer, MoELayer, OneToken

MOST_TOKENS = 1 << 20
RECORDING = threading.Lock()


@dataclass(frozen=True)
class Note:
    """One launch as the host part asked for it; `early`: it may start before the one ahead has ended."""

    kernel: Any
    grid: tuple[int | SymInt, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    early: bool


@dataclass(frozen=True)
class Record:
    """The launches for `first` to `last` tokens.

    buffers: a name for each storage (by its address): the operator's inputs and outputs, and `room0`, `room1`, ...,
    workspaces of so many bytes as `rooms` has them. tensors: what must stay alive, so that addresses stay different.
    """

    first: int
    last: int
    plans: Plans | None  # of an operator for any number of tokens
    notes: list[Note]
    buffers: dict[int, str]
    rooms: list[int | SymInt]
    tensors: list[Tensor] = field(repr=False)


def records(layer: Layer | MoELayer | OneToken) -> Iterator[Record]:
    """One after the other, from 1 token to MOST_TOKENS. Raises: TargetError for what our kernels alone cannot do."""
    from dsmoe_runtime.kernels.choose import bucket

    if isinstance(layer, OneToken):
        yield once(layer)
        return
    first = 1
    while first <= MOST_TOKENS:
        plans, last = plans_at(layer, first), bucket(first)
        while last < MOST_TOKENS and plans_at(layer, last + 1) == plans:
            last = bucket(last + 1)
        made = record(layer, plans, first, min(last, MOST_TOKENS))
        yield made
        first = made.last + 1


def plans_at(layer: Layer | MoELayer, tokens: int) -> Plans:
    """As a GPU would choose them."""
    with without_gpu([]):
        return plans_for(layer, inputs(layer, tokens))


def record(layer: Layer | MoELayer, plans: Plans, first: int, last: int) -> Record:
    """From `first` up to `last`, or to an earlier end if the launches change before."""
    notes: list[Note] = []
    if first == last or first == 1:  # torch takes no symbol for what may be 1
        last, tokens, environment = first, first, None
    else:
        tokens, environment = symbol(first, last)
    with without_gpu(notes):
        given = inputs(layer, tokens)
        taken = launched(layer, given, plans)
    named = [fixed(note) for note in notes]
    if environment is not None:
        last = last_that_holds(environment, first, last)
    return Record(first, last, plans, named, *placed(named, given | taken))


def once(kind: OneToken) -> Record:
    """For one token, the only number that there is."""
    notes: list[Note] = []
    with without_gpu(notes):
        given = one_token.inputs(kind)
        taken = one_token.launched(kind, given)
    return Record(1, 1, None, notes, *placed(notes, given | taken))


def placed(
    notes: list[Note], operands: Mapping[str, Tensor | None]
) -> tuple[dict[int, str], list[int | SymInt], list[Tensor]]:
    """The buffers, rooms and tensors of a record."""
    kept = {name: tensor for name, tensor in operands.items() if tensor is not None}
    buffers = {address(tensor): name for name, tensor in kept.items()}
    rooms: list[int | SymInt] = []
    for tensor in [tensor for note in notes for tensor in tensors_of(note)]:
        if address(tensor) not in buffers:
            buffers[address(tensor)] = f"room{len(rooms)}"
            rooms.append(tensor.untyped_storage().nbytes())
    return buffers, rooms, list(kept.values())


def symbol(first: int, last: int) -> tuple[Any, ShapeEnv]:
    """A number of tokens that may be any of these, and what notes the guards on it."""
    environment, source = ShapeEnv(), ConstantSource("T")
    limits: Any = StrictMinMaxConstraint(vr=ValueRanges(first, last), warn_only=False)
    made = environment.create_symbol(first, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=limits)
    return environment.create_symintnode(made, hint=first, source=source), environment


def last_that_holds(environment: ShapeEnv, first: int, last: int) -> int:
    """The end of the T from `first` on for which all guards hold: each compares something that only grows with T."""
    guards = [guard.expr for guard in environment.guards]

    def holds(tokens: int) -> bool:
        return all(bool(guard.subs(dict.fromkeys(guard.free_symbols, tokens))) for guard in guards)

    assert holds(first), (first, guards)
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if holds(middle) else (first, middle - 1)
    return first


def fixed(note: Note) -> Note:
    """With plain numbers for a kernel's constants, even where they depend on T: a guard then says that they stay so."""
    return Note(
        note.kernel, note.grid, note.arguments,
        {name: int(value) if isinstance(value, SymInt) else value for name, value in note.named.items()}, note.early,
    )  # fmt: skip


def tensors_of(note: Note) -> list[Tensor]:
    """The tensors among a launch's arguments, those behind descriptors as well."""
    found = [getattr(argument, "base", argument) for argument in note.arguments]
    return [argument for argument in found if isinstance(argument, Tensor)]


def address(tensor: Tensor) -> int:
    """What tells storages apart that have no memory."""
    return tensor.untyped_storage()._cdata


class Memoryless(TorchFunctionMode):
    """Tensors without memory have an address that any copy engine takes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.data_ptr and args[0].device.type == "meta":
            return 0
        return function(*args, **(kwargs or {}))


@contextmanager
def without_gpu(notes: list[Note]) -> Iterator[None]:
    """In this thread launches are noted, as for a Hopper GPU; in others, kernels run as ever."""
    from dsmoe_runtime.kernels import attend, decode_attention, dispatch, experts, gemv, moe, route, specialised

    owner = threading.get_ident()
    hosts = (experts, dispatch, moe, route, specialised, gemv, attend, decode_attention)

    def replaced(name: str, own: Any, other: Any) -> Any:
        return lambda *args, **kwargs: (own if threading.get_ident() == owner else other)(*args, **kwargs)

    def note(kernel: Any, grid: tuple[Any, ...], *arguments: Any, pdl: bool = False, **named: Any) -> None:
        notes.append(Note(kernel, grid, arguments, named, pdl))

    with ExitStack() as stack:
        stack.enter_context(RECORDING)
        for module in hosts:
            for name, own in (("launch", note), ("chained", lambda device: True)):
                before = getattr(module, name)
                stack.callback(setattr, module, name, before)
                setattr(module, name, replaced(name, own, before))
        stack.enter_context(Memoryless())
        stack.enter_context(enable_python_dispatcher())
        yield
