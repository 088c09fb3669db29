"""What a user asks of a compile."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from dsmoe_runtime.errors import ConfigError, TargetError
from dsmoe_runtime.mlir.levels import LEVELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGETS = ("cpu", "cuda")
FORMATS = ("aoti", "onnx", "mlir")
PROFILES = ("portable", "ort-cuda", "ort-contrib")
DEFAULT_CAPACITY = 512


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """`target` None: CUDA where there is a GPU, else the CPU. `dtype` None: as stored, or as the model is.

    `formats`: one of them an artifact; "mlir" is for the CPU, through torch-mlir.
    `profile`: of "onnx", for any ONNX Runtime ("portable"; target None is then the
    CPU), for our kernels on a GPU ("ort-cuda"), or by ONNX Runtime's own operator ("ort-contrib").
    `levels`: of "mlir", the instructions to compile for, "avx2", "avx512" or both in one artifact, which then takes
    what the processor has; None: avx2, and the best that this machine has. Each costs its own time of LLVM.
    `functions` False leaves the op's meaning in standard operators out of an "ort-cuda" model.
    `max_seq_len`: positions of the KV cache, prompt and answer together; None: the model's own limit, at most 512 where
    memory is set aside for them. `batch_size`: sequences at a time; "onnx" takes any number of them.
    `strict`: a layer left alone is an error. `verify` False skips the proof, and the manifest says so. `debug`: compare
    numbers after each pass.

    Raises: ConfigError for a value outside its range, TargetError for a target that this machine has not.
    """

    target: str | None = None
    formats: tuple[str, ...] = ("aoti",)
    dtype: str | None = None
    profile: str = "portable"
    functions: bool = True
    levels: tuple[str, ...] | None = None
    batch_size: int = 1
    max_seq_len: int | None = None
    strict: bool = False
    verify: bool = True
    seed: int = 0
    debug: bool = False

    def __post_init__(self) -> None:
        if self.target is None:
            object.__setattr__(self, "target", self._target())
        if self.target not in TARGETS:
            raise ConfigError(f"target is {self.target!r}; it must be one of {', '.join(TARGETS)}")
        if "mlir" in self.formats and self.target != "cpu":
            raise ConfigError(f"format mlir is for target cpu; target is {self.target!r}")
        ahead = "onnx" in self.formats and not self.verify  # written without a look at the GPU that it is for
        if self.target == "cuda" and not torch.cuda.is_available() and not ahead:
            raise TargetError(f"target cuda needs a GPU; torch {torch.__version__} sees none here. Use target cpu")
        unknown = [f for f in self.formats if f not in FORMATS]
        if unknown or not self.formats:
            raise ConfigError(f"formats is {self.formats!r}; this version writes {', '.join(FORMATS)}")
        if len(self.formats) > 1:
            raise ConfigError(f"formats is {self.formats!r}; an artifact has one format: compile once for each")
        self._check_profile()
        self._check_levels()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        for name in ("batch_size", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")

    def _target(self) -> str:
        if "mlir" in self.formats or ("onnx" in self.formats and self.profile != "ort-cuda"):
            return "cpu"
        return "cuda" if torch.cuda.is_available() or self.profile == "ort-cuda" else "cpu"

    def _check_profile(self) -> None:
        if self.profile not in PROFILES:
            raise ConfigError(f"profile is {self.profile!r}; it must be one of {', '.join(PROFILES)}")
        if not self.functions and self.profile != "ort-cuda":
            raise ConfigError(f"functions may be left out of profile ort-cuda only; profile is {self.profile!r}")
        if self.formats != ("onnx",):
            if self.profile != "portable":
                raise ConfigError(f"profile {self.profile!r} belongs to format onnx; formats is {self.formats!r}")
            return
        if self.profile == "ort-cuda" and self.target != "cuda":
            raise ConfigError(f"profile ort-cuda is for target cuda; target is {self.target!r}")
        if self.batch_size != 1:
            raise ConfigError(f"batch_size is {self.batch_size}; an ONNX model takes any number of rows: leave it out")

    def _check_levels(self) -> None:
        if self.levels is None:
            return
        if self.formats != ("mlir",):
            raise ConfigError(f"levels {self.levels!r} belong to format mlir; formats is {self.formats!r}")
        if not self.levels or len(set(self.levels)) < len(self.levels) or not set(self.levels) <= set(LEVELS):
            raise ConfigError(f"levels is {self.levels!r}; name each of {', '.join(LEVELS)} once at most")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as torch has it."""
        return None if self.dtype is None else DTYPES[self.dtype]

    @property
    def capture_device(self) -> str:
        """Where the model is loaded and captured: ONNX knows no device, and is written from the CPU."""
        return "cpu" if self.formats == ("onnx",) else self.target or "cpu"

    def capacity(self, limit: int) -> int:
        """Positions of the KV cache. Raises: ConfigError, if the model has fewer, `limit`, than were asked for."""
        if self.max_seq_len is None:
            return min(limit, DEFAULT_CAPACITY)
        if self.max_seq_len > limit:
            raise ConfigError(f"max_seq_len is {self.max_seq_len}, but the model's max_position_embeddings is {limit}")
        return self.max_seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"formats": list(self.formats), "levels": self.levels and list(self.levels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompileConfig:
        """The inverse of `to_dict`. Raises: ConfigError for unknown keys."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown compile options: {', '.join(unknown)}")
        levels = values.get("levels")
        lists = {"formats": tuple(values.get("formats", ("aoti",))), "levels": levels and tuple(levels)}
        return cls(**values | lists)
