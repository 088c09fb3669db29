"""The artifact folder: a compiled model that needs nothing but this package and its torch to run.

    manifest.json            format, versions, source, shapes, processor, phases, layers, proof, hash of every file
    config.json              the model's configuration
    tokenizer.json, tokenizer_config.json    where the model has a tokenizer
    prefill.pt2, decode.pt2  native code, one package a phase; or
    model.onnx               both phases for ONNX Runtime; or
    model.json, objects/*.o, libmodel.so, ...    both phases through torch-mlir, see targets/mlir/packaging.py
    weights/*.safetensors    one set, for all phases
    report/                  what people look at

`manifest.json` is written last, so a folder without one is not an artifact. Loading runs native code: hashes tell a
damaged artifact from a whole one, not a hostile one from a good one. Load only what you would run.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler.artifact_files import CONFIG, MANIFEST, check_files, describe, inside, listed
from dsmoe_compiler.config import DTYPES, CompileConfig
from dsmoe_compiler.explanation import Explanation
from dsmoe_compiler.runner import Runner, Shapes, place_of
from dsmoe_compiler.staging import Stage
from dsmoe_compiler.targets import aoti
from dsmoe_compiler.targets.aoti import PhaseReport
from dsmoe_compiler.targets.mlir.opening import open_mlir
from dsmoe_compiler.targets.onnx.opening import check_model
from dsmoe_compiler.targets.onnx.runner import open_onnx
from dsmoe_compiler.targets.package import Program, open_package
from dsmoe_compiler.targets.replay import Replayed
from dsmoe_compiler.targets.weights import WEIGHTS, read_weights
from dsmoe_compiler.version import __version__
from dsmoe_model.checkpoint import Tokenizer, load_tokenizer
from dsmoe_model.checkpoint.json_files import read_json, write_json
from dsmoe_model.config import ModelConfig
from dsmoe_runtime.errors import ArtifactError, CheckpointError, ConfigError

FORMAT, FORMAT_VERSION = "dsmoe-artifact", 1
MODEL_TYPE = "deepseek"
MANIFEST_LIMIT, CONFIG_LIMIT = 64 * 2**20, 4 * 2**20  # bytes
FIELDS: dict[str, type] = {
    "format_version": int,
    "tool_version": str,
    "torch_version": str,
    "target": str,
    "processor": dict,
    "dtype": str,
    "batch_size": int,
    "capacity": int,
    "phases": dict,
    "files": dict,
}


class Artifact:
    """A compiled model that is not published yet: a stage and its manifest. `save` publishes, `discard` forgets."""

    def __init__(
        self, stage: Stage, *, config: dict[str, Any], tokenizer: Tokenizer | None, manifest: dict[str, Any]
    ) -> None:
        self.stage = stage
        self.folder = stage.path
        self.config = config
        self.tokenizer = tokenizer
        self.manifest = manifest

    def runner(
        self,
        device: torch.device | str | None = None,
        *,
        cuda_graph: bool = True,
        library: bool = False,
        threads: int | None = None,
    ) -> Runner:
        """Run it from where it lies now, published or not; the arguments are those of `load`."""
        seen = interface(self.folder, self.manifest, self.config)
        if "onnx" in self.manifest:
            return open_onnx(self.folder, self.manifest, seen, self.tokenizer, device, library, threads)
        if "mlir" in self.manifest:
            return open_mlir(self.folder, self.manifest, seen, self.tokenizer, device, inside)
        return open_runner(
            self.folder, self.manifest, self.config, self.tokenizer, device=device, cuda_graph=cuda_graph
        )

    def save(self, folder: str | Path) -> Path:
        """Publish to `folder`, all at once; an artifact that is there is replaced. A second `save` makes a copy.

        Raises: ArtifactError, if something that is no artifact is there.
        """
        if self.folder != self.stage.path:
            self.stage = Stage(Path(folder))
            shutil.copytree(self.folder, self.stage.path, dirs_exist_ok=True)
            (self.stage.path / MANIFEST).unlink()
        self.manifest["files"] = {name: describe(self.stage.path / name) for name in listed(self.stage.path)}
        write_json(self.stage.path / MANIFEST, self.manifest)
        try:
            self.folder = self.stage.publish(Path(folder), replaceable=is_artifact)
        except BaseException:
            (self.stage.path / MANIFEST).unlink(missing_ok=True)
            raise
        return self.folder

    def discard(self) -> None:
        """Remove what has not been published."""
        self.stage.discard()


def assemble(
    stage: Stage,
    phases: dict[str, PhaseReport],
    *,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    target: str,
    dtype: str,
    batch_size: int,
    capacity: int,
    source: str,
    facts: dict[str, Any],
    processor: dict[str, Any] | None = None,
) -> Artifact:
    """An artifact from a stage that `aoti.package` has filled. `facts`: further manifest entries (layers, proof)."""
    write_json(stage.path / CONFIG, config)
    if tokenizer is not None:
        tokenizer.save(stage.path)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool_version": __version__,
        "torch_version": torch.__version__,
        "source": source,
        "target": target,
        "processor": processor or (aoti.requirement(target) if phases else {}),
        "dtype": dtype,
        "batch_size": batch_size,
        "capacity": capacity,
        "phases": {name: report.to_dict() for name, report in phases.items()},
        **facts,
    }
    return Artifact(stage, config=config, tokenizer=tokenizer, manifest=manifest)


def facts_of(config: CompileConfig, explanation: Explanation) -> dict[str, Any]:
    """The manifest's entries about what was asked for and what was fused; the proof is not there yet."""
    return {
        "options": config.to_dict(),
        "layers": explanation.to_dict()["layers"],
        "passes": [f"{p.graph}: {p.name}, {p.rewritten} rewritten" for p in explanation.passes if p.rewritten],
        "capture_seconds": explanation.capture_seconds,
        "verification": None,
    }


def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    check_weights: bool = True,
    cuda_graph: bool = True,
    library: bool = False,
    threads: int | None = None,
) -> Runner:
    """A runner for a published artifact.

    `check_weights` False skips the hashes of `weights/`, the bulk of a large one. `cuda_graph` False launches each
    kernel of a decode step by itself, as a profiler wants it; on the CPU it means nothing. Of ONNX models: `library`
    runs the experts by our library, which is built for this machine if it has to be, instead of the functions in the
    file; `threads` of an operator, None: as many as there are cores.

    Raises: ArtifactError for a folder that is none, is damaged or altered, is newer than this tool, or was compiled for
    another torch or processor.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest["files"], check_weights=check_weights)
        config = read_json(inside(folder, CONFIG), limit=CONFIG_LIMIT)
        tokenizer = load_tokenizer(folder) if "tokenizer.json" in manifest["files"] else None
    except (CheckpointError, ConfigError) as error:
        raise ArtifactError(f"{folder} is damaged: {error}") from None
    if "onnx" in manifest:
        check_model(folder, check_weights=check_weights)
        return open_onnx(folder, manifest, interface(folder, manifest, config), tokenizer, device, library, threads)
    if library or threads is not None:
        raise ConfigError(f"{folder} holds native code, not an ONNX model: library and threads mean nothing to it")
    if "mlir" in manifest:
        return open_mlir(folder, manifest, interface(folder, manifest, config), tokenizer, device, inside)
    return open_runner(folder, manifest, config, tokenizer, device=device, cuda_graph=cuda_graph)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if this tool and this torch can run what it describes. Raises: ArtifactError, CheckpointError."""
    if not (folder / MANIFEST).is_file():
        why = "there is no such folder" if not folder.is_dir() else f"it has no {MANIFEST}"
        raise ArtifactError(f"{folder} is not an artifact: {why}. `dsmoe compile MODEL -o {folder}` makes one")
    manifest = read_json(inside(folder, MANIFEST), limit=MANIFEST_LIMIT)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder} is not an artifact: format is {str(manifest.get('format'))[:40]!r}, not {FORMAT!r}"
        )
    made, version = str(manifest.get("tool_version"))[:40], manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION or release(made) > release(__version__):
        raise ArtifactError(
            f"{folder} was written by dsmoe-compiler {made} (format {str(version)[:40]}); this is {__version__} "
            f"(format {FORMAT_VERSION}): upgrade this installation, or compile again with it"
        )
    wrong = next((name for name, kind in FIELDS.items() if type(manifest.get(name)) is not kind), None)
    if wrong is not None:
        raise ArtifactError(f"{folder} is damaged: {wrong} in {MANIFEST} is not a {FIELDS[wrong].__name__}")
    theirs, ours = manifest["torch_version"].partition("+")[0], torch.__version__.partition("+")[0]
    if theirs != ours and manifest["phases"]:
        raise ArtifactError(
            f"{folder} was compiled with torch {theirs}, this is {ours}: packages of AOTInductor run with the torch "
            f"that made them. Install torch=={theirs}, or compile the model again (source: {manifest.get('source')})"
        )
    return manifest


def open_runner(
    folder: Path,
    manifest: dict[str, Any],
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    *,
    device: torch.device | str | None,
    cuda_graph: bool,
) -> Runner:
    """Load weights and packages. Raises: ArtifactError, if they do not fit each other or this machine."""
    target = manifest["target"]
    vocab_size, shapes = interface(folder, manifest, config)
    if manifest["dtype"] not in DTYPES:
        raise ArtifactError(f"{folder} is damaged: dtype is {manifest['dtype'][:40]!r}, not one of {', '.join(DTYPES)}")
    place = place_of(folder, target, device)
    why = aoti.unfit(target, manifest["processor"], place)
    if why:
        raise ArtifactError(f"{folder} cannot run here: {why}. Compile it again on this machine")
    weights = read_weights([inside(folder, name) for name in listed(folder) if name.startswith(f"{WEIGHTS}/")], place)
    programs: dict[str, Program] = {}
    for phase, report in manifest["phases"].items():
        try:
            constants = {own: weights[stored] for own, stored in report["constants"].items()}
            file = inside(folder, report["file"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder} is damaged: phase {phase[:40]!r} lacks {error}") from None
        programs[phase] = open_package(file, constants, place)
    if set(programs) != {"prefill", "decode"}:
        raise ArtifactError(f"{folder} is damaged: its phases are {sorted(programs)}, not prefill and decode")
    if target == "cuda" and cuda_graph:
        programs["decode"] = Replayed(programs["decode"], moving=2, device=place)
    return Runner(vocab_size, shapes, manifest=manifest, tokenizer=tokenizer, programs=programs, device=place)


def interface(folder: Path, manifest: dict[str, Any], config: dict[str, Any]) -> tuple[int, Shapes]:
    """Size of the vocabulary and shapes of the cache. Raises: ArtifactError."""
    batch, capacity = manifest["batch_size"], manifest["capacity"]
    try:
        if "transformers" not in manifest:
            own = ModelConfig.from_dict({key: value for key, value in config.items() if key != "model_type"})
            shape = (batch, own.num_key_value_heads, capacity, own.head_dim)
            return own.vocab_size, [(shape, shape)] * own.num_hidden_layers
        said = manifest["transformers"]
        shapes = [tuple(tuple(side) for side in pair) for pair in said["cache"]]
        sides = [side for pair in shapes for side in pair]
        if not shapes or any(type(n) is not int or n < 1 for side in sides for n in side):
            raise ConfigError("its cache has sizes that are no positive integers")
        if {len(pair) for pair in shapes} != {2} or {(s[0], s[2], len(s)) for s in sides} != {(batch, capacity, 4)}:
            raise ConfigError(f"its cache is not of {batch} rows and {capacity} positions")
        return int(said["vocab_size"]), shapes  # type: ignore[return-value]
    except (ConfigError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{folder} is damaged: {error}") from None


def is_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact of any version, and so may be replaced by one."""
    try:
        return read_json(inside(folder, MANIFEST), limit=MANIFEST_LIMIT).get("format") == FORMAT
    except (ArtifactError, CheckpointError, OSError):
        return False


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
