"""What ONNX has one operator for, in one operator: norms, rotations of heads, heads that share keys and values.

    w * (x * rsqrt(mean(x * x) + eps))    ->  rms_norm(x, w, eps)                          norms
    x * cos + cat(-x2, x1) * sin          ->  RotaryEmbedding(x, half of cos, half of sin)  rotation
    view_as_complex(x) * polar(1, a)      ->  RotaryEmbedding(x, cos a, sin a)              rotation_complex
    sdpa(q, repeat(k), repeat(v), mask)   ->  sdpa(q, k, v, mask, enable_gqa=True)          heads

What is written otherwise stays as it is, in a few operators more. The exporter turns `sdpa` into Attention and
`rms_norm` into RMSNormalization.
"""

from __future__ import annotations

from torch import fx

from dsmoe_compiler.targets.onnx.heads import share_heads
from dsmoe_compiler.targets.onnx.norms import normalise
from dsmoe_compiler.targets.onnx.rotation import rotate, rotate_halves
from dsmoe_compiler.targets.onnx.rotation_complex import rotate_complex


def respell(graph: fx.GraphModule) -> None:
    """Rewrite `graph` in place."""
    normalise(graph)
    share_heads(graph)
    rotate(graph)
    rotate_halves(graph)
    rotate_complex(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
