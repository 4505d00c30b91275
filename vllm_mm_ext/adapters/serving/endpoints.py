"""The plugin's part of vLLM's HTTP server: headers on vLLM's routes and a statistics route."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any

from vllm_mm_ext.adapters import error_answers
from vllm_mm_ext.adapters.quality.service import state_for
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.middleware import TraceMiddleware


class MMExtEndpointPlugin:
    """vLLM endpoint plugin (``vllm.endpoint_plugins``), loaded when ``VLLM_PLUGINS`` names it."""

    name = "mm_ext"
    required_tasks = None

    def __init__(self) -> None:
        self._config: Any = None
        self._renderer: Any = None

    async def stats(self) -> dict[str, Any]:
        """Counters of this API server, and the load of each engine (see ``EngineLoad``)."""
        engines: dict[int, dict[str, float | None]] = {}
        if self._config is not None:
            count = self._config.parallel_config.data_parallel_size
            loads = state_for(self._config).loads(count)
            engines = {engine: asdict(load) for engine, load in loads.items()}
        return {**runtime_of(self._renderer).stats(), "engines": engines}

    def attach_router(self, app: Any) -> None:
        """Add the middleware, error answers and ``GET /mm_ext/stats`` to vLLM's application."""
        app.add_middleware(TraceMiddleware)
        error_answers.attach_to(app)
        app.add_api_route("/mm_ext/stats", self.stats, methods=["GET"])

    async def init_state(
        self,
        engine_client: Any,
        state: Any,  # noqa: ARG002 - vLLM's interface
        args: Namespace,  # noqa: ARG002
    ) -> None:
        """Keep vLLM's configuration and renderer, which identify the front-end of this server."""
        self._config = getattr(engine_client, "vllm_config", None)
        self._renderer = getattr(engine_client, "renderer", None)
