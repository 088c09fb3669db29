"""Libraries in packages want no executable stack; a linker says what they want, ld.so what it means."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from dsmoe_compiler.targets.elf import EXECUTABLE, plain_stack, stack_flags
from dsmoe_runtime.errors import TargetError


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("wish", ["execstack", "noexecstack"])
def test_the_wish_is_taken_back_and_the_library_still_loads(tmp_path: Path, wish: str) -> None:
    source, library = tmp_path / "seven.c", tmp_path / "seven.so"
    source.write_text("int seven(void) { return 7; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-z,{wish}", str(source), "-o", str(library)], check=True)
    before = library.read_bytes()
    found = stack_flags(library)
    assert found is not None
    assert bool(found[1] & EXECUTABLE) == (wish == "execstack")
    plain_stack(library)
    place, flags = stack_flags(library) or (0, EXECUTABLE)
    assert not flags & EXECUTABLE
    after = library.read_bytes()
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] in ([], [place])
    assert ctypes.CDLL(str(library)).seven() == 7


def test_something_else_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.so"
    file.write_bytes(b"MZ" * 64)
    with pytest.raises(TargetError, match=r"model\.so is no 64-bit ELF file"):
        plain_stack(file)
