"""HTTP surface of the plugin: trace headers on vLLM's routes and one statistics route."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from vllm_mm_ext.runtime import current_runtime
from vllm_mm_ext.serving.middleware import TraceMiddleware


async def stats() -> dict[str, Any]:
    """Counters of this API server's caches, fetches and decode workers."""
    return current_runtime().stats()


class MMExtEndpointPlugin:
    """vLLM endpoint plugin (``vllm.endpoint_plugins``), loaded when ``VLLM_PLUGINS`` names it."""

    name = "mm_ext"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the middleware and ``GET /mm_ext/stats`` to vLLM's FastAPI application."""
        app.add_middleware(TraceMiddleware)

        app.add_api_route("/mm_ext/stats", stats, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to keep: the runtime is attached when vLLM creates its renderer."""
