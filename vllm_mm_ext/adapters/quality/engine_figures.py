"""Ties the quality room to a running vLLM: its settings, and the board of its service."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.adapters.vllm_compat import settings_of
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.policies.quality.board import (
    Board,
    directories,
    file_name,
    join,
    private,
    remove_abandoned,
)
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.quality.tiers import LoadSample
from vllm_mm_ext.policies.scheduler.signal import EngineLoad, LoadReader, load_file

logger = logging.getLogger("vllm.mm_ext")

_lock = threading.Lock()
_board: Board | None = None


def controller_for(vllm_config: Any) -> QualityController:
    """The process's quality controller for a vLLM configuration; cheap after the first call."""
    engines = vllm_config.parallel_config.data_parallel_size
    return _controller(
        quality_settings(vllm_config), board_for(vllm_config), published(vllm_config), engines
    )


@lru_cache(maxsize=8)
def _controller(
    settings: QualitySettings, board: Board, loads: LoadReader, engines: int
) -> QualityController:
    def samples() -> Iterator[tuple[int, LoadSample]]:
        for engine, load in loads.loads(engines):
            yield engine, sample_of(load)

    return QualityController(settings, board, published=samples, engines=engines)


def sample_of(load: EngineLoad) -> LoadSample:
    """What tiers look at, of what an engine publishes."""
    return LoadSample(
        kv_usage=load.kv_usage,
        running=load.running,
        waiting=load.waiting,
        capacity=load.slots,
        time=load.time,
        backlog_s=load.backlog_s,
    )


@lru_cache(maxsize=1)
def _reader(main: int) -> LoadReader:
    return LoadReader(load_file(main))


def published(vllm_config: Any) -> LoadReader:
    """What the engines of this service publish, if they run the plugin's scheduler."""
    parent = multiprocessing.parent_process()
    several = getattr(vllm_config.parallel_config, "_api_process_count", 1) > 1
    main = parent.pid if several and parent is not None else None
    return _reader(main or os.getpid())


def quality_settings(vllm_config: Any) -> QualitySettings:
    """The ``quality`` section that travels with a vLLM configuration; the defaults without one."""
    return settings_of(vllm_config.model_config).quality


def board_for(vllm_config: Any) -> Board:
    """The board that this process shares with the other API servers of its service."""
    global _board
    with _lock:
        if _board is None:
            _board = _join(getattr(vllm_config.parallel_config, "_api_process_count", 1))
        return _board


def _join(api_servers: int) -> Board:
    parent = multiprocessing.parent_process()
    if api_servers == 1 or parent is None or parent.pid is None:
        return private()
    # The start time tells the service from an earlier one whose main process had the same id.
    started = psutil.Process(parent.pid).create_time()
    name = file_name(f"{parent.pid}-{started:.2f}")
    for directory in directories():
        remove_abandoned(directory)
        try:
            return join(directory / name, api_servers)
        except OSError as error:
            logger.warning("mm_ext: no file for load and quality in %s: %s", directory, error)
    logger.warning("mm_ext: API servers do not share what they know of load and quality")
    return private()
