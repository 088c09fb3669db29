"""The weights of several ONNX files, once in a GPU's memory.

Two sessions on one artifact would each read its weights: ONNX Runtime takes what it is handed by `add_initializer` as
it lies, if it lies where the session wants it. (Where ONNX Runtime's Python has no `OrtValue.from_dlpack`, no tensor
can be handed over so, and sessions have weights of their own.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_compiler.targets.onnx.session import TYPES

if TYPE_CHECKING:
    import onnx

ELEMENTS = {number: dtype for dtype, number in TYPES.items()} | {6: torch.int32, 9: torch.bool, 11: torch.float64}


class Weights:
    """External data of the files in a folder, read when it is first asked for, on `device`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._held: dict[tuple[str, int, int, tuple[int, ...]], Tensor] = {}

    def of(self, file: str) -> dict[str, Any]:
        """Initializers of one file by name, as ONNX Runtime's values on this memory; they live as long as `self`."""
        import onnx
        from onnxruntime import OrtValue

        if not hasattr(OrtValue, "from_dlpack"):
            return {}
        proto = onnx.load(self.folder / file, load_external_data=False)
        outside = [t for t in proto.graph.initializer if t.data_location == t.EXTERNAL]
        return {tensor.name: OrtValue.from_dlpack(self._tensor(tensor)) for tensor in outside}

    def _tensor(self, tensor: onnx.TensorProto) -> Tensor:
        said = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(said["offset"]), int(said["length"])  # `opening` has checked them
        key = (said["location"], offset, length, tuple(tensor.dims))
        if key not in self._held:
            path = self.folder / said["location"]
            bytes_ = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            here = bytes_[offset : offset + length].to(self.device, copy=True)
            self._held[key] = here.view(ELEMENTS[tensor.data_type]).view(tuple(tensor.dims))
        return self._held[key]
