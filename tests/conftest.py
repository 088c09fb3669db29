"""Without a GPU Triton's kernels run in its interpreter, which must be asked for before anything imports Triton."""

from __future__ import annotations

import os

import torch

# The whole run, its workers and its subprocesses: on a CPU nothing but our kernels is Triton's. A test that compiles
# kernels for a GPU that is not here starts a process without the variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
