"""Publishes how busy vLLM's scheduler is (see ``signal.py``)."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import weakref
from typing import Any

from vllm_mm_ext.policies.scheduler.signal import (
    EngineLoad,
    LoadWriter,
    load_file,
    remove_abandoned,
)
from vllm_mm_ext.policies.scheduler.step_times import StepTimes

_ENGINE_PROCESS = "EngineCore"

logger = logging.getLogger("vllm.mm_ext")


class LoadPublisher:
    """One engine's figures.

    Args:
        scheduler: vLLM's scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._writer: LoadWriter | None = None
        parent = multiprocessing.parent_process()
        # An engine with a process of its own was started by the service's main process.
        apart = multiprocessing.current_process().name.startswith(_ENGINE_PROCESS)
        main = parent.pid if apart and parent is not None else None
        try:
            path = load_file(main or os.getpid())
            remove_abandoned(path.parent)
            engine = scheduler.parallel_config.data_parallel_index
            self._writer = LoadWriter(path, engine)
            # Also where an engine in this process is dropped without being shut down.
            self._close = weakref.finalize(self, self._writer.close)
        except OSError as error:
            logger.warning("mm_ext: API servers are not told how busy the engine is: %s", error)

    def publish(self, backlog_tokens: int, times: StepTimes) -> None:
        """Tell where the engine stands after a step.

        Args:
            backlog_tokens: Encoder outputs that requests still need.
            times: What steps take.
        """
        if self._writer is None:
            return
        scheduler = self._scheduler
        usage = scheduler.kv_cache_manager.usage
        # The plugin's block pool counts what is kept, too.
        pressure = getattr(scheduler.kv_cache_manager.block_pool, "true_pressure", None)
        running, waiting = scheduler.get_request_counts()
        self._writer.write(
            EngineLoad(
                time=time.monotonic(),
                kv_usage=usage,
                kv_pressure=usage if pressure is None else pressure(),
                running=running,
                waiting=waiting,
                slots=scheduler.max_num_active_reqs,
                backlog_tokens=backlog_tokens,
                backlog_s=times.seconds(backlog_tokens, 0),
                itl_s=times.itl_s,
            )
        )

    def close(self) -> None:
        """The engine ends."""
        if self._writer is not None:
            self._close()
            self._writer = None
