"""The plugin's part of vLLM's HTTP server: headers on vLLM's routes, and routes of its own."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.adapters import error_answers
from vllm_mm_ext.adapters.quality.service import state_for
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.encoders_apart import EncodeOnly, encodes_only
from vllm_mm_ext.adapters.serving.middleware import TraceMiddleware
from vllm_mm_ext.adapters.sight.api_server_sight import ApiServerSight
from vllm_mm_ext.sight.running_requests import RunningRequests

if TYPE_CHECKING:
    from vllm_mm_ext.adapters.live.live_routes import LiveRoutes
    from vllm_mm_ext.adapters.serving.health import HealthRoute
    from vllm_mm_ext.adapters.sight.sight_routes import SightRoutes


class MMExtEndpointPlugin:
    """vLLM endpoint plugin (``vllm.endpoint_plugins``), loaded when ``VLLM_PLUGINS`` names it."""

    name = "mm_ext"
    required_tasks = None
    #: Set where the feature of that name is active.
    live_sessions = False
    #: As ``live_sessions``.
    operator_page = False
    #: As ``live_sessions``.
    health_checks = False
    #: As ``live_sessions``.
    encoders_apart = False

    def __init__(self) -> None:
        self._config: Any = None
        self._renderer: Any = None
        self._live: LiveRoutes | None = None
        self._running = RunningRequests()
        self._operator: SightRoutes | None = None
        self._health: HealthRoute | None = None
        self._sight = ApiServerSight(self._own_stats)

    async def stats(self) -> dict[str, Any]:
        """Counters of this API server, and the load of each engine (see ``EngineLoad``)."""
        engines: dict[int, dict[str, float | None]] = {}
        if self._config is not None:
            count = self._config.parallel_config.data_parallel_size
            loads = state_for(self._config).loads(count)
            engines = {engine: asdict(load) for engine, load in loads.items()}
        return {**self._own_stats(), "engines": engines}

    def _own_stats(self) -> dict[str, Any]:
        live = {} if self._live is None else self._live.stats()
        return {**runtime_of(self._renderer).stats(), "live": live}

    def _encodes_only(self) -> bool:
        return self._config is not None and encodes_only(self._config)

    def attach_router(self, app: Any) -> None:
        """Add the middleware, error answers and the plugin's routes to vLLM's application."""
        app.add_middleware(TraceMiddleware, sight=self._sight, running=self._running)
        error_answers.attach_to(app)
        app.add_api_route("/mm_ext/stats", self.stats, methods=["GET"])
        if self.encoders_apart:
            app.add_middleware(EncodeOnly, active=self._encodes_only)
        # Imported here: other processes of vLLM have no web framework.
        if self.health_checks:
            from vllm_mm_ext.adapters.serving.health import HealthRoute

            self._health = HealthRoute()
            self._health.attach_to(app)
        if self.live_sessions:
            from vllm_mm_ext.adapters.live.live_routes import LiveRoutes

            self._live = LiveRoutes()
            self._live.attach_to(app)
        if self.operator_page:
            from vllm_mm_ext.adapters.sight.sight_routes import SightRoutes

            self._operator = SightRoutes(self._running)
            self._operator.attach_to(app)

    async def init_state(
        self,
        engine_client: Any,
        state: Any,
        args: Namespace,
    ) -> None:
        """Keep vLLM's configuration and renderer, which identify the front-end of this server.

        Live sessions begin to be taken, and requests to be followed.
        """
        self._config = getattr(engine_client, "vllm_config", None)
        self._renderer = getattr(engine_client, "renderer", None)
        if self._config is not None:
            self._sight.start(self._config, self._renderer, args)
        if self._health is not None:
            self._health.start(engine_client)
        if self._live is not None:
            await self._live.start(engine_client, state, args)
        if self._operator is not None:
            await self._operator.start(engine_client, state, args, self._live)
