"""The metrics and traces of one API server, from its start on."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from vllm.exceptions import VLLMError

from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.names.sight_names import API_SERVER_NAMES
from vllm_mm_ext.adapters.quality.service import state_for
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.sight.recorder import Recorder
from vllm_mm_ext.adapters.vllm_compat import settings_of
from vllm_mm_ext.base.engine_figures import EngineBoard
from vllm_mm_ext.base.shared_state import SharedState
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.collecting import collect_api_server, collect_engine
from vllm_mm_ext.sight.harmless import harmless
from vllm_mm_ext.sight.prometheus import Metrics, process_metrics

logger = logging.getLogger("vllm.mm_ext")

# Seconds between two looks at the figures where another API server may be the one scraped. Of what
# engines tell, a scrape shows what was set last by the system's clock. After a step back of that
# clock, this is right once all API servers have set it again.
_LOOK_S = 1.0


class ApiServerSight:
    """Does nothing before ``start``.

    Args:
        stats: The figures of this API server, as ``GET /mm_ext/stats`` has them.
    """

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._stats = stats
        self._metrics: Metrics | None = None
        self._recorder: Recorder | None = None
        self._looking: asyncio.Task[None] | None = None

    def start(self, config: Any, renderer: Any, args: Namespace) -> None:
        """Begin to take note of requests.

        Args:
            config: vLLM's configuration.
            renderer: vLLM's renderer of this server.
            args: vLLM's command line.
        """
        changed = problem(API_SERVER_NAMES)
        if changed is not None:
            logger.warning("mm_ext: there are no metrics and no spans: %s", changed)
            return
        wanted = settings_of(config.model_config).sight.metrics
        if wanted and not getattr(args, "disable_log_stats", False):
            self._metrics = process_metrics()
        spans = None
        if config.observability_config.otlp_traces_endpoint is not None:
            from vllm_mm_ext.adapters.sight.request_spans import spans_of_process

            spans = spans_of_process()
        if self._metrics is None and spans is None:
            return
        self._server = id(renderer)
        self._engines: int = config.parallel_config.data_parallel_size
        self._state: SharedState = state_for(config)
        self._board = EngineBoard(self._state)
        self._recorder = Recorder(self._metrics, self._board, spans)
        runtime_of(renderer).recorder = self._recorder
        if self._metrics is not None:
            self._look(self._metrics)
            if config.parallel_config._api_process_count > 1:
                looking = asyncio.get_running_loop().create_task(self._keep_looking(self._metrics))
                # The event loop itself refers to tasks weakly.
                self._looking = looking

    @harmless
    def before_scrape(self) -> None:
        """Bring in the figures of this API server, and of the engines."""
        if self._metrics is not None:
            self._look(self._metrics)

    def ended(self, trace: RequestTrace) -> None:
        """Count how an HTTP request ended."""
        if self._recorder is not None:
            self._recorder.ended(trace)

    def _look(self, metrics: Metrics) -> None:
        """Bring figures in; what engines count adds up with what other API servers brought in."""
        collect_api_server(metrics, self._server, self._stats())
        metrics.set("mm_ext_load_tier", self._state.tier().level)
        for engine in range(self._engines):
            figures = self._board.figures(engine)
            if figures is not None:
                load = self._state.load(engine)
                collect_engine(metrics, engine, self._board.take(engine), figures, load)

    async def _keep_looking(self, metrics: Metrics) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                self._look(metrics)
            except VLLMError:
                # At the end there is no front-end any more to look at.
                return
            except Exception:
                # A scrape of this server, which meets the same, tells of it.
                logger.debug("mm_ext: figures of this API server are missing", exc_info=True)
