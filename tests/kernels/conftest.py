"""Where the kernels under test run, and memory in which nothing that was forgotten looks like a result."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

GPU = torch.cuda.is_available()
POISON = 2**30  # an index that no tensor here has


def why_not() -> str | None:
    """The reason for which this folder's kernels cannot be run at all, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; the kernels need it, also in its interpreter"
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU, and TRITON_INTERPRET is set to something other than 1"
    return None


WHY_NOT = why_not()


class Unrunnable(pytest.Module):
    """A module of tests that is skipped before it is imported, with its reason."""

    def collect(self):
        pytest.skip(WHY_NOT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return Unrunnable.from_parent(parent, path=module_path) if WHY_NOT else None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where the kernels run: the interpreter's "cpu" where there is no GPU, else "cuda"."""
    if (request.param == "cuda") != GPU:
        pytest.skip("no GPU here" if request.param == "cuda" else "a GPU is here, and kernels are compiled for it")
    return request.param


def poisoned(allocate):
    """`allocate`, whose new tensors hold NaN, or an index out of bounds, and not what happens to lie in memory."""

    def allocated(*arguments, **options):
        tensor = allocate(*arguments, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)

    return allocated


@pytest.fixture
def poison(monkeypatch) -> None:
    """Every uninitialised tensor that is asked for from Python is poisoned: what no kernel wrote cannot pass."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
