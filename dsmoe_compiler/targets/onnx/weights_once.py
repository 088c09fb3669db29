"""The weights of several ONNX files, once in a GPU's memory.

Two sessions on one artifact would each read its weights: ONNX Runtime takes what it is handed by `add_initializer` as
it lies, if it lies where the session wants it. Before 1.26 its Python takes no tensor so (`OrtValue.from_dlpack`); then
each session has weights of its own, and a warning says so.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_compiler.targets.onnx.session import TYPES

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)
SHARED_SINCE = "1.26"  # ONNX Runtime
ELEMENTS = {number: dtype for dtype, number in TYPES.items()} | {6: torch.int32, 9: torch.bool, 11: torch.float64}


class Weights:
    """External data of the files in a folder, read when it is first asked for, on `device`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        import onnxruntime

        self.shared = hasattr(onnxruntime.OrtValue, "from_dlpack")
        if not self.shared:
            log.warning(
                "%s: onnxruntime %s cannot hand weights to two sessions, so each holds its own: twice the memory; "
                "onnxruntime %s can",
                folder, onnxruntime.__version__, SHARED_SINCE,
            )  # fmt: skip
        self.folder, self.device = folder, device
        self._held: dict[tuple[str, int, int, tuple[int, ...]], Tensor] = {}

    def of(self, file: str) -> dict[str, Any]:
        """Initializers of one file by name, as ONNX Runtime's values on this memory; they live as long as `self`."""
        import onnx
        from onnxruntime import OrtValue

        if not self.shared:
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
