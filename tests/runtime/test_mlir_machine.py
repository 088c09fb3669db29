"""Feature levels, the compiler, the cache and the loader of the mlir-cpu kernels."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch_mlir")

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.mlir import cache
from dsmoe_runtime.mlir.compile import compile_object, mlir, stages
from dsmoe_runtime.mlir.experts import experts_kernel
from dsmoe_runtime.mlir.experts_lowering import ExpertsSpec, experts_function
from dsmoe_runtime.mlir.gate_up import Activation
from dsmoe_runtime.mlir.kernel import callable_module, function_object
from dsmoe_runtime.mlir.levels import LEVELS, best_level, cpu_flags, level_named
from dsmoe_runtime.mlir.loader import LoadedObject


def spec(level="avx2", element="f32"):
    return ExpertsSpec(element, Activation("silu", 1.0, 1.0), "concat", False, False, level_named(level))


@pytest.mark.slow
@pytest.mark.parametrize("element", ["f32", "bf16"])
@pytest.mark.parametrize("level", sorted(LEVELS))
def test_every_level_builds_with_its_own_registers_only(level, element, tmp_path):
    """Whatever this processor is: a level without AVX512 has no 512-bit register, mask register or ymm16 and up."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    image = function_object(experts_function(spec(level, element)), level_named(level))
    (tmp_path / "kernel.o").write_bytes(image)
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(tmp_path / "kernel.o")], capture_output=True, text=True, check=True
    ).stdout
    assert len(re.findall(r"\bvfmadd", text)) > 50
    beyond_avx2 = re.findall(r"%zmm\d+|%k[1-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])\b", text)
    assert bool(beyond_avx2) == (level != "avx2")


def test_the_level_is_chosen_by_what_the_processor_lists():
    avx2 = LEVELS["avx2"].flags
    assert best_level(avx2).name == "avx2"
    assert best_level(avx2 | {"avx512f"}).name == "avx2"
    assert best_level(LEVELS["avx512"].flags).name == "avx512"
    with pytest.raises(TargetError, match=r"lacks .*fma"):
        best_level(avx2 - {"fma"})
    with pytest.raises(TargetError, match="must be one of avx2"):
        level_named("sse")


@pytest.mark.skipif(LEVELS["avx512"].flags <= cpu_flags(), reason="this processor has AVX512")
def test_a_level_that_would_be_an_illegal_instruction_is_refused():
    with pytest.raises(TargetError, match="avx512f"):
        experts_kernel(spec("avx512"))


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_no_level_leaves_its_features_to_the_machine_that_compiles(level):
    """A function without them gets all that this processor has: an avx2 object made beside AVX512 used it."""
    text = stages(callable_module(experts_function(spec(level))), level_named(level))["llvm_ir"]
    groups = dict(re.findall(r"^attributes (#\d+) = \{(.*)\}$", text, flags=re.M))
    defined = re.findall(r"^define .* (#\d+) (?:!.*)?\{$", text, flags=re.M)
    assert len(defined) == text.count("\ndefine ") > 5
    assert all(f'"target-features"="{LEVELS[level].features}"' in groups[group] for group in defined)
    assert LEVELS[level].features.startswith("+")


def test_every_stage_can_be_read():
    """The operator's parts have their names to the end of MLIR; LLVM's text carries the level."""
    function = experts_function(spec())
    text = stages(callable_module(function), level_named("avx2"))
    assert list(text) == ["source", "llvm", "llvm_ir"]
    for part in ("sort", "gather_lanes_f32", "gate_up_concat", "down_rows", "combine", "rows_f32_3x4", "lanes_16x6"):
        assert f"@{function.name}_{part}(" in text["source"]
        assert f"@{function.name}_{part}(" in text["llvm"]
    assert "vector.fma" in text["source"]
    assert "scf.for" not in text["llvm"]
    assert 'target-cpu"="x86-64-v3"' in text["llvm_ir"].replace(" ", "")


def test_an_object_is_cached_and_a_damaged_one_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    made = []

    def make() -> bytes:
        made.append(1)
        return b"object"

    assert cache.cached("key", make) == cache.cached("key", make) == b"object"
    assert len(made) == 1
    (file,) = (tmp_path / "mlir").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert cache.cached("key", make) == b"object"
    assert len(made) == 2
    assert cache.cached("another key", make) == b"object"
    assert len(made) == 3


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path / "file"))
    assert cache.cached("key", lambda: b"object") == b"object"


def test_objects_that_others_could_have_written_are_not_loaded(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "mlir"
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path))
    assert cache.cached("key", lambda: b"object") == b"object"
    folder.chmod(0o770)
    cache._folder.cache_clear()
    monkeypatch.setattr(logging.getLogger("dsmoe_runtime"), "propagate", True)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert cache.cached("key", lambda: b"made now") == b"made now"
    (message,) = set(caplog.messages)  # a handler of the command line may hand it on once more
    assert "others than you" in message
    assert "DSMOE_CACHE_DIR" in message
    assert cache._folder.cache_info().misses == 1


def test_what_is_no_object_is_refused():
    with pytest.raises(TargetError, match="not an ELF relocatable"):
        LoadedObject(b"\x7fELF\x02\x01" + bytes(100))


def test_a_function_that_nobody_has_is_named():
    source = """module {
      llvm.func @nobody_has_this()
      llvm.func @f() { llvm.call @nobody_has_this() : () -> ()  llvm.return }
    }"""
    with pytest.raises(TargetError, match="nobody_has_this"):
        LoadedObject(compile_object(source, level_named("avx2"), "f"))


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_mlir.ir", None)
    with pytest.raises(TargetError, match=r"pip install 'dsmoe-compiler\[mlir\]'"):
        mlir()
