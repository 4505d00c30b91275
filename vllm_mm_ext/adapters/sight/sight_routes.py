"""The operator's routes: the page ``/mm_ext/``, what it shows as JSON, and the admin API."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from argparse import Namespace
from collections.abc import Awaitable, Callable
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any, get_args

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from vllm_mm_ext.adapters.live.live_routes import LiveRoutes
from vllm_mm_ext.adapters.sight.api_keys import allows_origin, key_check
from vllm_mm_ext.adapters.sight.own_part import OwnPart
from vllm_mm_ext.adapters.sight.whole_service import WholeService
from vllm_mm_ext.adapters.vllm_compat import service_of, settings_of
from vllm_mm_ext.base.heap_scrub import clear_what_is_freed
from vllm_mm_ext.base.peers import PeerError, Peers
from vllm_mm_ext.config.sight_settings import SightSettings
from vllm_mm_ext.policies.kv.control import NoBlockPoolError
from vllm_mm_ext.sight.admin_requests import (
    MediaAction,
    MediaRequest,
    SessionAction,
    SessionRequest,
    problem_of,
)
from vllm_mm_ext.sight.request_log import RequestLog
from vllm_mm_ext.sight.running_requests import RunningRequests

logger = logging.getLogger("vllm.mm_ext")

PAGE_PATH = "/mm_ext/"
_MOST_BODY = 1 << 20
_RETRY_S = "5"


class SightRoutes:
    """The routes of one API server. They answer 404 where ``sight.page`` is off.

    Args:
        running: Follows the requests of this API server.
    """

    def __init__(self, running: RunningRequests) -> None:
        self._running = running
        self._service: WholeService | None = None
        self._settings = SightSettings()
        self._unavailable = "This server has no page (mm_ext.sight.page)."
        self._keys: Any = None
        self._origins: list[str] = []
        self._takedowns: set[asyncio.Task[dict[str, Any]]] = set()

    def attach_to(self, app: Any) -> None:
        """Add the routes to vLLM's application."""
        shown = {"methods": ["GET"], "include_in_schema": False}
        app.add_api_route(PAGE_PATH, self._page, response_class=HTMLResponse, **shown)
        app.add_api_route("/mm_ext/sight", self._overview, **shown)
        app.add_api_route("/mm_ext/requests", self._older, **shown)
        app.add_api_route("/mm_ext/requests/{request_id}", self._record, **shown)
        changed = {"methods": ["POST"], "include_in_schema": False}
        app.add_api_route("/mm_ext/sessions/{action}", self._act_on_session, **changed)
        app.add_api_route("/mm_ext/media/{action}", self._act_on_media, **changed)

    async def start(
        self, engine_client: Any, state: Any, args: Namespace, live: LiveRoutes | None
    ) -> None:
        """Begin to follow requests, if the server's settings say so.

        Args:
            engine_client: vLLM's ``AsyncLLM``; None where there is none.
            state: State of vLLM's application.
            args: Of vLLM's command line.
            live: The routes of live sessions.
        """
        if engine_client is None:
            return
        config = engine_client.vllm_config
        self._settings = settings_of(config.model_config).sight
        self._keys = key_check(args)
        # These routes are for pages of origins that are named, also where all may ask for answers.
        self._origins = [one for one in args.allowed_origins if one != "*"]
        if not self._settings.page:
            return
        if self._keys is None:
            logger.warning(
                "mm_ext: sight.page is on and there is no --api-key: whoever reaches this server "
                "sees the requests of all clients%s",
                ", and may take media down" if self._settings.admin else "",
            )
        parallel = config.parallel_config
        log = RequestLog(self._settings.recent_requests)
        index = max(0, parallel._api_process_rank)
        sessions = None if live is None else live.sessions
        own = OwnPart(index, engine_client.renderer, self._running, log, sessions)
        service = service_of(config.model_config) or ""
        peers = Peers(service, index, parallel._api_process_count, own.answer)
        try:
            await peers.start()
        except OSError as error:
            # The other API servers say that this one does not answer.
            logger.warning("mm_ext: this API server has no operator's page: %s", error)
            self._unavailable = "This API server has no page; its log says why."
            return
        model = state.openai_serving_models.model_name()
        self._service = WholeService(config, engine_client, peers, model)
        if self._settings.admin:
            clear_what_is_freed()
            await self._service.begin()
        self._running.follow(log, index)

    async def _page(self) -> Response:
        if not self._settings.page:
            return _failed(HTTPStatus.NOT_FOUND, self._unavailable)
        # The page holds nothing of the server's, so it needs no key; what it asks for does.
        # No other page may show it in a frame, and have its buttons clicked.
        headers = {"Cache-Control": "no-cache", "Content-Security-Policy": "frame-ancestors 'none'"}
        return HTMLResponse(page(), headers=headers)

    async def _overview(self, request: Request) -> Response:
        async def answer(service: WholeService) -> Response:
            return _answered(await service.overview() | {"admin": self._settings.admin})

        return await self._for_operator(request, answer)

    async def _older(self, request: Request) -> Response:
        async def answer(service: WholeService) -> Response:
            return _answered({"requests": await service.requests(_before(request))})

        return await self._for_operator(request, answer)

    async def _record(self, request: Request) -> Response:
        async def answer(service: WholeService) -> Response:
            request_id = request.path_params["request_id"]
            found = await service.record(request_id)
            if found is None:
                return _failed(
                    HTTPStatus.NOT_FOUND, f"No request {request_id!r} is remembered (any more)."
                )
            return _answered(found)

        return await self._for_operator(request, answer)

    async def _act_on_session(self, request: Request) -> Response:
        async def answer(service: WholeService) -> Response:
            action = _action(request, SessionAction)
            asked = SessionRequest.model_validate(await _body(request))
            if action == "end":
                if asked.session_id and await service.end_session(asked.session_id):
                    return _answered({"ended": True})
                return _failed(HTTPStatus.NOT_FOUND, "There is no live session of that id.")
            await service.session(action, asked.kv_key)
            return _answered({})

        return await self._for_admin(request, answer)

    async def _act_on_media(self, request: Request) -> Response:
        async def answer(service: WholeService) -> Response:
            action = _action(request, MediaAction)
            asked = MediaRequest.model_validate(await _body(request))
            if action != "drop":
                found = await service.media(action, asked.url, asked.digest)
                if found is None:
                    return _failed(HTTPStatus.NOT_FOUND, "Nothing is known of a file of that URL.")
                return _answered(found)
            # A client that leaves must not leave half of a takedown.
            task = asyncio.create_task(service.take_down(asked.url, asked.digest))
            # The event loop itself refers to tasks weakly.
            self._takedowns.add(task)
            task.add_done_callback(self._takedowns.discard)
            done = await asyncio.shield(task)
            status = 200 if done["complete"] else HTTPStatus.SERVICE_UNAVAILABLE
            return _answered(done, status)

        return await self._for_admin(request, answer)

    async def _for_admin(
        self, request: Request, answer: Callable[[WholeService], Awaitable[Response]]
    ) -> Response:
        if self._settings.page and not self._settings.admin:
            return _failed(
                HTTPStatus.FORBIDDEN, "This server takes no such requests (mm_ext.sight.admin)."
            )
        return await self._for_operator(request, answer)

    async def _for_operator(
        self, request: Request, answer: Callable[[WholeService], Awaitable[Response]]
    ) -> Response:
        if self._service is None:
            return _failed(HTTPStatus.NOT_FOUND, self._unavailable)
        if not allows_origin(request.headers, self._origins):
            reason = "Pages of this origin may not ask (--allowed-origins)."
            return _failed(HTTPStatus.FORBIDDEN, reason)
        if self._keys is not None and not self._keys.verify_token(request.headers):
            return _failed(HTTPStatus.UNAUTHORIZED, "Unauthorized")
        try:
            return await answer(self._service)
        except ValidationError as error:
            return _failed(HTTPStatus.BAD_REQUEST, problem_of(error))
        except _BadRequestError as error:
            return _failed(error.status, str(error))
        except NoBlockPoolError as error:
            return _failed(HTTPStatus.CONFLICT, str(error))
        except (PeerError, TimeoutError) as error:
            why = str(error) or "An engine does not answer in time."
            return _failed(HTTPStatus.SERVICE_UNAVAILABLE, why)


class _BadRequestError(Exception):
    """A request is malformed; the message says how.

    Attributes:
        status: Of the answer.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


@cache
def page() -> str:
    """The page as HTML; it loads nothing but itself, and asks the server that sent it."""
    return files("vllm_mm_ext.adapters.sight").joinpath("sight.html").read_text(encoding="utf-8")


def _before(request: Request) -> float:
    """When the requests had ended that the page asks for, as seconds since the epoch."""
    asked = request.query_params.get("before", "")
    try:
        before = float(asked)
    except ValueError:
        before = math.nan
    if not math.isfinite(before):
        raise _BadRequestError(f"before={asked[:20]!r} is no number of seconds since 1970")
    return before


def _action(request: Request, actions: Any) -> Any:
    action = request.path_params["action"]
    if action not in get_args(actions):
        raise _BadRequestError(f"{action!r} is none of {', '.join(get_args(actions))}")
    return action


async def _body(request: Request) -> Any:
    # A browser sends this type for a page of another origin only if the server agrees.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _BadRequestError(
            "the Content-Type is not application/json", HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        )
    if int(request.headers.get("content-length") or 0) > _MOST_BODY:
        raise _BadRequestError(f"the body has more than {_MOST_BODY} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BODY:
            raise _BadRequestError(f"the body has more than {_MOST_BODY} bytes")
    try:
        return json.loads(body)
    except ValueError:
        raise _BadRequestError("the body is not JSON") from None
    except RecursionError:
        raise _BadRequestError("the body is nested too deeply") from None


def _answered(value: Any, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store"}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = _RETRY_S
    # Texts of clients may have half of a surrogate pair, of which ``JSONResponse`` makes an error.
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    return Response(body, status, headers, "application/json")


def _failed(status: HTTPStatus, message: str) -> Response:
    """An answer in the form of OpenAI's errors."""
    error = {"message": message, "type": status.phrase, "param": None, "code": status.value}
    return _answered({"error": error}, status)
