"""A model's step, captured and fused for ONNX: of the reference model, and of one of transformers.

Both are captured on the CPU whatever the target is: the graph says nothing about a device, and weights are written from
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dsmoe_compiler.blocks import swapped
from dsmoe_compiler.capture import EXPERTS_OP, MOE_OP, Capture, report_steps, trace
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.explanation import Explanation
from dsmoe_compiler.huggingface.compiling import capture_pretrained
from dsmoe_compiler.huggingface.folder import Pretrained
from dsmoe_compiler.huggingface.phases import cache_shapes
from dsmoe_compiler.huggingface.proof import prove as prove_pretrained
from dsmoe_compiler.loading import Loaded
from dsmoe_compiler.runner import Shapes
from dsmoe_compiler.targets.onnx.phase import Step, example_inputs
from dsmoe_compiler.targets.onnx.pretrained import PretrainedStep
from dsmoe_compiler.verify import FusedLayer, Verification, verify
from dsmoe_compiler.verify.trace import RunnerLike
from dsmoe_passes import pipeline
from dsmoe_passes.result import layer_of
from dsmoe_runtime.agreement import OTHER_KERNELS

Say = Callable[[str], None]
NAME = "step"


class ReferenceSource:
    """The reference model's: `graph`, the `inputs` it was traced with and what of them is `free`."""

    def __init__(self, loaded: Loaded, config: CompileConfig, progress: Say) -> None:
        self.model = loaded.model.to("cpu").eval()
        self.facts: dict[str, Any] = {}
        own = loaded.config
        self.shapes: Shapes = [((1, own.num_key_value_heads, 1, own.head_dim),) * 2] * own.num_hidden_layers
        self.capture = Capture(self.model, batch=1, capacity=8, debug=config.debug, progress=progress)
        raised = self.capture.raise_layers()
        progress("capture: step")
        self.inputs, self.free = example_inputs(self.shapes, self.model.embed_tokens.weight.dtype)
        with swapped(raised):
            self.graph = trace(Step(self.model).eval(), self.inputs, self.free)
        self.capture.passes += report_steps(NAME, pipeline.run(self.graph))
        self.capture.graphs[NAME] = self.graph

    def explanation(self) -> Explanation:
        return self.capture.explanation()

    def check(self, device: torch.device) -> Callable[[RunnerLike, CompileConfig, Say], Verification]:
        """What holds a runner on `device` against the model; the second and later ones spare the fused layers."""
        from dsmoe_compiler.compiled.reuse import fused_layers

        self.model = self.model.to(device)
        layers: list[FusedLayer] = fused_layers(self.capture) if device.type == "cpu" else []

        def run(runner: RunnerLike, config: CompileConfig, say: Say) -> Verification:
            found = verify(self.model, runner, list(layers), config=config, progress=say, allowance=OTHER_KERNELS)
            layers.clear()
            return found

        return run


class PretrainedSource:
    """A transformers model's, in the same words."""

    def __init__(self, pretrained: Pretrained, config: CompileConfig, progress: Say) -> None:
        import transformers

        self.pretrained = replace(pretrained, model=pretrained.model.to("cpu").eval())
        model = self.pretrained.model
        self.shapes = cache_shapes(self.pretrained, batch=1, capacity=1)
        progress("capture: step")
        self.inputs, self.free = example_inputs(self.shapes, pretrained.dtype)
        self.graph, self.explained, self.sizes = capture_pretrained(
            model, NAME, PretrainedStep(model), self.inputs, self.free
        )
        self.facts = {
            "transformers": {
                "version": transformers.__version__,
                "class": type(model).__name__,
                "vocab_size": pretrained.vocab_size,
            }
        }

    def explanation(self) -> Explanation:
        return self.explained

    def check(self, device: torch.device) -> Callable[[RunnerLike, CompileConfig, Say], Verification]:
        """As `ReferenceSource.check`."""
        moved = replace(self.pretrained, model=self.pretrained.model.to(device))

        def run(runner: RunnerLike, config: CompileConfig, say: Say) -> Verification:
            shapes = sized(self.shapes, batch=runner.batch_size, capacity=runner.capacity)
            return prove_pretrained(
                moved, runner, shapes, self.sizes, config=config, progress=say, allowance=OTHER_KERNELS
            )

        return run


def sized(shapes: Shapes, *, batch: int, capacity: int) -> Shapes:
    """The same heads and widths for another batch and number of positions."""
    return [tuple((batch, side[1], capacity, side[3]) for side in pair) for pair in shapes]  # type: ignore[misc]


def layers_of(graph: fx.GraphModule, explanation: Explanation) -> list[str]:
    """The name of each layer that has an operator in `graph`, in the order of the operators."""
    names = [layer.name for layer in explanation.layers]
    found = []
    for node in graph.graph.nodes:
        if node.target in (MOE_OP, EXPERTS_OP):
            path = layer_of(node).removeprefix("model.")
            found.append(next((n for n in names if path == n or path.startswith(f"{n}.")), path))
    return found
