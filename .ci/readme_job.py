"""Runs the `dsmoe` commands of README's first code block in a new folder, so that README stays true.

usage: python .ci/readme_job.py FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def commands() -> list[str]:
    """The lines of README's first shell block that call `dsmoe`."""
    block = re.search(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert block, "README.md has no shell block"
    lines = block.group(1).replace("\\\n", " ").splitlines()
    found = [line for line in lines if line.startswith("dsmoe ")]
    assert found, f"README.md: no line of its first shell block starts with 'dsmoe ': {lines}"
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    for command in commands():
        print(f"$ {command}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(["bash", "-c", command], cwd=folder, check=False)
        print(f"exit {done.returncode}, {time.perf_counter() - start:.1f} s", flush=True)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
