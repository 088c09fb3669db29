"""While Dynamo traces for the back end "dsmoe", transformers' eager loop over experts is spelt as grouped GEMMs.

With `experts_implementation="eager"` a model iterates over the experts that were hit. Which ones depends on data, so
Dynamo breaks the graph there, and no GEMM of an expert would ever reach a back end. `grouped_mm` of transformers
computes the same sum in a form that can be traced.

`install` wraps the one method by which experts modules choose their forward. Called eagerly, or traced for any other
back end, it answers as before; models, configs and the registry are not touched. `torch.compile(backend="dsmoe")`
calls `install`, at once if transformers is there, else at the start of the first compilation at which it is (which
`torch._dynamo.reset()` forgets: then the back end does so itself, and the first graph after that misses it).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.symbolic_convert import InstructionTranslator

from dsmoe_compiler.huggingface.versions import why_not

log = logging.getLogger(__name__)
MODULE = "transformers.integrations.moe"
SPELLING = "grouped_mm"
LOOPS = ("eager", None)  # None: an experts module that was built without a model
_exporting = False


def traces_eager_experts(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a back end for which the eager loop is spelt traceably. Ours are; a recorder of graphs may be."""
    install()
    backend.dsmoe_traces_eager_experts = True  # type: ignore[attr-defined]
    return backend


@contextmanager
def traceable_experts() -> Iterator[None]:
    """While open, `torch.export.export` sees the traceable spelling: our own entry points name no back end."""
    global _exporting
    install()
    before, _exporting = _exporting, True
    try:
        yield
    finally:
        _exporting = before


def install(*_: Any) -> None:
    """Wrap transformers' choice of experts, once, if transformers is imported and of a version that we know."""
    module = sys.modules.get(MODULE)
    interface = getattr(module, "ExpertsInterface", None)  # None too while transformers is being imported
    if interface is None or hasattr(interface.get_interface, "__wrapped__") or not _known():
        return
    original = interface.get_interface

    @wraps(original)
    def get_interface(self: Any, experts_implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
        if torch.compiler.is_compiling() and experts_implementation in LOOPS and SPELLING in self and _for_us():
            return self[SPELLING]
        return original(self, experts_implementation, default)

    interface.get_interface = get_interface


def uninstall() -> None:
    """Undo `install`."""
    interface = getattr(sys.modules.get(MODULE), "ExpertsInterface", None)
    if interface is not None:
        interface.get_interface = getattr(interface.get_interface, "__wrapped__", interface.get_interface)


@torch._dynamo.assume_constant_result
def _for_us() -> bool:
    """Whether what is being traced goes to a back end of ours (asked while tracing only)."""
    ours = _exporting or getattr(_current_backend(), "dsmoe_traces_eager_experts", False)
    if ours:
        _say()
    return ours


def _current_backend() -> Any:
    """The innermost function that Dynamo will hand the graph to; None if Dynamo is not tracing."""
    try:
        backend = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return None
    while True:
        inner = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
        if inner is None:
            return backend
        backend = inner


@cache
def _known() -> bool:
    reason = why_not()
    if reason is not None:
        log.warning("models with experts_implementation='eager' are left alone: %s", reason)
    return reason is None


@cache
def _say() -> None:
    log.info(
        "experts_implementation='eager' is traced as %r: the same sum without a loop that depends on data", SPELLING
    )
