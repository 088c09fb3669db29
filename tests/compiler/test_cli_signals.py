"""Ctrl-C, SIGTERM and a reader that leaves: the shell's exit codes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="who is left is read from /proc")
MARK = "DSMOE_TEST_MARK"


def start(arguments: list[str], mark: Path) -> subprocess.Popen[str]:
    """Start a program whose temporary files go to `mark`, and whose processes can be told by it."""
    temporary = mark / "tmp"
    temporary.mkdir()
    folders = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(mark / "cache")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, MARK: str(mark), **folders},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background ignores ctrl-c for all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def alive(mark: Path) -> list[str]:
    """The command lines of the processes that carry `mark` in their environment; zombies do not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]


def soon_nothing(mark: Path) -> list[str]:
    deadline = time.monotonic() + 10
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive(mark)


@NEEDS_PROC
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_a_signal_unwinds_what_is_under_way(number: signal.Signals, code: int, tmp_path: Path) -> None:
    program = """if True:
        import sys, tempfile, time
        from dsmoe_compiler.cli import list as verb
        from dsmoe_compiler.cli.main import main

        def run(args):
            with tempfile.TemporaryDirectory():
                print("ready", flush=True)
                time.sleep(60)

        verb.run = run
        sys.exit(main(["list"]))
    """
    process = start(["-c", program], tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, number)
    assert process.wait(timeout=20) == code
    assert process.stderr.read() == ("interrupted\n" if code == 130 else "")
    assert list((tmp_path / "tmp").iterdir()) == []


@NEEDS_PROC
@pytest.mark.slow
def test_ctrl_c_while_compiling_leaves_nothing(tmp_path: Path) -> None:
    """Row 54: the signal goes to the main process alone; workers and C++ compilers must go with it."""
    out = tmp_path / "out" / "tiny"
    process = start(["-m", "dsmoe_compiler", "compile", "deepseek-moe-tiny", "-o", str(out)], tmp_path)
    assert process.stderr is not None
    try:
        deadline = time.monotonic() + 400
        while not any("cc1plus" in line for line in alive(tmp_path)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, alive(tmp_path)
            time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()
    assert soon_nothing(tmp_path) == []
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_reader_that_leaves_is_no_error() -> None:
    """`dsmoe list | head -1`: what head does not read must not end in a traceback."""
    program = "from dsmoe_compiler.cli.main import main; import sys; sys.exit(main(['list', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    assert error == ""
