"""Parts of libmodel.so by themselves: the choice of a level, sizes as C, the process that calls it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.mlir import client, linking
from dsmoe_compiler.targets.mlir.tables import ALWAYS, expression
from dsmoe_runtime.errors import ConfigError, TargetError
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags

CHOOSING = """
#include "inside.h"
#include <stdarg.h>
#include <stdio.h>
static const char *const less[] = {"avx2", 0}, *const more[] = {"avx2", "avx1024", 0};
static const Level levels[] = {{"low", LOW, {0, 0}, {0, 0}}, {"high", more, {0, 0}, {0, 0}}};
const Tables tables = {.levels = levels, .level_count = 2};
int refuse(char *error, size_t size, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(error, size, format, values);
  va_end(values);
  return -1;
}
int main(void) {
  char error[256];
  (void)less;
  const Level *level = choose_level(NULL, error, sizeof error);
  puts(level ? level->name : error);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None or "avx2" not in cpu_flags(), reason="needs gcc and AVX2")
@pytest.mark.parametrize(("low", "said"), [("less", "low\n"), ("more", "level low uses avx1024, which this processor")])
def test_the_best_level_that_runs_is_chosen(low: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(CHOOSING.replace("LOW", low))
    sources = [str(tmp_path / "main.c"), str(linking.FIXED / "processor.c")]
    subprocess.run(["gcc", f"-I{linking.FIXED}", *sources, "-o", str(tmp_path / "main")], check=True)
    assert subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.startswith(said)


def test_every_feature_of_a_level_is_asked_for() -> None:
    known = set(re.findall(r'\{"(\w+)", ', (linking.FIXED / "processor.c").read_text()))
    for level in LEVELS.values():
        assert level.flags | {*ALWAYS} <= known


def test_levels_are_named_once_and_belong_to_mlir() -> None:
    with pytest.raises(ConfigError, match="name each of avx2, avx512"):
        CompileConfig(formats=("mlir",), levels=("avx2", "sse"))
    with pytest.raises(ConfigError, match="belong to format mlir"):
        CompileConfig(levels=("avx2",), target="cpu")
    config = CompileConfig(formats=("mlir",), levels=("avx2",))
    assert CompileConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_sizes_are_written_as_c() -> None:
    assert expression("4*s27 + s27//2 - s27**2", {"s27": "n"}) == "(((4 * n) + (n / 2)) - (n * n))"
    with pytest.raises(TargetError, match="no size that C could compute"):
        expression("2**s27", {"s27": "n"})


def test_the_client_needs_nothing_but_the_standard_library() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    code = f"import runpy, sys; runpy.run_path({client.__file__!r}); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "'ctypes'" in done.stdout
    assert "torch" not in done.stdout
