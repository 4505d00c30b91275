"""``GET /mm_ext/health``: whether this server can answer, and decode, for who sends it requests."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.media.decode.pool_check import PoolCheck

_RETRY_S = "5"


class HealthRoute:
    """The route of one API server. vLLM's own ``/health`` knows of the engine alone."""

    def __init__(self) -> None:
        self._started = False
        self._engine: Any = None
        self._renderer: Any = None
        self._check: PoolCheck | None = None

    def attach_to(self, app: Any) -> None:
        """Add the route to vLLM's application."""
        app.add_api_route("/mm_ext/health", self._answer, methods=["GET"])

    def start(self, engine_client: Any) -> None:
        """Begin to answer for the engine and the decode workers of a server.

        Args:
            engine_client: vLLM's ``AsyncLLM``; None for a server without an engine.
        """
        self._started = True
        self._engine = engine_client
        self._renderer = getattr(engine_client, "renderer", None)

    async def _answer(self) -> Response:
        if not self._started:
            return _answered({"engine": "It starts."})
        problems = {"engine": await self._engine_problem(), "decode": await self._decode_problem()}
        return _answered({part: problem for part, problem in problems.items() if problem})

    async def _engine_problem(self) -> str | None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._engine is None:
            return None
        try:
            await self._engine.check_health()
        except EngineDeadError:
            return "It has ended; this server must be started anew."
        return None

    async def _decode_problem(self) -> str | None:
        # Text models have no front-end, and none is to be made for them here.
        if self._renderer is None or self._renderer.mm_processor is None:
            return None
        runtime = runtime_of(self._renderer)
        if not runtime.config.media.enabled:
            return None
        if self._check is None:
            self._check = PoolCheck(runtime.frontend.pool)
        return await self._check.problem()


def _answered(problems: dict[str, str]) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else 200
    headers = {"Cache-Control": "no-store"}
    if problems:
        headers["Retry-After"] = _RETRY_S
    body = json.dumps({"ok": not problems, "problems": problems})
    return Response(body, status, headers, "application/json")
