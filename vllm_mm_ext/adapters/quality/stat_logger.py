"""Publishes vLLM's engine statistics (``vllm.stat_logger_plugins`` entry point).

vLLM makes the class of the entry point in each API server, and tells one of them what an engine
reports after each step.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.names.quality_names import STATISTICS_NAMES
from vllm_mm_ext.adapters.quality.service import quality_settings, state_for
from vllm_mm_ext.base.shared_state import EngineLoad
from vllm_mm_ext.policies.quality.service_tier import ServiceTier

logger = logging.getLogger("vllm.mm_ext")


class LoadStatLogger(AggregateStatLoggerBase):  # type: ignore[misc]
    """Lets the load tier follow the engines' steps, whatever scheduler they run.

    Args:
        vllm_config: vLLM's configuration.
        engine_indexes: Engines that this API server hears of.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._tier: ServiceTier | None = None
        engines = max(
            vllm_config.parallel_config.data_parallel_size, *(index + 1 for index in engine_indexes)
        )
        self._slots = vllm_config.scheduler_config.max_num_seqs
        changed = problem(STATISTICS_NAMES)
        if changed is not None:
            logger.warning("mm_ext: quality does not follow load: %s", changed)
            return
        settings = quality_settings(vllm_config)
        # Joined in any case: the state's file loses its name when all API servers have it.
        state = state_for(vllm_config)
        if settings.enabled:
            self._tier = ServiceTier(settings.tiers, state, engines)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,  # noqa: ARG002 - vLLM's interface
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,
    ) -> None:
        """Take the statistics of a step; nothing where this API server did not get any."""
        if scheduler_stats is None or self._tier is None:
            return
        load = EngineLoad(
            time=time.monotonic(),
            kv_usage=scheduler_stats.kv_cache_usage,
            running=scheduler_stats.num_running_reqs,
            waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
            slots=self._slots,
        )
        self._tier.heard(engine_idx, load)

    def log_engine_initialized(self) -> None:
        """Nothing to say when engines are up."""
