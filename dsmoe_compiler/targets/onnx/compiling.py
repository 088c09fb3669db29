"""A model into an ONNX artifact: captured, fused, translated, written with its weights, proved where it will run.

model.onnx               the step: prompt, next part or one token; a function for the experts' operator in it
decode.onnx              one token of one sequence in a cache of fixed slots, on a GPU with our library
weights/*.safetensors    what both refer to as external data
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsmoe_compiler import artifact as artifacts
from dsmoe_compiler.artifact import Artifact
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.huggingface.folder import Pretrained
from dsmoe_compiler.loading import Loaded
from dsmoe_compiler.staging import Stage
from dsmoe_compiler.targets.onnx.export import finished, translate
from dsmoe_compiler.targets.onnx.external import move_out
from dsmoe_compiler.targets.onnx.fewer_kernels import fewer_kernels
from dsmoe_compiler.targets.onnx.grouped_attention import group_attention
from dsmoe_compiler.targets.onnx.op import OPSET
from dsmoe_compiler.targets.onnx.opening import MODEL
from dsmoe_compiler.targets.onnx.profiles import accompany, lowered
from dsmoe_compiler.targets.onnx.proof import prove
from dsmoe_compiler.targets.onnx.runner import OnnxRunner
from dsmoe_compiler.targets.onnx.session import check_exporter, check_provider
from dsmoe_compiler.targets.onnx.source import PretrainedSource, ReferenceSource, layers_of, sized
from dsmoe_passes import pipeline
from dsmoe_passes.join_linears import join_linears
from dsmoe_passes.pack_weights import pack_weights
from dsmoe_runtime.errors import NotFusedError, TargetError

NO_BFLOAT16 = (
    "ONNX Runtime's CPU provider multiplies no bfloat16 matrices, so that such a model could not run there: nothing "
    "was written. Ways out: dtype float16 or float32, or target cuda"
)


def compile_onnx(model: Loaded | Pretrained, config: CompileConfig, progress: Callable[[str], None]) -> Artifact:
    """As `api.compile`, which see."""
    assert config.target is not None
    pretrained = isinstance(model, Pretrained)
    dtype = model.dtype if isinstance(model, Pretrained) else model.model.embed_tokens.weight.dtype
    check(config, dtype)
    positions = model.positions if isinstance(model, Pretrained) else model.config.max_position_embeddings
    capacity = positions if config.max_seq_len is None else config.capacity(positions)
    source: ReferenceSource | PretrainedSource
    if isinstance(model, Pretrained):
        source, own = PretrainedSource(model, config, progress), model.model.config.to_dict()
    else:
        source = ReferenceSource(model, config, progress)
        own = model.config.to_dict() | {"model_type": artifacts.MODEL_TYPE}
    refuse_left_alone(source, config)
    stage = Stage()
    try:
        facts = write(source, stage.path, config, what=model.source, capacity=capacity, progress=progress)
        if pretrained:
            cache = [[list(key), list(value)] for key, value in sized(source.shapes, batch=1, capacity=capacity)]
            source.facts["transformers"]["cache"] = cache
        artifact = artifacts.assemble(
            stage, {}, config=own, tokenizer=model.tokenizer, target=config.target,
            dtype=str(dtype).removeprefix("torch."), batch_size=1, capacity=capacity, source=model.source,
            facts=artifacts.facts_of(config, source.explanation()) | source.facts | facts,
        )  # fmt: skip
        if config.verify:
            checked = source.check(torch.device(config.target))

            def opened(threads: int) -> OnnxRunner:
                runner = artifact.runner(threads=threads)
                assert isinstance(runner, OnnxRunner)
                return runner

            result = prove(opened, checked, config, progress)
            artifact.manifest["verification"] = result.require().to_dict()
    except BaseException:
        stage.discard()
        raise
    return artifact


def check(config: CompileConfig, dtype: torch.dtype) -> None:
    """What can be told before anything is captured. Raises: TargetError with the way out."""
    assert config.target is not None
    check_exporter()
    if config.verify:
        check_provider(config.target)
    if dtype == torch.bfloat16 and config.target == "cpu":
        raise TargetError(NO_BFLOAT16)


def refuse_left_alone(source: ReferenceSource | PretrainedSource, config: CompileConfig) -> None:
    """Raises: NotFusedError under `strict`, if a layer was not fused."""
    left = source.explanation().left_alone
    if left and config.strict:
        where = f" at {left[0].node}" if left[0].node else ""
        raise NotFusedError(f"strict: {len(left)} layers were left alone; {left[0].name}{where}: {left[0].reason}")


def write(
    source: ReferenceSource | PretrainedSource,
    folder: Path,
    config: CompileConfig,
    *,
    what: str,
    capacity: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fill `folder` with the model and its weights: what the manifest says of them."""
    layers = layers_of(source.graph, source.explanation())
    if config.target == "cuda":
        pipeline.run(source.graph, passes=(join_linears, pack_weights))
    progress(f"onnx: {len(source.graph.graph.nodes)} nodes to opset {OPSET}")
    model = translate(
        source.graph, source.inputs, source.free, what=what, native=config.target == "cuda",
        layers=config.profile == "ort-cuda",
    )  # fmt: skip
    move_out(model, folder, progress=progress)
    proto = finished(model, layers)
    if config.target == "cuda":
        for reason in group_attention(proto, capacity):
            progress(f"onnx: attention in standard operators, {reason}")
        fewer_kernels(proto)
    proto, least, nodes = lowered(proto, layers, config)
    data = proto.SerializeToString()
    (folder / MODEL).write_bytes(data)
    progress(f"onnx: {len(proto.graph.node)} nodes, {len(data) / 2**20:.2f} MB beside the weights")
    facts = {
        "file": MODEL,
        "opset": OPSET,
        "profile": config.profile,
        "minimum_onnxruntime": least,
        "functions": [function.overload or function.name for function in proto.functions],
        "nodes": dict(zip(layers, nodes, strict=True)),
    }
    return {"onnx": facts | accompany(folder, source.graph, proto, capacity, config, progress)}
