"""What the connector of the shared store says of a directory that cannot be written to."""

from __future__ import annotations

import errno
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_mm_ext.adapters.encoder_cache import shared_store
from vllm_mm_ext.adapters.encoder_cache.shared_store import SharedStoreConnector
from vllm_mm_ext.fleet.output_store import OutputStore


def test_a_disk_that_stays_full_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    now = [0.0]
    connector = SharedStoreConnector.__new__(SharedStoreConnector)
    connector.files = OutputStore(tmp_path, 1 << 20, clock=lambda: now[0])
    connector._writes, connector._told_of_failure, connector.stored = True, False, 0
    monkeypatch.setattr(shared_store.safetensors.torch, "save_file", fail)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for _ in range(30):
        connector._store("item", torch.ones(4))
        while any(thread.name.startswith("output-sweep") for thread in threading.enumerate()):
            time.sleep(0.01)
        now[0] += 10.0
    assert caplog.text.count("encoder outputs cannot be stored") == 1
    assert connector.stored == 0
    monkeypatch.undo()
    now[0] += 60.0
    connector._store("item", torch.ones(4))
    assert connector.stored == 1
