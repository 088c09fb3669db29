"""The library's arithmetic with sixteen lanes, as on AVX-512, built for AVX2: GCC makes two vectors of each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from dsmoe_runtime.ort_library import build

ROOT = Path(__file__).parents[2]
RUN = """
import sys, pathlib, pytest
from dsmoe_runtime.ort_library import build
build.FOLDER = pathlib.Path(sys.argv[1])
sys.exit(pytest.main(["-q", "tests/runtime/test_ort_library.py", "-p", "no:cacheprovider",
                      "-k", "agrees_with_the_rule or any_number_of_rows or any_width"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
def test_sixteen_lanes(tmp_path):
    folder = tmp_path / "sources"
    shutil.copytree(build.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    lines = {
        line.split()[1]: line for line in (folder / "cpu_avx512.cpp").read_text().splitlines() if "#define" in line
    }
    text = (folder / "cpu_avx2.cpp").read_text()
    for line in text.splitlines():
        if line.startswith(("#define LANES", "#define TILES")):
            text = text.replace(line, lines[line.split()[1]])
        elif line.startswith("#define WIDEN_F16"):
            text = text.replace(line, "")
    assert "LANES 16" in text
    (folder / "cpu_avx2.cpp").write_text(text)
    environment = os.environ | {"DSMOE_CPU": "avx2", "DSMOE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len(list((tmp_path / "cache" / "ort").iterdir())) == 1
