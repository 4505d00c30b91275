"""Publishes how busy vLLM's scheduler is, for the API servers of the service."""

from __future__ import annotations

import logging
import time
import weakref
from typing import Any

from vllm_mm_ext.adapters.vllm_compat import service_of
from vllm_mm_ext.base.shared_state import EngineLoad, SharedState, open_state
from vllm_mm_ext.policies.scheduler.step_times import StepTimes

logger = logging.getLogger("vllm.mm_ext")


class LoadPublisher:
    """Writes the load of one engine to the shared state of its service.

    From its start on the engine is known to publish its load, so that no one else does.

    Args:
        scheduler: vLLM's scheduler, whose engine has nothing to do yet.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._engine: int = scheduler.parallel_config.data_parallel_index
        self._state: SharedState | None = None
        service = service_of(scheduler.vllm_config.model_config)
        if service is None:
            return
        try:
            self._state = open_state(service)
        except OSError as error:
            logger.warning("mm_ext: API servers are not told how busy the engine is: %s", error)
            return
        # Also where an engine in this process is dropped without being shut down.
        self._close = weakref.finalize(self, _leave, self._state, self._engine)
        self.publish(0, StepTimes())

    def publish(self, backlog_tokens: int, times: StepTimes) -> None:
        """Tell where the engine stands after a step.

        Args:
            backlog_tokens: Encoder outputs that requests still need.
            times: What steps take.
        """
        if self._state is None:
            return
        scheduler = self._scheduler
        usage = scheduler.kv_cache_manager.usage
        # The plugin's block pool counts what is kept, too.
        pressure = getattr(scheduler.kv_cache_manager.block_pool, "true_pressure", None)
        running, waiting = scheduler.get_request_counts()
        load = EngineLoad(
            time=time.monotonic(),
            kv_usage=usage,
            running=running,
            waiting=waiting,
            slots=scheduler.max_num_active_reqs,
            kv_pressure=usage if pressure is None else pressure(),
            backlog_tokens=backlog_tokens,
            backlog_s=times.seconds(backlog_tokens, 0),
            itl_s=times.itl_s,
        )
        self._state.write_load(self._engine, load)

    def close(self) -> None:
        """Take the load back: the engine ends."""
        if self._state is not None:
            self._close()
            self._state = None


def _leave(state: SharedState, engine: int) -> None:
    state.clear_load(engine)
    state.close()
