"""The routes of live sessions: ``/v1/realtime``, ``/mm_ext/realtime`` and ``GET /mm_ext/live``."""

from __future__ import annotations

import logging
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from vllm_mm_ext.adapters.live.engine import LiveEngine, LiveUnavailableError
from vllm_mm_ext.adapters.live.live_page import page
from vllm_mm_ext.adapters.live.registry import LiveSessions
from vllm_mm_ext.adapters.patches import set_on
from vllm_mm_ext.adapters.sight.api_keys import allows_origin, key_check
from vllm_mm_ext.adapters.vllm_compat import settings_of

logger = logging.getLogger("vllm.mm_ext")

# As OpenAI's clients call it, where vLLM has a route of its own for models that transcribe.
OPENAI_PATH = "/v1/realtime"
# The same, whatever the model; outside the paths that vLLM's check of API keys covers.
OWN_PATH = "/mm_ext/realtime"
PAGE_PATH = "/mm_ext/live"

# Browsers cannot send headers with a WebSocket: these subprotocols, which OpenAI's service takes as
# well, are their way to name the protocol and the API key.
_PROTOCOL = "realtime"
_KEY_PROTOCOL = "openai-insecure-api-key."


class LiveRoutes:
    """Takes connections, once vLLM's application is complete."""

    def __init__(self) -> None:
        self._sessions: LiveSessions | None = None
        self._unavailable = "the server is starting"
        self._origins: list[str] = []
        self._keys: Any = None

    def attach_to(self, app: Any) -> None:
        """Add the routes to vLLM's application; a route that is there already stays."""
        app.add_api_route(PAGE_PATH, self._page, methods=["GET"], response_class=HTMLResponse)
        taken = {getattr(route, "path", None) for route in app.routes}
        for path in (OWN_PATH, OPENAI_PATH):
            if path not in taken:
                app.routes.append(WebSocketRoute(path, self._realtime))

    async def start(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Look at the served model and at the server's settings.

        Args:
            engine_client: vLLM's ``AsyncLLM``; None where there is none.
            state: State of vLLM's application.
            args: Of vLLM's command line.
        """
        from vllm import envs

        self._origins = args.allowed_origins
        self._keys = key_check(args)
        if engine_client is None:
            self._unavailable = "there is no engine"
            return
        settings = settings_of(engine_client.vllm_config.model_config).live
        if not settings.enabled:
            self._unavailable = "mm_ext.live.enabled is false"
            return
        try:
            engine = await LiveEngine.start(engine_client, state)
        except LiveUnavailableError as error:
            self._unavailable = str(error)
            logger.info("mm_ext: no live sessions: %s", error)
        except Exception:
            # The server's other routes work without live sessions.
            self._unavailable = "the server could not prepare them; its log says why"
            logger.exception("mm_ext: no live sessions")
        else:
            model = state.openai_serving_models.model_name()
            self._sessions = LiveSessions(engine, settings, model, envs.VLLM_MAX_IMAGE_PIXELS)

    @property
    def sessions(self) -> LiveSessions | None:
        """The sessions; None where there can be none."""
        return self._sessions

    def stats(self) -> dict[str, int | float]:
        """Counters of the sessions; none where there can be no sessions."""
        return {} if self._sessions is None else self._sessions.stats()

    async def _page(self) -> str:
        return page()

    async def _realtime(self, websocket: WebSocket) -> None:
        _end_compression(websocket.app)
        offered = websocket.scope["subprotocols"]
        # Browsers leave that to the server.
        if not allows_origin(websocket.headers, self._origins):
            reason = "Pages of this origin may not connect (--allowed-origins)."
            await _deny(websocket, HTTPStatus.FORBIDDEN, reason)
        elif self._keys is not None and not self._keys.verify_token(_with_key(websocket, offered)):
            await _deny(websocket, HTTPStatus.UNAUTHORIZED, "Unauthorized")
        elif self._sessions is None:
            reason = f"This server holds no live sessions: {self._unavailable}."
            await _deny(websocket, HTTPStatus.NOT_FOUND, reason)
        else:
            await websocket.accept(subprotocol=_PROTOCOL if _PROTOCOL in offered else None)
            await self._sessions.serve(websocket, websocket.query_params.get("model"))


def _end_compression(app: Any) -> None:
    """Let the server agree to no compression of messages from the next connection on.

    250 KB that a client sends at once can be compressed messages of 250 MB, which halt the event
    loop for seconds before this module sees the first of them. vLLM makes its server after it
    starts plugins, so this is done at each connection.

    Args:
        app: vLLM's application.
    """
    server = getattr(app.state, "server", None)
    if server is not None:
        set_on(server.config, "uvicorn.config:Config.ws_per_message_deflate", False)


def _with_key(websocket: WebSocket, offered: list[str]) -> Headers:
    """The headers, with a key that a subprotocol names where there is no header for it."""
    for name in offered:
        if name.startswith(_KEY_PROTOCOL) and "authorization" not in websocket.headers:
            return Headers({"authorization": f"Bearer {name.removeprefix(_KEY_PROTOCOL)}"})
    return websocket.headers


async def _deny(websocket: WebSocket, status: HTTPStatus, message: str) -> None:
    """Answer a handshake with an HTTP error, in the form of OpenAI's."""
    error = {"message": message, "type": status.phrase, "param": None, "code": status.value}
    await websocket.send_denial_response(JSONResponse({"error": error}, status_code=status))
