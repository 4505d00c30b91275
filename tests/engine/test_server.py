"""The test server: starts, reports why it cannot, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from vllm_mm_ext.testing.memory import MemoryWatch, snapshot
from vllm_mm_ext.testing.server import ServerError, serve


def wait_until_gone(pid: int, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.engine
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with (
        pytest.raises(ServerError, match=r"(?s)exited with code.*Error.*end of its log"),
        serve(tmp_path / "model", plugin=False),
    ):
        pytest.fail("it started")


def test_a_killed_owner_takes_its_server_along(tmp_path: Path) -> None:
    """The owner gets SIGKILL while its server starts; the server must not stay behind."""
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import sys\n"
        "from vllm_mm_ext.testing.server import serve\n"
        f"with serve({str(tmp_path)!r}, plugin=False): pass\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        servers: list[psutil.Process] = []
        while not servers and time.monotonic() < deadline:
            servers = [
                child
                for child in psutil.Process(owner.pid).children()
                if "serve" in child.cmdline()
            ]
            time.sleep(0.02)
        assert servers
        # The watchdog follows right after the server.
        time.sleep(0.3)
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    assert wait_until_gone(servers[0].pid)


def test_memory_counts_descendants_and_peaks() -> None:
    script = "import time; block = bytearray(64 << 20); time.sleep(30)"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        with MemoryWatch(os.getpid(), interval_s=0.02) as watch:
            deadline = time.monotonic() + 10
            while watch.peak["other"] < 64 << 20 and time.monotonic() < deadline:
                time.sleep(0.02)
        roles = {process.pid: process.role for process in snapshot(os.getpid())}
    finally:
        child.kill()
        child.wait()
    assert roles[os.getpid()] == "api"
    assert roles[child.pid] == "other"
    assert watch.peak["other"] >= 64 << 20
    # Everything but the engine counts, and what was there before is known.
    assert watch.front_end >= watch.peak["other"]
    assert watch.front_end >= watch.before > 0
