"""Triton's kernels run in its interpreter without a GPU, asked for before its import; compiles are not cached."""

from __future__ import annotations

import os

import torch

# The whole run, its workers and its subprocesses: on a CPU nothing but our kernels is Triton's. A test that compiles
# kernels for a GPU that is not here starts a process without the variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests change what compiles in place, which no key tells of; those of the cache turn it on.
os.environ.setdefault("DSMOE_COMPILE_CACHE", "0")
