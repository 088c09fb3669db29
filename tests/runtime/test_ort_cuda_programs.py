"""The folder of kernels, built without a GPU; and what the library makes of it, against a driver that only prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import dsmoe_runtime.ort_library
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ort_library.expressions import evaluate
from dsmoe_runtime.ort_library.layer import Layer, MoELayer
from dsmoe_runtime.ort_library.programs import TEXT, write

ROOT = Path(__file__).parents[2]
SOURCES = Path(dsmoe_runtime.ort_library.__file__).parent
STUB = Path(__file__).parent / "cuda_stub"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
LAYER = Layer(256, 192, 8, 2, "bfloat16")
GATE = ("sigmoid", 4, 2, "top2", True, 1e-20, 2.5, "float32")
WHOLE = MoELayer(LAYER, *GATE, "float32", None, "float32", 384)
NODE = LAYER.key().split()
BUILD = """
import sys
from pathlib import Path
from dsmoe_runtime.kernels.plan import Plan, Tile
from dsmoe_runtime.ort_library import programs, record
from dsmoe_runtime.ort_library.hosts import Plans
from tests.runtime.test_ort_cuda_programs import LAYER, WHOLE
record.MOST_TOKENS = 6
few, tall = record.plans_at, Plan("sorted", Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3))
beside = {LAYER: Plans(tall), WHOLE: Plans(tall, tall)}
record.plans_at = lambda layer, tokens: few(layer, tokens) if tokens < 4 else beside[layer]
programs.write([LAYER, WHOLE], Path(sys.argv[1]))
"""


def run(command: list[str], given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process where Triton compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join((str(ROOT), *(path for path in sys.path if path)))
    return subprocess.run(
        command, capture_output=True, text=True, env=kept | environment, cwd=ROOT, check=False, input=given
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """Programs of a small layer for up to 6 tokens: a plan as chosen, and one whose kernels use the copy engine."""
    folder = tmp_path_factory.mktemp("kernels")
    done = run([sys.executable, "-c", BUILD, str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Path:
    """A program that launches from a folder, and one that runs a node, beside a libcuda.so.1 that prints."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("launcher")
    common = [COMPILER, "-std=c++17", "-O1", f"-I{SOURCES}"]
    names = ("cuda", "cuda_decode", "cuda_layer", "cuda_node", "kernel", "cuda_driver", "cuda_folder", "cuda_launch")
    sources = [str(SOURCES / f"{name}.cpp") for name in (*names, "cuda_programs")]
    built = [
        run([*common, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(STUB / "libcuda.cpp")]),
        run([*common, "-o", str(folder / "launch"), str(STUB / "launch.cpp"), *sources[-4:], "-ldl"]),
        run([*common, "-o", str(folder / "node"), str(STUB / "node.cpp"), *sources, "-ldl"]),
    ]
    assert not any(done.returncode for done in built), [done.stderr[-3000:] for done in built]
    return folder / "launch"


def statements(folder: Path) -> list[list[str]]:
    lines = (folder / TEXT).read_text().splitlines()
    return [line.partition("#")[0].split(" ") for line in lines if line.partition("#")[0]]


def expected(folder: Path, layer: Layer | MoELayer, tokens: int) -> list[list[object]]:
    """What must be launched, as this test reads the text: maps and launches in their order, as the stub prints them."""
    kernels, rooms, found, lines = [], [], [], iter(statements(folder))
    ours, inside, maps = False, False, 0

    def place(buffer: str, offset: str) -> int:
        if buffer == "none":
            return 0
        tensors = layer.inputs + layer.outputs
        begin = (tensors.index(buffer) + 1) << 32 if buffer in tensors else rooms[int(buffer.removeprefix("room"))]
        return begin + evaluate(offset, tokens)

    end = 1 << 40
    for kind, *words in lines:
        if kind == "kernel":
            kernels.append(words)
        elif kind == "program":
            ours, inside = " ".join(words[2:]) == layer.key(), False
        elif kind == "tokens":
            inside = ours and int(words[0]) <= tokens <= int(words[1])
        elif not inside:
            continue
        elif kind == "room":
            rooms.append(end)
            end += -(-evaluate(words[0], tokens) // 256) * 256
        elif kind == "launch":
            _, entry, threads, shared, early = kernels[int(words[0])]
            grid = [evaluate(word, tokens) for word in words[1:]]
            found.append(["launch", entry, *grid, int(threads), int(shared), int(early), 7])
        elif kind == "map":
            maps += 1
            rank = int(words[4])
            sizes, strides, box = ([evaluate(w, tokens) for w in words[5 + i * rank :][:rank][::-1]] for i in range(3))
            address = place(words[0], words[1])
            found.insert(-1, ["map", maps, int(words[2]), int(words[3]), address, *sizes, *strides[1:], *box])
            found[-1].append(maps)
        elif kind == "pointer":
            found[-1].append(place(*words))
        elif kind in ("int", "long"):
            found[-1].append(evaluate(words[0], tokens))
        elif kind == "float":
            found[-1].append(int(words[0], 16))
    return found


def compared(wanted: list[list[object]], output: str) -> None:
    """What the stub printed is what was wanted."""
    printed = [line.split(" ") for line in output.splitlines()]
    raised = {words[1]: int(words[3]) for words in printed if words[0] == "attribute"}
    got = [words for words in printed if words[0] in ("map", "launch")]
    assert len(got) == len(wanted) >= 2
    for words, line in zip(wanted, got, strict=True):
        assert line[:2] == [str(word) for word in words[:2]]
        for word, number in zip(words[2:], map(int, line[2:]), strict=True):
            # of 32 bits the stub prints 64
            assert number in (word, word & 0xFFFFFFFF) or number & 0xFFFFFFFF == word, (words, line)
        if words[0] == "launch" and words[6] > 48 * 1024:
            assert raised[words[1]] == words[6]


def counted(wanted: list[list[object]]) -> str:
    """How many arguments each launch has, for the stub."""
    return " ".join(str(len(words) - 9) for words in wanted if words[0] == "launch")


def test_the_folder_is_whole(kernels):
    """Machine code for Hopper in each file, no file without a statement, no name of a file of ours in any."""
    said = statements(kernels)
    files = [words[1] for words in said if words[0] == "kernel"]
    assert sorted(files) == sorted(path.name for path in kernels.glob("*.cubin"))
    assert len(set(files)) == len(files) >= 6
    for file in files:
        code = (kernels / file).read_bytes()
        assert code[:4] == b"\x7fELF"
        assert b"sm_90" in code
        assert str(ROOT).encode() not in code
    assert [words for words in said if words[0] == "capability"] == [["capability", "9", "0"]]
    programs = [words[1:] for words in said if words[0] == "program"]
    assert programs == [
        [",".join(layer.inputs), ",".join(layer.outputs), *layer.key().split()] for layer in (LAYER, WHOLE)
    ]
    ranges = [(int(words[1]), int(words[2])) for words in said if words[0] == "tokens"]
    assert ranges[0][0] == 1
    assert all(b[0] in (a[1] + 1, 1) for a, b in pairwise(ranges))
    assert said[-1] == ["end"]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6])
def test_the_library_launches_what_the_text_says(kernels, launcher, tokens):
    wanted = expected(kernels, LAYER, tokens)
    done = run(
        [str(launcher), str(kernels), str(tokens), *NODE],
        LD_LIBRARY_PATH=str(launcher.parent), STUB_ARGUMENTS=counted(wanted),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compared(wanted, done.stdout)


def test_what_there_is_no_program_for_is_refused(kernels, launcher):
    """With what there is."""

    def refusal(*node: str, tokens: int = 3, folder: Path = kernels, **environment: str) -> str:
        done = run([str(launcher), str(folder), str(tokens), *node], **environment)
        assert done.returncode == 1
        return done.stderr

    there = {"LD_LIBRARY_PATH": str(launcher.parent)}
    other = refusal(*(word.replace("bfloat16", "float16") for word in NODE))
    assert "has no kernels for DsMoE hidden=256 width=192 experts=8 top_k=2 dtype=float16" in other
    assert f"it has some for {LAYER.key()}; {WHOLE.key()}" in other
    assert "x has 7 tokens, and there are kernels for 1 to 6" in refusal(*NODE, tokens=7)
    assert "/nowhere/programs.txt cannot be read" in refusal(*NODE, folder=Path("/nowhere"))
    assert "compute capability 9.0, and this one has 8.0" in refusal(*NODE, STUB_CAPABILITY="80", **there)
    if (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout.count("libcuda.so.1")
        == 0
    ):
        assert "no CUDA driver: libcuda.so.1" in refusal(*NODE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda text: text.replace("dsmoe-programs 2", "dsmoe-programs 1"),
            "line 1: its format is 1, and this library reads 2",
        ),
        (lambda text: text.replace("\nend\n", "\n"), "is not whole: it has no 'end'"),
        (lambda text: text.replace("pointer x", "pointer z", 1), "there is no buffer 'z'"),
        (lambda text: text.replace("room 768", "room 7,T", 1), "'7,T' is no expression"),
        (lambda text: text.replace("launch 0 ", "launch 99 ", 1), "there is no kernel 99"),
        (lambda text: text.replace("room0", "room9", 1), "there is no such room"),
        (lambda text: text.replace("float 3f800000", "float 1.0", 1), "'1.0' is no 32 bits"),
        (lambda text: text.replace(f" {LAYER.key()}", "", 1), "a word is missing"),
        (lambda text: text.replace("kernel up", "kernel ../up", 1), "is not in this folder"),
        (lambda text: text.replace("capability 9 0", "capability 9 0 1"), "there are words too many"),
        (lambda text: text.replace("capability 9 0", "capability 9"), "a word is missing"),
        (lambda text: text.replace("room 768", "room T,0,/", 1), "division by zero"),
    ],
)
def test_a_broken_text_is_refused_by_its_line(kernels, launcher, tmp_path, change, reason):
    before = (kernels / TEXT).read_text()
    assert change(before) != before
    (tmp_path / TEXT).write_text(change(before))
    done = run([str(launcher), str(tmp_path), "1", *NODE], LD_LIBRARY_PATH=str(launcher.parent))
    assert done.returncode == 1
    assert reason in done.stderr


@pytest.mark.parametrize(("content", "reason"), [(b"nothing", "the stub's error"), (None, "cannot be read")])
def test_a_kernel_that_cannot_be_loaded_is_named(kernels, launcher, tmp_path, content, reason):
    shutil.copytree(kernels, tmp_path / "kernels")
    for path in (tmp_path / "kernels").glob("up_pairs-*.cubin"):
        path.unlink() if content is None else path.write_bytes(content)
    done = run([str(launcher), str(tmp_path / "kernels"), "1", *NODE], LD_LIBRARY_PATH=str(launcher.parent))
    assert done.returncode == 1
    assert "up_pairs-" in done.stderr
    assert reason in done.stderr


def test_what_cannot_be_compiled_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"there are kernels for compute capability 9\.0, none for 8\.0"):
        write([LAYER], tmp_path, capability=(8, 0))
    with pytest.raises(TargetError, match=r"there are no kernels for float64"):
        write([Layer(64, 32, 8, 2, "float64")], tmp_path)
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(TargetError, match=r"TRITON_INTERPRET=1 is set"):
            write([LAYER], tmp_path)
    assert not list(tmp_path.iterdir())
