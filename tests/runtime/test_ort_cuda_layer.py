"""dsmoe::DsMoELayer without a GPU: what is recorded is what dsmoe::moe launches; a node on a runtime that is played."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ort_library.hosts import inputs
from dsmoe_runtime.ort_library.layer import Layer, MoELayer
from dsmoe_runtime.ort_library.record import Note, plans_at, record, without_gpu
from tests.runtime.test_ort_cuda_programs import WHOLE, compared, counted, expected, kernels, launcher, run

__all__ = ["kernels", "launcher"]
TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
ROUTED = Layer(2048, 1408, 64, 6, "bfloat16")
PAPER = MoELayer(ROUTED, router_weight="bfloat16", shared_width=2816)
ATTRIBUTES = ("score", "n_group", "topk_group", "group_score", "renormalize", "eps", "scale", "router_dtype")


def by_torch(layer: MoELayer, tokens: int) -> list[Note]:
    """What dsmoe::moe launches, the vendor's products apart."""
    from dsmoe_runtime.kernels.moe import moe

    notes: list[Note] = []
    with without_gpu(notes):
        given = inputs(layer, tokens)
        routed, gate = layer.routed, [getattr(layer, name) for name in ATTRIBUTES]
        weights = (given[name] for name in ("gate_up", "down", "gate_up_bias", "down_bias"))
        form = (routed.activation, routed.alpha, routed.limit, routed.layout)
        router = (given[name] for name in ("router_weight", "router_bias", "selection_bias"))
        shared = (given["shared_gate_up"], given["shared_down"], None)
        moe(given["x"], *router, routed.top_k, *gate, *weights, *form, *shared)
    return notes


def shapes(notes: list[Note]) -> list[object]:
    """Launches as far as they do not depend on where tensors are."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.shape, value.stride(), value.dtype
        return (plain(value.base), value.block_shape) if hasattr(value, "block_shape") else value

    return [
        [note.kernel.__name__, note.grid, [plain(a) for a in note.arguments], sorted(note.named.items()), note.early]
        for note in notes
    ]


@pytest.mark.parametrize("tokens", [1, 16, 256, 4096])
def test_a_layer_launches_what_torch_launches(tokens):
    """With shared experts as slices all of it is the same; else between gate and sort it has our kernels for them."""
    made = shapes(record(PAPER, plans_at(PAPER, tokens), tokens, tokens).notes)
    wanted = shapes(by_torch(PAPER, tokens))
    names = [name for name, *_ in made]
    if tokens <= 16:
        assert made == wanted
        return
    (vendor,) = (at for at, (name, *_) in enumerate(wanted) if name == "gated")
    begin, end = names.index("in_order"), names.index("sort_few" if tokens == 256 else "count")
    assert begin == vendor
    assert end == begin + 3
    assert made[:begin] + made[end:] == wanted[:vendor] + wanted[vendor + 1 :]


def test_without_shared_experts_all_is_as_in_torch():
    for layer in (
        MoELayer(ROUTED),
        MoELayer(Layer(104, 88, 7, 3, "float16", layout="interleaved"), router_bias="float16"),
    ):
        for tokens in (1, 40, 3000):
            made = record(layer, plans_at(layer, tokens), tokens, tokens)
            assert shapes(made.notes) == shapes(by_torch(layer, tokens))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (MoELayer(ROUTED, shared_width=2000), r"shared experts 2000 wide beside routed ones 1408 wide"),
        (MoELayer(Layer(64, 32, 8, 2, "float16", layout="interleaved"), shared_width=32), r"in layout 'interleaved'"),
        (MoELayer(Layer(64, 32, 8, 2, "float16", layout="concat_transposed"), shared_width=64), r"'concat_transposed'"),
        (MoELayer(Layer(64, 32, 1024, 2, "float16")), r"at most 512"),
        (MoELayer(Layer(64, 32, 64, 17, "float16")), r"at most 16"),
    ],
)
def test_what_is_not_ours_alone_is_refused(layer, reason):
    """Whatever the number of tokens, so that an exporter need not try."""
    for tokens in (1, 5000):
        with pytest.raises(TargetError, match=reason):
            plans_at(layer, tokens)


def node(tokens: int, **changes: str) -> str:
    """A node that WHOLE is for, as the stub reads it; `changes`: other lines, or none, by what they begin with."""
    routed, lines = WHOLE.routed, [f"op DsMoELayer {TYPES[WHOLE.dtype]}", f"int top_k {WHOLE.routed.top_k}"]
    values = {name: getattr(WHOLE, name) for name in ATTRIBUTES}
    values |= {name: getattr(routed, name) for name in ("activation", "alpha", "limit", "layout")}
    for name, value in values.items():
        kind = "float" if isinstance(value, float) else "string" if isinstance(value, str) else "int"
        lines.append(f"{kind} {name} {int(value) if kind == 'int' else value}")
    for name, tensor in inputs(WHOLE, tokens).items():
        sizes = [] if tensor is None else [TYPES[str(tensor.dtype)[6:]], *tensor.shape]
        lines.append(changes.get(name, " ".join(map(str, ["input", *(sizes or [0])]))))
    named = [changes.get(line.split(" ")[1], line) for line in lines]
    return "\n".join([*named, changes.get("shift", "")]) + "\n"


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6])
def test_a_node_launches_its_program(kernels, launcher, tokens):
    """From attributes and tensors to launches: its key is ours, and every tensor goes where the text says."""
    wanted = expected(kernels, WHOLE, tokens)
    path = str(launcher.parent)
    done = run(
        [str(launcher.parent / "node"), str(kernels)], node(tokens),
        LD_LIBRARY_PATH=path, STUB_ARGUMENTS=counted(wanted),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compared(wanted, done.stdout)
    outputs = [line for line in done.stdout.splitlines() if line.startswith("output")]
    assert outputs == [f"output 0 {tokens} 256", f"output 1 {tokens} 2"]
    names = [words[1] for words in wanted if words[0] == "launch"]
    assert ("in_order" in names) == (tokens >= 4)


def test_no_token_is_no_launch(kernels, launcher):
    done = run([str(launcher.parent / "node"), str(kernels)], node(0), LD_LIBRARY_PATH=str(launcher.parent))
    assert (done.returncode, done.stdout) == (0, "output 0 0 256\noutput 1 0 2\n"), done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": "input 16 256"}, "x is [256]; it must have 2 dimensions"),
        ({"router_weight": "input 1 8 128"}, "router_weight is [8, 128]; x [3, 256] and gate_up [8, 384, 256] want"),
        ({"selection_bias": "input 1 7"}, "selection_bias is [7]; x [3, 256] and gate_up [8, 384, 256] want [8]"),
        ({"gate_up": "input 16 8 384 128"}, "gate_up is [8, 384, 128]; x [3, 256] and layout 'concat' want"),
        ({"down": "input 16 8 256 96"}, "down is [8, 256, 96]; gate_up [8, 384, 256] and layout 'concat' want"),
        ({"shared_down": "input 0"}, "shared_gate_up and shared_down go together"),
        ({"shared_gate_up": "input 16 384 256"}, "shared_gate_up is [384, 256]; shared_down [256, 384] and layout"),
        ({"top_k": ""}, "attribute top_k is missing, or of another type; export the model again"),
        ({"top_k": "int top_k 9"}, "top_k is 9; of 8 experts it takes 1 to 8"),
        ({"top_k": "int top_k 3"}, "has no kernels for DsMoELayer hidden=256 width=192 experts=8 top_k=3"),
        ({"score": "string score softmax"}, "renormalize=1 eps=9.99999968e-21 scale=2.5 router_dtype=float32"),
        ({"score": "float score 1"}, "attribute score is missing, or of another type"),
        ({"layout": "string layout sideways"}, "layout is 'sideways'; it must be one of concat"),
        ({"router_weight": "input 10 8 256"}, "router_weight=float16 router_bias=none selection_bias=float32"),
        ({"selection_bias": "input 0"}, "selection_bias=none shared_width=384; it has some for"),
        ({"shift": "shift 4 2"}, "DsMoELayer: gate_up begins at 0x500000002, which is no multiple of 16 bytes"),
    ],
)  # fmt: skip
def test_a_node_that_does_not_fit_is_refused(kernels, launcher, changes, reason):
    done = run([str(launcher.parent / "node"), str(kernels)], node(3, **changes), LD_LIBRARY_PATH=str(launcher.parent))
    assert done.returncode == 1
    assert reason in done.stderr


def test_a_kernel_that_is_missing_is_refused(launcher):
    done = run([str(launcher.parent / "node"), str(Path("/nowhere"))], node(3), LD_LIBRARY_PATH=str(launcher.parent))
    assert done.returncode == 1
    assert "/nowhere/programs.txt cannot be read" in done.stderr
