"""Building the library, keeping it, loading it into a runtime, and what is said where one of that is not possible."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.cli import main
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ort_library import build

ROOT = Path(__file__).parents[2]
MINIMUM = int(re.search(r"RUNTIME_MINIMUM = (\d+)", (build.FOLDER / "abi.h").read_text())[1])

TABLE = 300  # more places than any function of the interface that is used


def test_every_source_of_the_folder_is_compiled():
    assert sorted(build.SOURCES) == sorted(path.name for path in build.FOLDER.glob("*.cpp"))


def test_the_oldest_runtime_is_the_one_that_the_package_asks_for():
    assert f'"onnxruntime>=1.{MINIMUM}"' in (ROOT / "pyproject.toml").read_text()


def test_a_library_is_built_once(monkeypatch):
    path = build.library()

    def never(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(build, "_build", never)
    assert build.library() == path
    assert path.stat().st_size > 0


def test_other_sources_and_other_compilers_make_other_libraries(monkeypatch, tmp_path):
    key = build._key(["c++"])
    assert build._key(["c++", "-m64"]) != key
    (tmp_path / "one.cpp").write_text("int one;")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    first = build._key(["c++"])
    (tmp_path / "one.cpp").write_text("int two;")
    assert len({key, first, build._key(["c++"])}) == 3


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"none of c\+\+, g\+\+, clang\+\+ is in PATH; install one .* runs without"):
        build.library()


def test_a_compiler_that_is_not_there_is_not_replaced(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(TargetError, match="CXX is 'no-such-compiler -O1', and there is no such program"):
        build.library()


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    """Its own words are in the message, and nothing is left behind."""
    script = tmp_path / "cc"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit\necho "x.cpp:1: error: no disk" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(TargetError, match=r"compiling library.cpp .* failed: x.cpp:1: error: no disk"):
        build.library()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_where_others_may_write_is_refused(monkeypatch, tmp_path):
    """What lies there is loaded and run."""
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort").chmod(0o777)
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    with pytest.raises(TargetError, match=r"ort belongs to user .* mode 777: .* may write there; .* DSMOE_CACHE_DIR"):
        build.library()


def test_nothing_but_the_entry_is_visible_and_only_system_libraries_are_needed():
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(build.library())], capture_output=True, text=True)
    ours = [line.split()[-1] for line in symbols.stdout.splitlines() if " T " in line]
    assert ours == ["RegisterCustomOps"]
    needed = subprocess.run(["readelf", "-d", str(build.library())], capture_output=True, text=True).stdout
    names = re.findall(r"\(NEEDED\).*\[([a-z+0-9-]+)\.so", needed)
    assert set(names) <= {"libstdc++", "libc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "ld-linux-x86-64"}


def test_an_older_runtime_is_refused_by_its_version():
    """A runtime that has no table for our version, and in its first one the function that makes an error."""
    said: list[str] = []

    @ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        said.append(message.decode())
        return 4711

    table = (ctypes.c_void_p * TABLE)()
    table[0] = ctypes.cast(create_status, ctypes.c_void_p).value
    get_api = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint32)(lambda v: ctypes.addressof(table) if v == 1 else 0)
    version = ctypes.create_string_buffer(b"1.17.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_size_t)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version)))
    register = ctypes.CDLL(str(build.library())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 4711
    assert said == [f"dsmoe::DsMoE wants onnxruntime 1.{MINIMUM} or newer, and this is 1.17.3"]


def test_the_node_runs_by_the_library_and_not_by_its_function_body():
    """A node without a body needs the library; where a body is there as well, even a wrong one, the library is used."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")

    from tests.runtime.op_cases import attributes, expert_case, run
    from tests.runtime.ort_node import INPUTS, answer, model, session

    case, names = expert_case(), INPUTS[:5]
    bare = model(names, torch.float32, attributes())
    with pytest.raises(Exception, match=r"DsMoE.*is not a registered function/op"):
        session(bare, with_library=False)
    wrong = onnx.parser.parse_function(
        '<domain: "dsmoe", opset_import: ["" : 21]> DsMoE <activation, alpha, limit, layout>'
        " (x, experts, weights, gate_up, down) => (y) { y = Sub(x, x) }"
    )
    with_body = model(names, torch.float32, attributes(), [wrong])
    assert not answer(session(with_body, with_library=False), case).any()
    expected = answer(session(bare), case)
    assert torch.equal(answer(session(with_body), case), expected)
    torch.testing.assert_close(expected, run(case))


def test_the_command(tmp_path, capsys):
    assert main(["build-ort"]) == 0
    assert capsys.readouterr().out == f"{build.library()}\n"
    wanted = tmp_path / "mine.so"
    assert main(["build-ort", "-o", str(wanted)]) == 0
    assert wanted.read_bytes() == build.library().read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.so"]
    assert main(["build-ort", "-o", str(tmp_path)]) == 2
    assert main(["build-ort", "-o", str(tmp_path / "none" / "mine.so")]) == 2
    assert "does not exist" in capsys.readouterr().err
