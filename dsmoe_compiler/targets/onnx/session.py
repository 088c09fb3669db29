"""An ONNX Runtime session that reads and writes torch tensors where they lie, on the CPU or on a GPU.

Copies of keys and values between the two libraries would cost more than many a decode step: inputs and outputs are
bound by address (IOBinding), and on a GPU both use torch's stream.

B sequences, S new tokens, P past ones, V vocabulary, L layers with routed experts, K experts a token.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_compiler.targets.onnx.function import LEAST_ONNXRUNTIME
from dsmoe_runtime.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    import onnxruntime

INSTALL = {
    "cpu": f'pip install "onnxruntime>={LEAST_ONNXRUNTIME}"',
    "cuda": f'pip install "onnxruntime-gpu>={LEAST_ONNXRUNTIME}"',
}
LIBRARY, KERNELS = "libdsmoe_ort.so", "kernels"  # of profile ort-cuda, beside the model
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}  # as onnx.TensorProto numbers them
Interface = dict[str, tuple[str, list[Any]]]
NAMES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}


class StepSession:
    """`(ids [B, S], past)` -> `(logits [B, V], experts [L, B*S, K], present)`; B, S and P are free.

    options: of `open_session`, which see. Calls from several threads wait for one another.
    """

    def __init__(self, path: Path, device: torch.device, **options: Any) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # see open_session
        with torch.cuda.stream(self._stream):
            self._session = open_session(path, device, **options)
        self._lock = threading.Lock()
        self.inputs, self.outputs = interface(self._session)
        self.past = list(self.inputs)[1:]
        self.present = [name for name in self.outputs if name.startswith("present.")]

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The inputs are trusted: `OnnxRunner` has checked them."""
        batch, length = ids_BS.shape
        present = [p.new_empty(batch, p.shape[1], p.shape[2] + length, p.shape[3]) for p in past]
        kind, (_, vocabulary) = self.outputs["logits"]
        logits = torch.empty(batch, vocabulary, dtype=NAMES[kind], device=self.device)
        layers, _, chosen = self.outputs["experts"][1]
        experts = torch.empty(layers, batch * length, chosen, dtype=torch.int64, device=self.device)
        given = {"input_ids": ids_BS.contiguous(), **{n: p.contiguous() for n, p in zip(self.past, past, strict=True)}}
        taken = {"logits": logits, "experts": experts, **dict(zip(self.present, present, strict=True))}
        with self._lock:
            binding = self._session.io_binding()
            for name, tensor in given.items():
                binding.bind_input(name, *place(tensor))
            for name, tensor in taken.items():
                if tensor.numel() == 0:  # a model without routed experts chooses none
                    continue
                binding.bind_output(name, *place(tensor))
            self._run(binding)
        return logits, experts, present

    def _run(self, binding: onnxruntime.IOBinding) -> None:
        if self._stream is None:
            self._session.run_with_iobinding(binding)
            return
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        self._session.run_with_iobinding(binding)
        here.wait_stream(self._stream)


def interface(session: onnxruntime.InferenceSession) -> tuple[Interface, Interface]:
    """Type and shape of every input and of every output by its name, in their order."""
    inputs, outputs = (
        {value.name: (value.type, value.shape) for value in side}
        for side in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


def place(tensor: Tensor) -> tuple[Any, ...]:
    """What a binding is told of a tensor: where it lies, its type and its shape."""
    return tensor.device.type, tensor.device.index or 0, TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def open_session(
    path: Path,
    device: torch.device,
    *,
    library: Path | None = None,
    threads: int | None = None,
    weights: Mapping[str, Any] | None = None,
    graph: bool = False,
) -> onnxruntime.InferenceSession:
    """A session on the provider of `device`, in the stream of torch's that is current.

    That must not be torch's first one: its handle is 0, which ONNX Runtime takes for none, and works in a stream of its
    own that waits for nobody.

    weights: initializers that the session takes as they lie, not from files. graph: runs are captured and replayed.
    Raises: TargetError if the provider is not installed, ArtifactError.
    """
    check_provider(device.type)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if library is not None:
        kernels = library.parent / KERNELS  # said, since a library that was loaded and then moved looks where it was
        if kernels.is_dir():
            options.add_session_config_entry("dsmoe.kernels", str(kernels))  # read when the library is registered
        options.register_custom_ops_library(str(library))
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    providers: list[Any] = [PROVIDERS[device.type]]
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        assert stream, "a session would not work in torch's first stream"
        settings = {"device_id": str(device.index or 0), "user_compute_stream": str(stream)}
        settings["use_tf32"] = "0"  # gates are in float32, and mean it
        settings |= {"enable_cuda_graph": "1"} if graph else {}
        providers = [(PROVIDERS["cuda"], settings), PROVIDERS["cpu"]]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # pybind11 has a class for every status, and no base for all of them
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} does not run {path}: {first_line(error)}"
        ) from None
    if session.get_providers()[0] != PROVIDERS[device.type]:
        raise TargetError(f"ONNX Runtime fell back to {session.get_providers()[0]}: it finds no working CUDA here")
    return session


def check_provider(target: str) -> None:
    """Raises: TargetError that says what to install, if ONNX Runtime or its provider for `target` is not there."""
    try:
        import onnxruntime
    except ImportError:
        raise TargetError(f"ONNX models run with ONNX Runtime, which is not installed: {INSTALL[target]}") from None
    there = onnxruntime.get_available_providers()
    if PROVIDERS[target] not in there:
        raise TargetError(
            f"target {target} needs ONNX Runtime's {PROVIDERS[target]}; {onnxruntime.__version__} here has "
            f"{', '.join(there)}. {INSTALL[target]}"
        )


def check_exporter() -> None:
    """Raises: TargetError that says what to install, if a package that writes ONNX models is not there."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "onnxruntime" and _installed("onnxruntime-gpu"):
                continue
            raise TargetError(f'writing ONNX needs {name}: pip install "dsmoe-compiler[onnx]"') from None


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]
