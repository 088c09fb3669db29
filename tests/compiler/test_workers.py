"""Workers: results, words and errors come back, and nothing stays behind, whatever ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.targets.workers import Progress, Workers


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether it ends within seconds."""
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_results_and_progress_come_back() -> None:
    heard: list[str] = []

    def job(say: Progress) -> int:
        say("half way")
        return int((torch.ones(400, 400) @ torch.ones(400, 400)).sum())  # would hang in a fork with OpenMP threads

    torch.ones(800, 800) @ torch.ones(800, 800)  # the parent has its pool
    with Workers(heard.append) as workers:
        workers.start("a", job)
        workers.start("b", lambda say: os.getpid())
        results = workers.results(["a", "b"])
    assert results["a"] == 400**3
    assert results["b"] != os.getpid()
    assert heard == ["a: half way"]


def test_an_error_comes_back_in_its_own_words_and_ends_the_others() -> None:
    def fails(say: Progress) -> None:
        raise ValueError("no such register: xmm99")

    with Workers(print) as workers:
        workers.start("slow", lambda say: time.sleep(60))
        slow = next(iter(workers.running.values()))[1].pid
        workers.start("bad", fails)
        with pytest.raises(RuntimeError, match="bad failed: ValueError: no such register: xmm99"):
            workers.results(["slow", "bad"])
    assert gone(slow)


def test_a_killed_worker_is_reported() -> None:
    with Workers(print) as workers:
        workers.start("big", lambda say: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RuntimeError, match=r"big failed: it was killed \(out of memory\?\)"):
            workers.results(["big"])


def test_leaving_ends_what_a_worker_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def job(say: Progress) -> None:
        child = subprocess.Popen(["sleep", "60"])
        note.write_text(str(child.pid))
        child.wait()

    def interrupted() -> None:
        with Workers(print) as workers:
            workers.start("compiler", job)
            while not note.exists() or not note.read_text():
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(int(note.read_text()))


ORPHAN = """
import time
from dsmoe_compiler.targets.workers import Workers
with Workers(print) as workers:
    workers.start("w", lambda say: time.sleep(60))
    print(next(iter(workers.running.values()))[1].pid, flush=True)
    time.sleep(60)
"""


def test_a_worker_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    assert gone(worker)
