"""Compile, explain and load: what `import dsmoe_compiler` offers.

artifact = dsmoe.compile("deepseek-moe-tiny", config=dsmoe.CompileConfig(target="cpu"))
artifact.save("out/tiny")
runner = dsmoe.load("out/tiny")
print(runner.generate_text("Once upon a time", max_new_tokens=32))
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dsmoe_compiler import artifact as artifacts
from dsmoe_compiler.artifact import Artifact, load
from dsmoe_compiler.capture import Capture, explain_module
from dsmoe_compiler.compiled import entries
from dsmoe_compiler.compiled.reuse import Built, fused_layers, keep, key_if_cached, reuse
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.explanation import Explanation
from dsmoe_compiler.huggingface.folder import Pretrained, is_for_transformers, is_pretrained, load_folder, structure_of
from dsmoe_compiler.loading import Loaded, load_model
from dsmoe_compiler.phases import Phase
from dsmoe_compiler.staging import Stage
from dsmoe_compiler.targets import aoti
from dsmoe_compiler.verify import FusedLayer, Verification, verify
from dsmoe_model.checkpoint import open_checkpoint
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import OTHER_KERNELS, OWN_KERNELS
from dsmoe_runtime.errors import ArtifactError, ConfigError, NotFusedError, TargetError, VerificationError

if TYPE_CHECKING:
    from dsmoe_compiler.targets.mlir.stages import StageText

__all__ = ["compile", "explain", "export_onnx", "load"]
log = logging.getLogger(__name__)
Model = str | Path | Loaded | Transformer | Pretrained


def compile(
    model: Model, *, config: CompileConfig | None = None, progress: Callable[[str], None] = log.info
) -> Artifact:
    """Capture, fuse, compile and verify a language model; `.save(folder)` of what comes back publishes it.

    `model` is a preset's name, a checkpoint folder (of the reference model, or one that transformers reads), what
    `load_model` gave, a `Transformer`, or a causal language model of transformers. Nothing stays behind when this
    fails. Other modules: `torch.compile(module, backend="dsmoe")`.

    Raises: VerificationError if the compiled model is not the same model; its text says which layer diverges first,
    and its `verification` has the numbers. NotFusedError under `strict`. ConfigError, CheckpointError, TargetError as
    they say.
    """
    config = config or CompileConfig()
    loaded = as_loaded(model, config)
    if config.formats == ("onnx",):
        from dsmoe_compiler.targets.onnx.compiling import compile_onnx

        return compile_onnx(loaded, config, progress)
    if isinstance(loaded, Pretrained) and config.formats == ("mlir",):
        raise TargetError(
            f"{loaded.source} is a model of transformers; format mlir packages models of the reference architecture. "
            'Run it by torch.compile(model, backend="dsmoe", options={"target": "mlir-cpu"}), or use format aoti'
        )
    if isinstance(loaded, Pretrained):
        from dsmoe_compiler.huggingface.compiling import compile_pretrained

        return compile_pretrained(loaded, config, progress)
    assert config.target is not None
    transformer = loaded.model.to(config.target).eval()
    capacity = config.capacity(loaded.config.max_position_embeddings)
    key = key_if_cached(transformer, config, capacity)
    try:
        return _compile(loaded, transformer, config, capacity, key, progress)
    except FromCacheError as error:
        assert key is not None
        entries.remove(key)
        log.warning("what the cache held of this model is not the model (%s): compiling it anew", error)
        return _compile(loaded, transformer, config, capacity, key, progress)


class FromCacheError(Exception):
    """What came out of the cache could not be opened or proved."""


def _compile(
    loaded: Loaded,
    transformer: Transformer,
    config: CompileConfig,
    capacity: int,
    key: str | None,
    progress: Callable[[str], None],
) -> Artifact:
    """Take the model from the cache, or capture and compile it; prove it either way."""
    assert config.target is not None
    stage, capture = Stage(), None
    try:
        built = None if key is None else reuse(key, transformer, stage.path, progress)
        if built is None:
            capture = Capture(
                transformer, batch=config.batch_size, capacity=capacity, debug=config.debug, progress=progress
            )
            phases, facts, processor = _package(capture, config, stage.path, progress)
            facts |= artifacts.facts_of(config, capture.explanation())
            built = Built(phases, facts, processor, fused_layers(capture))
            files = artifacts.listed(stage.path)
        artifact = artifacts.assemble(
            stage,
            built.phases,
            config=loaded.config.to_dict() | {"model_type": artifacts.MODEL_TYPE},
            tokenizer=loaded.tokenizer,
            target=config.target,
            dtype=str(transformer.embed_tokens.weight.dtype).removeprefix("torch."),
            batch_size=config.batch_size,
            capacity=capacity,
            source=loaded.source,
            facts=built.facts | {"options": config.to_dict()},
            processor=built.processor,
        )
        if config.verify:
            try:
                result = prove(transformer, artifact, built.layers, config, progress)
            except (VerificationError, ArtifactError) as error:
                if capture is None:
                    raise FromCacheError(error) from error
                raise
            artifact.manifest["verification"] = result.to_dict()
        if key is not None and capture is not None:
            keep(key, built, capture, stage.path, files)
    except BaseException:
        stage.discard()
        raise
    return artifact


def export_onnx(
    model: Model,
    folder: str | Path,
    *,
    profile: str = "portable",
    config: CompileConfig | None = None,
    progress: Callable[[str], None] = log.info,
) -> Path:
    """Write `model` to `folder` as an ONNX model that was found to be the same model on its provider.

    `compile(...).save(folder)` with `formats=("onnx",)` and this profile; what else is in `config` holds.
    """
    config = replace(config or CompileConfig(formats=("onnx",)), formats=("onnx",), profile=profile)
    return compile(model, config=config, progress=progress).save(folder)


def explain(
    model: Model | nn.Module, example_inputs: tuple[Any, ...] | None = None, *, stage: str | None = None
) -> Explanation:
    """Every mixture-of-experts layer of `model` with what is fused or why not; nothing is compiled.

    Presets and checkpoints are explained on the meta device: no weight is allocated or read. A module that is not of
    the reference architecture needs `example_inputs`, the positional arguments of one call. `stage` names a pass (or
    "all") whose graph is kept as text before and after.
    """
    if isinstance(model, nn.Module) and not isinstance(model, Transformer):
        if example_inputs is None:
            raise ConfigError(f"explaining a {type(model).__name__} takes example_inputs, the arguments of one call")
        if is_pretrained(model):
            from dsmoe_compiler.huggingface.explaining import explain_graphs

            return explain_graphs(model, example_inputs, dump=stage)
        return explain_module(model, example_inputs, dump=stage)
    if isinstance(model, str | Path) and str(model) not in PRESETS and is_for_transformers(model):
        model = structure_of(model)
    if isinstance(model, Pretrained):
        from dsmoe_compiler.huggingface.compiling import explain_pretrained

        return explain_pretrained(model, stage=stage)
    transformer = as_meta(model)
    capacity = CompileConfig(target="cpu").capacity(transformer.config.max_position_embeddings)
    capture = Capture(transformer, batch=1, capacity=capacity, dump=stage)
    for _ in capture.phases(("decode",)):
        pass
    return capture.explanation()


def show_stage(
    model: Model, *, stage: str, phase: str = "decode", layer: int | None = None, dtype: torch.dtype = torch.float32
) -> StageText:
    """The program of one phase on its way through torch-mlir to the CPU: "torch", "linalg", "scheduled" or "llvm".

    `layer` shows what that layer calls, and nothing else. Presets and checkpoints are taken on the meta device.
    """
    from dsmoe_compiler.targets.mlir.stages import show

    if isinstance(model, str | Path) and str(model) not in PRESETS and is_for_transformers(model):
        raise ConfigError(f"{model} is a model of transformers: stages are shown of the reference architecture")
    start = time.perf_counter()
    transformer = as_meta(model, dtype)
    capacity = CompileConfig(target="cpu").capacity(transformer.config.max_position_embeddings)
    for captured in Capture(transformer, batch=1, capacity=capacity).phases((phase,)):
        seconds = {"capture": time.perf_counter() - start}
        path = None if layer is None else f"model.layers.{layer}"
        shown = show(captured.graph, captured.name, stage, layer=path)
        return replace(shown, seconds=seconds | shown.seconds)
    raise AssertionError("a capture of one phase gives one")


def prove(
    model: Transformer,
    artifact: Artifact,
    layers: list[FusedLayer],
    config: CompileConfig,
    progress: Callable[[str], None],
) -> Verification:
    """Verify an artifact before it is published. Raises: VerificationError; its `.result` has the numbers."""

    def say(step: str) -> None:
        progress(f"verify: {step}")

    through_mlir = "mlir" in artifact.manifest
    allowance = OTHER_KERNELS if through_mlir else OWN_KERNELS  # every product there is ours
    result = verify(model, artifact.runner(), layers, config=config, progress=say, allowance=allowance)
    if through_mlir and result.ok:
        from dsmoe_compiler.targets.mlir.proof import extend

        say("other levels and libmodel.so")
        result = extend(result, model, artifact, config)
    return result.require()


def as_loaded(model: Model, config: CompileConfig) -> Loaded | Pretrained:
    """`model` as `load_model` or `load_folder` gives it. Raises: ConfigError for anything else, or another dtype."""
    if isinstance(model, str | Path):
        device = config.capture_device
        if str(model) not in PRESETS and is_for_transformers(model):
            return load_folder(model, dtype=config.torch_dtype, device=device)
        return load_model(model, dtype=config.torch_dtype, device=device, seed=config.seed)
    if isinstance(model, Transformer):
        model = Loaded(model, model.config, None, "a model in memory", ())
    if is_pretrained(model):
        model = Pretrained(model, None, f"a {type(model).__name__} in memory", ())
    if not isinstance(model, Loaded | Pretrained):
        raise ConfigError(
            f"a {type(model).__name__} cannot be packaged: compile takes a preset's name, a checkpoint folder, a "
            "Transformer or a causal language model of transformers. "
            'For any other module there is torch.compile(module, backend="dsmoe")'
        )
    dtype = model.dtype if isinstance(model, Pretrained) else model.model.embed_tokens.weight.dtype
    if config.torch_dtype not in (None, dtype):
        raise ConfigError(
            f"the model is {dtype}, but dtype is {config.dtype!r}: cast the model first, or leave dtype out"
        )
    return model


def as_meta(model: Any, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model's structure without its weights."""
    if isinstance(model, Loaded):
        return model.model
    if isinstance(model, Transformer):
        return model
    config = PRESETS[str(model)] if str(model) in PRESETS else open_checkpoint(model).config
    return build(config, dtype=dtype, device="meta", seed=0)


def _package(
    capture: Capture, config: CompileConfig, folder: Path, progress: Callable[[str], None]
) -> tuple[dict[str, aoti.PhaseReport], dict[str, Any], dict[str, Any] | None]:
    """Compile the phases in the format that was asked for: reports of packages, facts, and what running them takes."""
    assert config.target is not None
    if config.formats != ("mlir",):
        return aoti.package(_phases(capture, config), folder, target=config.target, progress=progress), {}, None
    from dsmoe_compiler.targets.mlir import packaging

    phases, model = _phases(capture, config), capture.model
    facts = packaging.package(phases, folder, model=model, levels=config.levels, progress=progress)
    return {}, {"mlir": facts}, packaging.requirement(facts)


def _phases(capture: Capture, config: CompileConfig) -> Iterator[Phase]:
    """The phases, unless `strict` forbids them because a block was left alone."""
    left = [(block.name, raised) for block, raised in capture.raise_layers() if raised.reason]
    if left and config.strict:
        name, raised = left[0]
        where = f" at {raised.node}" if raised.node else ""
        raise NotFusedError(f"strict: {len(left)} layers were left alone; {name}{where}: {raised.reason}")
    yield from capture.phases()
