"""vLLM's engine figures on the board (``vllm.stat_logger_plugins`` entry point).

The class of the entry point is made by vLLM in each API server. The engine reports after each step,
to one API server only, so every one of them writes what it gets.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_mm_ext.adapters.quality.engine_figures import board_for, quality_settings
from vllm_mm_ext.policies.quality.load_signal import LoadSignal
from vllm_mm_ext.policies.quality.tiers import LoadSample

logger = logging.getLogger("vllm.mm_ext")

_NEEDED = (
    "kv_cache_usage",
    "num_running_reqs",
    "num_waiting_reqs",
    "num_skipped_waiting_reqs",
)


class BoardStatLogger(AggregateStatLoggerBase):  # type: ignore[misc]
    """Writes how busy the engines are to the board.

    Args:
        vllm_config: vLLM's configuration.
        engine_indexes: Engines that this API server hears of.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._signal: LoadSignal | None = None
        engines = max(
            vllm_config.parallel_config.data_parallel_size, *(index + 1 for index in engine_indexes)
        )
        self._capacity = vllm_config.scheduler_config.max_num_seqs
        missing = [name for name in _NEEDED if not hasattr(SchedulerStats, name)]
        if missing:
            logger.warning(
                "mm_ext: quality does not follow load: vLLM no longer reports %s",
                ", ".join(missing),
            )
            return
        settings = quality_settings(vllm_config)
        # Joined in any case: the board loses its name when all API servers have it.
        board = board_for(vllm_config)
        if settings.enabled:
            self._signal = LoadSignal(settings.tiers, board, engines=engines)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,  # noqa: ARG002 - vLLM's interface
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,
    ) -> None:
        """Take a step's figures; nothing where this API server did not get any."""
        if scheduler_stats is None or self._signal is None:
            return
        sample = LoadSample(
            kv_usage=scheduler_stats.kv_cache_usage,
            running=scheduler_stats.num_running_reqs,
            waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
            capacity=self._capacity,
            time=time.monotonic(),
        )
        self._signal.report(engine_idx, sample)

    def log_engine_initialized(self) -> None:
        """Nothing to say when engines are up."""
