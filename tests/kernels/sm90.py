"""Kernels built for an H200 without one, exactly as the host parts would launch them; `python -m tests.kernels.sm90`.

The host parts run on tensors without memory while `launch` takes notes instead of launching; each note becomes a
signature as Triton would specialise it, is compiled, and described by what is in its machine code. This must run in a
process without TRITON_INTERPRET. One JSON object a line: kernel, name, tile, and the figures of `built`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

import dsmoe_runtime.kernels
from dsmoe_runtime.kernels.attend import attend
from dsmoe_runtime.kernels.choose import best, choose, shape_of
from dsmoe_runtime.kernels.decode_attention import decode_attention
from dsmoe_runtime.kernels.device.specialised import product_specialised
from dsmoe_runtime.kernels.dispatch import plan_rows
from dsmoe_runtime.kernels.experts import Weights, down_sorted, run, up_sorted
from dsmoe_runtime.kernels.experts_backward import experts_backward
from dsmoe_runtime.kernels.experts_training import experts_training
from dsmoe_runtime.kernels.gemv import gemv
from dsmoe_runtime.kernels.gpu import named
from dsmoe_runtime.kernels.moe import moe, rows_in_order
from dsmoe_runtime.kernels.plan import Plan, Tile
from dsmoe_runtime.kernels.route import gate, route

TARGET = GPUTarget("cuda", 90, 32)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1",
}  # fmt: skip
WORDS = (
    "HGMMA", "HGMMA.64x256x16", "HMMA", "FFMA", "UTMALDG", "LDGSTS", "ARRIVES.LDGSTSBAR.64.ARVCNT", "FENCE.VIEW.ASYNC",
    r"LDG\.E\.[.A-Z]*128", "LDL", "STL",
)  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
V1 = ("softmax", 1, 1, "max", False, 1e-20, 1.0)
V3 = ("sigmoid", 8, 4, "top2", True, 1e-20, 2.5)
SPECIALISED = Plan("sorted", *2 * (Tile(128, 128, 64, 8, 3),), specialised=True)
Launch = tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Any, ...]]

# H, I, E, K; name as in the paper and its successors
SHAPES = {
    "16B": (2048, 1408, 64, 6),
    "145B": (4096, 1408, 128, 12),
    "V3": (7168, 2048, 256, 8),
    "Qwen3-30B": (2048, 768, 128, 8),
    "2B": (1280, 864, 63, 7),  # 853.3 in the paper; at an odd width no row begins at 16 bytes, so nothing is copied
}


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What `call` would launch on an H200: (kernel, arguments, what is given by name, grid)."""
    notes: list[Launch] = []

    def note(kernel: Any, grid: Any, *arguments: Any, pdl: bool = False, **meta: Any) -> None:
        notes.append((kernel, arguments, meta, grid))

    with mock.patch.multiple("dsmoe_runtime.kernels.launch", launch=note, chained=lambda device: True):
        patches = []
        for found in pkgutil.iter_modules(dsmoe_runtime.kernels.__path__):
            module = importlib.import_module(f"dsmoe_runtime.kernels.{found.name}")
            if found.name != "launch" and hasattr(module, "launch"):
                patches.append(mock.patch.multiple(module, launch=note, chained=lambda device: True))
        for patch in patches:
            patch.start()
        try:
            call()
        finally:
            for patch in patches:
                patch.stop()
    return notes


def source_of(kernel: Any, arguments: tuple[Any, ...], meta: dict[str, Any], floats: str) -> ASTSource:
    """Types, constants and known multiples of 16 as Triton's own launch finds them; memory is taken to be aligned."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | meta
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, known = values[parameter.name], not parameter.do_not_specialize
        by_sixteen = True
        if isinstance(value, Tensor):
            kind = f"*{TYPES[value.dtype]}"
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            kind, by_sixteen = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>", False
        elif parameter.is_constexpr or value is None or (value == 1 and known and not isinstance(value, float)):
            kind, constants[(index,)], by_sixteen = "constexpr", value, False
        elif isinstance(value, float):
            kind, by_sixteen = floats, False
        else:
            kind, by_sixteen = "i32", known and value % 16 == 0
        signature[parameter.name] = kind
        if by_sixteen:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return source(kernel, signature, constants, attributes)


def built(kernel: Any, arguments: tuple[Any, ...], meta: dict[str, Any], floats: str) -> dict[str, Any]:
    """Registers, stack and shared memory in bytes, and how often each of WORDS is in the machine code."""
    options = {name: meta[name] for name in OPTIONS if name in meta}
    compiled = triton.compile(source_of(kernel, arguments, meta, floats), target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        texts = [
            subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    found = re.search(r"REG:(\d+) STACK:(\d+)", texts[0])
    assert found is not None, texts[0]
    words = {word.partition(r"\.E")[0] + "128" * ("128" in word): len(re.findall(word, texts[1])) for word in WORDS}
    return words | {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared}


def weights_of(
    hidden: int, width: int, experts: int, dtype: torch.dtype, layout: str = "concat", activation: str = "silu"
) -> tuple[Any, ...]:
    """gate_up, down, no biases, and the attributes of the operator."""
    gate_up, down = (experts, (1 if layout.startswith("ungated") else 2) * width, hidden), (experts, hidden, width)
    made = (torch.empty(s, dtype=dtype, device="meta") for s in (gate_up, down))
    made = (t.mT.contiguous() if layout.endswith("_transposed") else t for t in made)
    return (*made, None, None, activation, 1.0, 1.0, layout)


def tokens_of(tokens: int, hidden: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts and weights."""
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    return torch.empty(tokens, hidden, dtype=dtype, device="meta"), ids, torch.empty(ids.shape, device="meta")


def forward(name: str, tokens: int, dtype: torch.dtype = torch.bfloat16, plan: Plan | None = None) -> list[Launch]:
    """The experts of one of SHAPES, by a plan or by that which is chosen for an H200."""
    hidden, width, experts, top_k = SHAPES[name]
    plan = plan or choose(shape_of(tokens, hidden, width, experts, top_k, dtype), named("H200"))
    w = Weights.of(*weights_of(hidden, width, experts, dtype))
    return launches(lambda: run(*tokens_of(tokens, hidden, top_k, dtype), w, plan))


def layer(name: str, tokens: int) -> list[Launch]:
    """Gate, routed experts and two shared ones."""
    hidden, width, experts, top_k = SHAPES[name]
    x, _, _ = tokens_of(tokens, hidden, top_k, torch.bfloat16)
    router = torch.empty(experts, hidden, dtype=x.dtype, device="meta")
    shared = (torch.empty(s, dtype=x.dtype, device="meta") for s in ((4 * width, hidden), (hidden, 2 * width)))
    weights = weights_of(hidden, width, experts, x.dtype)
    return launches(lambda: moe(x, router, None, None, top_k, *V1, "float32", *weights, *shared, None))


def router(name: str, tokens: int) -> list[Launch]:
    """The gate as V3 has it, and the selection from logits."""
    hidden, _, experts, top_k = SHAPES[name]
    x, _, _ = tokens_of(tokens, hidden, top_k, torch.bfloat16)
    weight = torch.empty(experts, hidden, device="meta")
    made = launches(lambda: gate(x, weight, None, weight[:, 0], top_k, *V3, "float32"))
    return made + launches(lambda: route(x @ weight.T.bfloat16(), None, top_k, *V1))


def one_query(heads: int, slots: int, width: int) -> list[Launch]:
    """Attention of a decode step."""
    key = torch.empty(1, heads, slots, width, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, slots, dtype=torch.bool, device="meta")
    return launches(lambda: attend(key[:, :, :1], key, key, mask, 1.0))


def one_step(heads: int, slots: int, width: int) -> list[Launch]:
    """The same from its projections, with half as many heads of keys."""
    key = torch.empty(1, heads // 2, slots, width, dtype=torch.bfloat16, device="meta")
    qkv, angles = torch.empty(1, 1, 2 * heads * width, dtype=key.dtype, device="meta"), key[0, 0, :, : width // 2]
    position = torch.empty(1, dtype=torch.int64, device="meta")
    return launches(lambda: decode_attention(qkv, angles, angles, position, key, key, 1.0))


def one_row(*rows: int) -> list[Launch]:
    """Products of a decode step with weights of so many rows."""
    weights = [torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in rows]
    return launches(lambda: gemv(weights[0][:1], weights))


def training(tokens: int) -> list[Launch]:
    """Forward and backward of 16B's experts, with biases."""
    hidden, width, experts, top_k = SHAPES["16B"]
    given = tokens_of(tokens, hidden, top_k, torch.bfloat16)
    weights = list(weights_of(hidden, width, experts, torch.bfloat16))
    weights[2:4] = (
        torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((experts, 2 * width), (experts, hidden))
    )
    joint = torch.empty(tokens * top_k, 2 * width, dtype=torch.bfloat16, device="meta")
    slots = torch.empty(tokens * top_k, dtype=torch.int32, device="meta")
    offsets = torch.empty(experts + 2, dtype=torch.int32, device="meta")[: experts + 1]
    saved = {"weight_grads": True, "joint": joint, "slots": slots, "offsets": offsets}
    made = launches(lambda: experts_training(*given, *weights))
    return made + launches(lambda: experts_backward(given[0], *given, *weights, **saved))


def inference() -> Iterator[tuple[str, list[Launch]]]:
    """Each kernel of the forward at least once, in the tiles of the paper's model."""
    for tokens in (16, 64, 512):
        yield f"16B T={tokens}", forward("16B", tokens)
    scanning = best(shape_of(16, *SHAPES["16B"], torch.bfloat16), named("H200"))  # a table may say otherwise
    yield "16B T=16 by the model", forward("16B", 16, plan=scanning)
    yield "16B specialised", forward("16B", 4096, plan=SPECIALISED)
    for tokens in (1, 16, 4096):  # 16 by the model: shared experts among the scanned ones
        yield f"16B layer T={tokens}", layer("16B", tokens)
    yield "shared experts as one", launches(lambda: rows_in_order(4096, 128, torch.device("meta")))
    yield "V3 gate", router("V3", 16)
    for slots in (576, 4096):
        yield f"16B attention C={slots}", one_query(16, slots, 128)
    yield "16B attention from its projections", one_step(16, 4096, 128)
    yield "16B queries, keys and values", one_row(2048, 2048, 2048)
    yield "16B output of attention", one_row(2048)


def specialised() -> Iterator[tuple[str, list[Launch]]]:
    """The warp-specialised kernels: sizes that blocks do not divide, activations, and what training keeps."""
    yield "16B", [made for made in forward("16B", 4096, plan=SPECIALISED) if made[0] is product_specialised]
    hidden, width, experts, top_k = 1288, 1096, 9, 4
    for activation, dtype in (
        ("silu", torch.bfloat16), ("silu_clamped", torch.float16), ("swiglu_oai", torch.bfloat16),
        ("gelu", torch.bfloat16), ("gelu_tanh", torch.bfloat16),
    ):  # fmt: skip
        x, ids, _ = tokens_of(300, hidden, top_k, dtype)
        w = Weights.of(*weights_of(hidden, width, experts, dtype, activation=activation))

        def keep(x: Tensor = x, ids: Tensor = ids, w: Weights = w) -> None:
            rows = plan_rows(ids, experts, SPECIALISED.up.block_m)
            hidden, _ = up_sorted(x, rows, top_k, w, SPECIALISED, save_joint=True)
            down_sorted(hidden, rows, w, SPECIALISED)

        yield f"{activation} {dtype}", [made for made in launches(keep) if made[0] is product_specialised]


def others() -> Iterator[tuple[str, list[Launch]]]:
    """The first half of the experts in every regime, with activations other than silu and with nothing that gates."""
    hidden, width, experts, top_k = SHAPES["16B"]
    for layout, activation in (("concat", "gelu"), ("concat", "gelu_tanh"), ("ungated", "gelu"), ("ungated", "relu2")):
        w = Weights.of(*weights_of(hidden, width, experts, torch.bfloat16, layout, activation))
        scanning = best(shape_of(16, *SHAPES["16B"], torch.bfloat16), named("H200"))
        tall = Plan("sorted", Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), half=True)
        for tokens, plan in ((1, None), (16, scanning), (512, None), (4096, tall)):
            given = tokens_of(tokens, hidden, top_k, torch.bfloat16)
            plan = plan or choose(shape_of(tokens, *SHAPES["16B"], torch.bfloat16), named("H200"))
            made = launches(lambda given=given, w=w, plan=plan: run(*given, w, plan))
            yield f"{layout} {activation} T={tokens}", [one for one in made if one[0].__name__.startswith("up_")]


def backward() -> Iterator[tuple[str, list[Launch]]]:
    """Each kernel of training."""
    yield "16B training", training(4096)


def sweep() -> Iterator[tuple[str, list[Launch]]]:
    """The plans of every shape and number of tokens that the benchmark measures, and float32."""
    for name in SHAPES:
        for tokens in (1, 4, 16, 64, 512, 4096, 16384):
            yield f"{name} T={tokens}", forward(name, tokens)
        for tokens in (1, 64, 4096):
            yield f"{name} T={tokens} float32", forward(name, tokens, torch.float32)


def packages() -> Iterator[tuple[str, list[Launch]]]:
    """Each kernel of the forward that takes floats, once."""
    known = set()
    for name, made in inference():
        for launch in made:
            kernel, arguments, *_ = launch
            if kernel not in known and any(isinstance(value, float) for value in arguments):
                known.add(kernel)
                yield name, [launch]


PARTS = {
    "forward": inference, "packages": packages, "specialised": specialised, "others": others, "training": backward,
    "sweep": sweep,
}  # fmt: skip
FLOATS = {"packages": "fp64"}  # as AOTInductor types them


def main(part: str) -> None:
    """Print what is built, each different kernel once."""
    known, floats = set(), FLOATS.get(part, "fp32")
    for name, made in PARTS[part]():
        for kernel, arguments, meta, _ in made:
            source = source_of(kernel, arguments, meta, floats)
            key = source.hash() + str({option: meta.get(option) for option in OPTIONS})
            if key not in known:
                known.add(key)
                tile = {size: meta.get(size) for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA", *OPTIONS)}
                figures = built(kernel, arguments, meta, floats)
                print(json.dumps({"kernel": kernel.__name__, "name": name} | tile | figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
