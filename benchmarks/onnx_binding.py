"""Sessions of ONNX Runtime over torch's memory, as replays that the GPU benchmarks time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Replay
from benchmarks.onnx_graphs import TYPES

WARM = 3  # the first runs allocate, then one is captured


def replay(session: Any, given: dict[str, Tensor], taken: dict[str, Tensor], device: torch.device) -> Replay:
    """Runs of the session that read `given` and write `taken`; a captured one is replayed from now on."""
    import onnxruntime

    run, binding = onnxruntime.RunOptions(), session.io_binding()
    if device.type == "cuda":
        run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    for bind, tensors in ((binding.bind_input, given), (binding.bind_output, taken)):
        for name, tensor in tensors.items():
            bind(name, device.type, device.index or 0, TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    def once(held: tuple[Any, ...] = (given, taken)) -> None:  # a binding keeps no tensor alive
        session.run_with_iobinding(binding, run)

    made = Replay([once], device, graph=False)
    for _ in range(WARM):
        made.run()
    return made
