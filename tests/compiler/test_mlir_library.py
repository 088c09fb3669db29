"""libmodel.so: eager's tokens from C and from ctypes without torch, at each level; what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("torch_mlir")

import dsmoe_compiler as dsmoe
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.mlir import linking
from dsmoe_compiler.targets.mlir.proof import called, check_library
from dsmoe_model.checkpoint.shards import read_header, write_shard
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from tests.compiler.test_mlir_backend import SMALL

pytestmark = [
    pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]
CAPACITY = 48
MODEL = replace(SMALL, max_position_embeddings=CAPACITY)
EXAMPLE = Path(__file__).parents[2] / "examples" / "c" / "generate.c"
WEIGHTS = "weights/model-00001-of-00001.safetensors"
PROMPT = [7, 250, 31]
BOTH = ("avx2", "avx512")
HERE = [name for name in BOTH if LEVELS[name].flags <= cpu_flags()]


def compiled(tmp: Path, config: CompileConfig, dtype: torch.dtype = torch.float32) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE_DIR", str(tmp.parent / "objects"))
        return dsmoe.compile(build(MODEL, dtype=dtype, seed=2), config=config).save(tmp / "out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("both"), CompileConfig(formats=("mlir",), levels=BOTH))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def program(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("example") / "generate"
    library = [str(folder / "libmodel.so"), f"-Wl,-rpath,{folder}"]
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{folder}"]
    subprocess.run(["gcc", *strict, str(EXAMPLE), *library, "-o", str(made)], check=True)
    return made


def greedy(model: Transformer, ids: list[int], new: int) -> list[int]:
    row = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(new):
            row = torch.cat((row, model(row).logits_BSV[:, -1].argmax(-1, keepdim=True)), dim=1)
    return row[0, len(ids) :].tolist()


def generated(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", HERE)
def test_c_gives_the_tokens_of_eager(folder: Path, program: Path, level: str) -> None:
    new = CAPACITY - len(PROMPT)
    done = generated(program, folder, ",".join(map(str, PROMPT)), new, level)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split(",")] == greedy(build(MODEL, seed=2), PROMPT, new)
    assert done.stderr.startswith(f"{level}, ")


def test_the_example_takes_the_best_level_and_says_what_is_wrong(folder: Path, program: Path) -> None:
    assert generated(program, folder, "7,250", 2).stderr.startswith(f"{HERE[-1]}, ")
    for arguments, why in {
        (folder, "7,260", 2): "id 260, number 1, is not in the vocabulary of 260",
        (folder, "7,-1", 2): "id -1",
        (folder, "7", CAPACITY): "must fit",
        (folder / "nowhere", "7", 2): r"nowhere/weights/model-.*safetensors cannot be opened: No such file",
    }.items():
        done = generated(program, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.search(why, done.stderr), done.stderr


# What the header promises, from a process that has numpy and no torch; each line is a fact that the test below reads.
FRESH = """
import ctypes, json, sys
import numpy as np
folder = sys.argv[1]
so = ctypes.CDLL(folder + "/libmodel.so")
so.dsmoe_create.restype, so.dsmoe_error.restype = ctypes.c_void_p, ctypes.c_char_p
text = ctypes.create_string_buffer(512)
model = ctypes.c_void_p(so.dsmoe_create(folder.encode(), None, text, ctypes.c_size_t(512)))
sizes = [so.dsmoe_batch(model), so.dsmoe_capacity(model), so.dsmoe_vocabulary(model)]
logits, facts = np.full(sizes[2], np.nan, np.float32), []
out = logits.ctypes.data_as(ctypes.c_void_p)
def prefill(ids):
    ids = np.array(ids, np.int64)
    return so.dsmoe_prefill(model, ids.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(ids)), out)
def decode(token, position):
    token = np.array([token], np.int64)
    return so.dsmoe_decode(model, token.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(position), out)
def note(code):
    facts.append([code, so.dsmoe_length(model), so.dsmoe_error(model).decode()])
facts.append(sizes)
note(decode(1, 1)); note(prefill([])); note(prefill([1] * (sizes[1] + 1)))
note(prefill(PROMPT))
tokens = []
for _ in range(5):
    tokens.append(int(logits.argmax())); assert not np.isnan(logits).any()
    decode(tokens[-1], so.dsmoe_length(model))
note(decode(1, sizes[1])); note(decode(1, -1)); note(decode(sizes[2], 3)); note(decode(1, 9))
again = []
decode(tokens[1], 4)                                   # what stood at 4 and after is forgotten
again.append(int(logits.argmax())); note(0)
note(so.dsmoe_prefill(model, None, ctypes.c_int64(1), out))
so.dsmoe_destroy(model); so.dsmoe_destroy(None)
print(json.dumps({"facts": facts, "tokens": tokens, "again": again, "torch": "torch" in sys.modules}))
"""


def test_ctypes_without_torch(folder: Path) -> None:
    code = FRESH.replace("PROMPT", str(PROMPT))
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    tokens = greedy(build(MODEL, seed=2), PROMPT, 5)
    assert said["tokens"] == tokens
    assert said["again"] == tokens[2:3]
    assert not said["torch"]
    assert said["facts"] == [
        [1, CAPACITY, 260],
        [-1, 0, "position is 1, but only 0 are filled: none may be left out"],
        [-1, 0, f"the prompt has 0 tokens; 1 to {CAPACITY} fit (max_seq_len)"],
        [-1, 0, f"the prompt has {CAPACITY + 1} tokens; 1 to {CAPACITY} fit (max_seq_len)"],
        [0, 3, ""],
        [-1, 8, f"position is {CAPACITY}; the cache has positions 0 to {CAPACITY - 1}"],
        [-1, 8, f"position is -1; the cache has positions 0 to {CAPACITY - 1}"],
        [-1, 8, "id 260, number 0, is not in the vocabulary of 260"],
        [-1, 8, "position is 9, but only 8 are filled: none may be left out"],
        [0, 5, ""],
        [-1, 5, "ids is NULL"],
    ]


def test_the_proof_covers_the_library_in_bfloat16(tmp_path: Path) -> None:
    """Its logits are compared with the runner's bit for bit; here it is seen that this was done."""
    made = compiled(tmp_path, CompileConfig(formats=("mlir",), levels=("avx2",)), torch.bfloat16)
    checks = json.loads((made / "manifest.json").read_text())["verification"]["checks"]
    (library,) = [check for check in checks if check["name"] == "libmodel.so, avx2"]
    assert library["ok"]
    assert library["numbers"] == {"logits": (3 + 3 + 13) * 260, "differ": 0}


def test_several_sequences_at_a_time(tmp_path: Path) -> None:
    config = CompileConfig(formats=("mlir",), levels=("avx2",), batch_size=3, verify=False)
    made = compiled(tmp_path, config)
    rows = [[7, 250, 31], [1, 2, 3], [9, 9, 200]]
    expected = [greedy(build(MODEL, seed=2), row, 6) for row in rows]
    logits = called(made, "avx2", [(rows, torch.tensor(expected).T[:5].tolist())])
    assert logits.view(6, 3, 260).argmax(-1).T.tolist() == expected
    assert check_library(made, "avx2", dsmoe.load(made), seed=1).numbers == {"logits": 19 * 3 * 260, "differ": 0}


def test_the_proof_can_fail(copy: Path) -> None:
    """Another weight gives other logits, and a process that dies has a reason."""
    runs = [([PROMPT], [[5], [9]])]
    before = called(copy, "avx2", runs)
    assert before.shape == (3 * 260,)
    entry = read_header(copy / WEIGHTS)["model.lm_head.weight"]
    with (copy / WEIGHTS).open("r+b") as file:
        file.seek(entry.offset)
        file.write(torch.ones(1).numpy().tobytes())
    assert not torch.equal(called(copy, "avx2", runs), before)
    with pytest.raises(RuntimeError, match="no level sse; it holds avx2, avx512"):
        called(copy, "sse", runs)
    (copy / "libmodel.so").write_bytes(b"")
    with pytest.raises(RuntimeError, match="file too short"):
        called(copy, "avx2", runs)


def refusal(folder: Path) -> str:
    """What creating a model from damaged weights says."""
    with pytest.raises(RuntimeError) as caught:
        called(folder, "avx2", [([PROMPT], [])])
    return str(caught.value)


def test_weights_that_do_not_fit_are_refused_by_name(copy: Path) -> None:
    file, stored = copy / WEIGHTS, (copy / WEIGHTS).read_bytes()
    file.unlink()
    assert re.search(r"safetensors cannot be opened: No such file", refusal(copy))
    for wrong in (stored[:-1], stored + b"\0", b""):
        file.write_bytes(wrong)
        assert f"has {len(wrong)} bytes, the library was compiled for a file of {len(stored)}" in refusal(copy)
    header = int.from_bytes(stored[:8], "little")
    file.write_bytes((header - 8).to_bytes(8, "little") + stored[8:])
    assert f"has a header of {header - 8} bytes, the library was compiled for one of {header}" in refusal(copy)
    file.write_bytes(stored.replace(b'"model.norm.weight"', b'"model.norm.height"'))
    assert "has no tensor model.norm.weight" in refusal(copy)
    file.write_bytes(stored.replace(b'"model.norm.weight":{"dtype":"F32"', b'"model.norm.weight":{"dtype":"I32"'))
    assert re.search(
        r'"model.norm.weight":\{"dtype":"I32".*compiled for "model.norm.weight":\{"dtype":"F32"', refusal(copy)
    )
    file.write_bytes(stored)
    assert called(copy, "avx2", [([PROMPT], [])]).isfinite().all()


def test_a_level_that_the_processor_lacks_is_refused(folder: Path) -> None:
    if len(HERE) == len(BOTH):
        pytest.skip("this processor has all levels")
    with pytest.raises(RuntimeError, match="level avx512 uses avx512bw, which this processor or system lacks"):
        called(folder, "avx512", [([PROMPT], [])])
    checks = json.loads((folder / "manifest.json").read_text())["verification"]["checks"]
    assert checks[-1]["detail"].startswith("compiled, not run: this processor lacks avx512bw")


def test_it_needs_libc_alone_and_exports_its_header_alone(folder: Path) -> None:
    def listed(*command: str) -> str:
        return subprocess.run([*command, folder / "libmodel.so"], capture_output=True, text=True, check=True).stdout

    dynamic = listed("readelf", "-dW")
    needed = {name.partition(".")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic)}
    assert needed <= {"libgomp", "libm", "libc"}
    assert "TEXTREL" not in dynamic
    assert "RWE" not in listed("readelf", "-lW")
    exported = {line.split()[-1] for line in listed("nm", "-D", "--defined-only").splitlines()}
    assert exported == set(
        re.findall(r"\b(dsmoe_\w+)\(", re.sub(r"/\*.*?\*/", "", (folder / "model.h").read_text(), flags=re.S))
    )


def test_the_code_of_avx2_uses_no_wider_register(folder: Path) -> None:
    """And the code of AVX512 does, else this would prove nothing."""
    objects = json.loads((folder / "model.json").read_text())["phases"]["decode"]["objects"]
    for level, wide in (("avx2", False), ("avx512", True)):
        for name in objects[level]:
            if name.startswith(("moe", "linear")) or not wide:
                command = ["objdump", "-d", "-j", ".ltext", str(folder / "objects" / f"{name}.o")]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                assert ("%zmm" in text) == wide, name


def test_weights_are_mapped_and_shared(folder: Path) -> None:
    code = (
        f"import ctypes; so = ctypes.CDLL({str(folder / 'libmodel.so')!r}); so.dsmoe_create.restype = ctypes.c_void_p\n"
    )
    code += f"assert so.dsmoe_create({str(folder).encode()!r}, None, None, ctypes.c_size_t(0))\n"
    code += "print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in maps.splitlines() if ".safetensors" in line]
    assert line.split()[1] == "r--p"


@pytest.mark.parametrize("cc", ["no-such-compiler", "false"])
def test_without_a_compiler_the_artifact_is_written_and_says_so(
    cc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", cc)
    heard: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE_DIR", str(tmp_path.parent / "objects"))
        config = CompileConfig(formats=("mlir",), levels=("avx2",), verify=False)
        artifact = dsmoe.compile(build(MODEL, seed=2), config=config, progress=heard.append)
    made = artifact.save(tmp_path / "out")
    assert not (made / "libmodel.so").exists()
    said = artifact.manifest["mlir"]["library"]
    assert cc in said["missing"]
    assert any(line.startswith("no libmodel.so: ") and cc in line for line in heard)
    ids = torch.tensor([PROMPT])
    assert dsmoe.load(made).generate(ids, max_new_tokens=4)[0, 3:].tolist() == greedy(build(MODEL, seed=2), PROMPT, 4)
    monkeypatch.delenv("CC")
    command = said["command"].replace(cc, "gcc", 1)
    subprocess.run(command, shell=True, cwd=made, check=True)  # what it says to do, done
    shutil.copyfile(made.parent / "libmodel.so", made / "libmodel.so")
    assert called(made, "avx2", [([PROMPT], [])]).isfinite().all()


def test_a_weight_that_lies_where_its_type_may_not_is_copied(copy: Path) -> None:
    """After a tensor of three halves the float32 ones begin at odd places."""
    before = called(copy, "avx2", [([PROMPT], [[5]])])
    whole: dict[str, Tensor] = {"a": torch.zeros(3, dtype=torch.float16)}
    raw = (copy / WEIGHTS).read_bytes()
    for entry in read_header(copy / WEIGHTS).values():
        part = bytearray(raw[entry.offset : entry.offset + entry.nbytes])
        whole[entry.name] = torch.frombuffer(part, dtype=torch.float32).view(entry.shape)
    write_shard(copy / WEIGHTS, list(whole.items()))
    phases = json.loads((copy / "model.json").read_text())["phases"]
    interfaces = {name: linking.Interface.from_dict(said["interface"]) for name, said in phases.items()}
    shutil.rmtree(copy / "library")
    linking.write_sources(copy, interfaces, {n: s["weights"] for n, s in phases.items()}, [LEVELS[n] for n in BOTH])
    assert linking.link(copy).missing is None
    assert torch.equal(called(copy, "avx2", [([PROMPT], [[5]])]), before)
