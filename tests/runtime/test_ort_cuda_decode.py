"""dsmoe::DsGemv and dsmoe::DsDecodeAttention without a GPU: a node on a runtime that is played, programs by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.test_ort_cuda_layer import TYPES
from tests.runtime.test_ort_cuda_programs import launcher, run

__all__ = ["launcher"]
GEMV = ("x", "weight", "y")
ATTENTION = ("qkv", "cos", "sin", "position", "past_key", "past_value", "y", "present_key", "present_value")
SCALE = 32**-0.5  # in a key, of 32 bits: 0.176776692


def programs(dtype: str) -> str:
    """One program for each operator, whose kernel takes every tensor there is, in an order that is not theirs."""
    attend = f"heads=4 groups=2 width=32 slots=16 positions=24 scale=0.176776692 dtype={dtype}"
    gemv = (GEMV, 2, f"DsGemv depth=256 rows=384 dtype={dtype}")
    lines = []
    for kernel, (names, inputs, key) in enumerate([gemv, (ATTENTION, 6, f"DsDecodeAttention {attend}")]):
        lines += [f"program {','.join(names[:inputs])} {','.join(names[inputs:])} {key}", "tokens 1 1"]
        lines += [f"launch {kernel} {kernel + 5} 1 1", *(f"pointer {name} 0" for name in reversed(names))]
    kernels = ("kernel one.cubin gemv 128 0 1", "kernel one.cubin attend 256 1024 0")
    return "\n".join(["dsmoe-programs 2", "capability 9 0", *kernels, *lines, "end", ""])


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def dtype(request) -> str:
    return request.param


def folder(tmp_path: Path, dtype: str = "bfloat16") -> Path:
    (tmp_path / "programs.txt").write_text(programs(dtype))
    (tmp_path / "one.cubin").write_bytes(b"\x7fELF")
    return tmp_path


def gemv(dtype: str = "bfloat16", **changes: str) -> str:
    lines = {"x": f"input {TYPES[dtype]} 1 1 256", "weight": f"input {TYPES[dtype]} 384 256", "shift": ""}
    return "\n".join([f"op DsGemv {TYPES[dtype]}", *(lines | changes).values(), ""])


def attention(dtype: str = "bfloat16", **changes: str) -> str:
    of = f"input {TYPES[dtype]}"
    lines = {"num_heads": "int num_heads 4", "kv_num_heads": "int kv_num_heads 2", "scale": f"float scale {SCALE}"}
    lines |= {"qkv": f"{of} 1 1 256", "cos": f"{of} 24 16", "sin": f"{of} 24 16", "position": "input 7 1"}
    lines |= {"past_key": f"{of} 1 2 16 32", "past_value": f"{of} 1 2 16 32", "key": "", "value": ""}
    return "\n".join([f"op DsDecodeAttention {TYPES[dtype]}", *(lines | changes).values(), ""])


def printed(launcher: Path, kernels: Path, node: str) -> list[str]:
    path = str(launcher.parent)
    count = len(GEMV if "DsGemv" in node else ATTENTION)
    done = run([f"{path}/node", str(kernels)], node, LD_LIBRARY_PATH=path, STUB_ARGUMENTS=str(count))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def places(*numbers: int) -> str:
    """Addresses of tensors, from the last to the first, as `programs` wants them."""
    return " ".join(str(number << 32) for number in reversed(numbers))


@pytest.mark.parametrize("sizes", ["", "1", "1 1"])
def test_a_product_launches_its_program(launcher, tmp_path, dtype, sizes):
    """The output has x's sizes with the last replaced, and each tensor goes where the text says."""
    given = gemv(dtype, x=" ".join(["input", str(TYPES[dtype]), *sizes.split(), "256"]))
    assert printed(launcher, folder(tmp_path, dtype), given) == [
        " ".join(["output 0", *sizes.split(), "384"]),
        f"launch gemv 5 1 1 128 0 1 7 {places(1, 2, 3)}",
    ]


def test_attention_launches_its_program(launcher, tmp_path, dtype):
    """The cache is copied first, in the runtime's stream, to where the kernels write."""
    bytes_there = 2 * 16 * 32 * (4 if dtype == "float32" else 2)
    assert printed(launcher, folder(tmp_path, dtype), attention(dtype)) == [
        "output 0 1 1 128",
        "output 1 1 2 16 32",
        f"copy {8 << 32} {5 << 32} {bytes_there} 7",
        "output 2 1 2 16 32",
        f"copy {9 << 32} {6 << 32} {bytes_there} 7",
        f"launch attend 6 1 1 256 1024 0 7 {places(1, 2, 3, 4, 5, 6, 7, 8, 9)}",
    ]


@pytest.mark.parametrize(
    ("bound", "copied", "present"),
    [
        ({"key": "bind 1 4", "value": "bind 2 5"}, [], (5, 6)),
        ({"key": "bind 1 4"}, [f"copy {9 << 32} {6 << 32} 2048 7"], (5, 9)),
        ({"value": "bind 2 5"}, [f"copy {8 << 32} {5 << 32} 2048 7"], (8, 6)),
    ],
)
def test_a_cache_that_is_written_in_place_is_not_copied(launcher, tmp_path, bound, copied, present):
    lines = printed(launcher, folder(tmp_path), attention(**bound))
    assert [line for line in lines if line.startswith("copy")] == copied
    assert lines[-1] == f"launch attend 6 1 1 256 1024 0 7 {places(1, 2, 3, 4, 5, 6, 7, *present)}"


def refusal(launcher: Path, kernels: Path, node: str) -> str:
    path = str(launcher.parent)
    done = run([f"{path}/node", str(kernels)], node, LD_LIBRARY_PATH=path)
    assert done.returncode == 1
    assert "launch" not in done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": "input 16"}, "DsGemv: x is []; it must have 1 dimension at least"),
        ({"x": "input 16 1 2 256"}, "DsGemv: x is [1, 2, 256]; kernels for one row want [1, 1, 256]"),
        ({"weight": "input 16 384"}, "DsGemv: weight is [384]; it must have 2 dimensions"),
        ({"weight": "input 16 384 128"}, "DsGemv: weight is [384, 128]; x [1, 1, 256] want [384, 256]"),
        ({"weight": "input 16 96 256"}, "has no kernels for DsGemv depth=256 rows=96 dtype=bfloat16; it has some for"),
        ({"shift": "shift 1 8"}, "DsGemv: weight begins at 0x200000008, which is no multiple of 16 bytes"),
    ],
)
def test_a_product_that_does_not_fit_is_refused(launcher, tmp_path, changes, reason):
    assert reason in refusal(launcher, folder(tmp_path), gemv(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": ""}, "attribute num_heads is missing, or of another type; export the model again"),
        ({"kv_num_heads": "float kv_num_heads 2"}, "attribute kv_num_heads is missing, or of another type"),
        ({"scale": "int scale 1"}, "attribute scale is missing, or of another type"),
        ({"num_heads": "int num_heads 3"}, "num_heads is 3; it must be a multiple of kv_num_heads, which is 2"),
        ({"kv_num_heads": "int kv_num_heads 0"}, "num_heads is 4; it must be a multiple of kv_num_heads, which is 0"),
        ({"num_heads": "int num_heads 2"}, "qkv is [1, 1, 256]; num_heads 2 and past_key [1, 2, 16, 32] want [1, 1, 1"),
        ({"qkv": "input 16 256"}, "qkv is [256]; num_heads 4 and past_key [1, 2, 16, 32] want [1, 1, 256]"),
        ({"qkv": "input 16 1 2 256"}, "qkv is [1, 2, 256]; num_heads 4 and past_key [1, 2, 16, 32] want [1, 1, 256]"),
        ({"cos": "input 16 24"}, "cos is [24]; it must have 2 dimensions"),
        ({"cos": "input 16 24 32"}, "cos is [24, 32]; past_key [1, 2, 16, 32] want [24, 16]"),
        ({"sin": "input 16 23 16"}, "sin is [23, 16]; cos [24, 16] want [24, 16]"),
        ({"position": "input 7 2"}, "position is [2]; kernels for one token want [1]"),
        ({"position": "input 7"}, "position is []; kernels for one token want [1]"),
        ({"past_key": "input 16 2 16 32"}, "past_key is [2, 16, 32]; it must have 4 dimensions"),
        ({"past_key": "input 16 1 4 16 32"}, "past_key is [1, 4, 16, 32]; one sequence and kv_num_heads 2 want [1, 2,"),
        ({"past_key": "input 16 2 2 16 32"}, "past_key is [2, 2, 16, 32]; one sequence and kv_num_heads 2 want [1, 2,"),
        ({"past_value": "input 16 1 2 8 32"}, "past_value is [1, 2, 8, 32]; past_key [1, 2, 16, 32] want [1, 2, 16, "),
        ({"scale": "float scale 0.5"}, "DsDecodeAttention heads=4 groups=2 width=32 slots=16 positions=24 scale=0.5"),
    ],
)
def test_attention_that_does_not_fit_is_refused(launcher, tmp_path, changes, reason):
    assert reason in refusal(launcher, folder(tmp_path), attention(**changes))


@pytest.mark.parametrize("op", ["DsGemv", "DsDecodeAttention"])
def test_onnxruntime_knows_them_where_there_are_kernels(tmp_path, op):
    """Without a GPU it has nothing that runs them; without kernels it does not know them at all."""
    helper = pytest.importorskip("onnx.helper")
    pytest.importorskip("onnxruntime")
    from dsmoe_runtime.errors import TargetError
    from dsmoe_runtime.ort_library.build import library
    from tests.runtime import ort_cases

    try:
        built = library()
    except TargetError as error:
        pytest.skip(str(error))
    names, inputs = (GEMV, 2) if op == "DsGemv" else (ATTENTION, 6)
    attributes = {} if op == "DsGemv" else {"num_heads": 4, "kv_num_heads": 2, "scale": SCALE}
    node = helper.make_node(op, names[:inputs], names[inputs:], domain="dsmoe", **attributes)
    given = [helper.make_tensor_value_info(name, 7 if name == "position" else 1, None) for name in names]
    graph = helper.make_graph([node], "one node", given[:inputs], given[inputs:])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("dsmoe", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    with pytest.raises(Exception, match="is not a registered function/op"):
        ort_cases.session(made, built, kernels=tmp_path)
    with pytest.raises(Exception, match=rf"(?s)NOT_IMPLEMENTED.*{op}"):
        ort_cases.session(made, built, kernels=folder(tmp_path))
