"""Ties the quality room to a running vLLM: its settings, and the board of its service."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.quality.board import Board, directories, file_name, remove_abandoned
from vllm_mm_ext.quality.controller import QualityController
from vllm_mm_ext.quality.settings import QualitySettings
from vllm_mm_ext.vllm_compat import settings_of

logger = logging.getLogger("vllm.mm_ext")

_lock = threading.Lock()
_boards: dict[str, Board] = {}


def controller_for(vllm_config: Any) -> QualityController:
    """The process's quality controller for a vLLM configuration; cheap after the first call.

    Raises:
        OSError: No directory takes a small file; the message of the last one.
    """
    return _controller(quality_settings(vllm_config), board_for(vllm_config))


@lru_cache(maxsize=8)
def _controller(settings: QualitySettings, board: Board) -> QualityController:
    return QualityController(settings, board)


def quality_settings(vllm_config: Any) -> QualitySettings:
    """The ``quality`` section that travels with a vLLM configuration; the defaults without one."""
    section = getattr(settings_of(vllm_config.model_config), "quality", None)
    return section if isinstance(section, QualitySettings) else QualitySettings()


def board_for(vllm_config: Any) -> Board:
    """The board that this process shares with the other API servers of its service.

    Raises:
        OSError: See ``controller_for``.
    """
    service = _service(vllm_config.parallel_config._api_process_count)
    with _lock:
        if service not in _boards:
            _boards[service] = _open(service)
        return _boards[service]


def _service(api_servers: int) -> str:
    """A name that the API servers of one service agree on: that of their common parent process.

    A single one runs in the main process itself. The start time tells it from an earlier process
    with the same id.
    """
    parent = multiprocessing.parent_process() if api_servers > 1 else None
    pid = parent.pid if parent is not None and parent.pid is not None else os.getpid()
    return f"{pid}-{psutil.Process(pid).create_time():.2f}"


def _open(service: str) -> Board:
    problem: OSError | None = None
    for directory in directories():
        remove_abandoned(directory)
        path: Path = directory / file_name(service)
        try:
            return Board(path)
        except OSError as error:
            logger.warning("mm_ext: no board for load and quality in %s: %s", directory, error)
            problem = error
    assert problem is not None
    raise problem
