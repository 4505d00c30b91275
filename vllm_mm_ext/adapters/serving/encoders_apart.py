"""The HTTP side of encoding apart: who asks, who encodes, and who refuses to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_mm_ext.adapters.encoder_cache.instance_plan import kept_plan
from vllm_mm_ext.adapters.encoder_cache.transport_options import JOB
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.patches import replace_attribute, wrap
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.encoder_asks import UTILITY
from vllm_mm_ext.adapters.serving.middleware import answer_error
from vllm_mm_ext.adapters.serving.recorded_requests import answered
from vllm_mm_ext.adapters.serving.requests import moves_kv
from vllm_mm_ext.errors import EncodeOnlyError, PairError
from vllm_mm_ext.fleet.encode_request import (
    ENCODE_HEADER,
    ITEM_TOKENS_HEADER,
    LEVELS_HEADER,
    SEEN,
    has_media,
    is_encode_request,
    item_tokens_in,
    levels_in,
)
from vllm_mm_ext.fleet.pairing import differing_parts
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request

_ONLY: Final = (
    "this server encodes media for other instances and answers nothing: send requests to those, or "
    "to the router in front of them"
)
# Other routes than chat completions that answer questions.
_ANSWERING: Final = (
    *("/v1/completions", "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"),
    *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/embeddings", "/cohere/v2/chat"),
    *("/invocations", "/generative_scoring", "/inference/v1/generate", "/v1/systemone"),
    "/v1/decisions",
)
_LIVE: Final = ("/v1/realtime", "/mm_ext/realtime")


def install() -> None:
    """Ask encoders, and keep an encoder's empty answers from clients. Idempotent."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

    wrap(OpenAIServingChat, "create_chat_completion", _apart)
    wrap(AsyncLLM, "generate", _with_job)

    def mm_ext_encode_over(self: Any, job: str) -> None:
        over = getattr(self.scheduler.ec_connector, "encode_over", None)
        if over is not None:
            over(job)

    replace_attribute(EngineCore, UTILITY, mm_ext_encode_over)


def _apart(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create_chat_completion(
        self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        client = self.engine_client
        config = client.vllm_config
        if raw_request is not None and kept_plan(config.model_config) is not None:
            # Starlette keeps the body that FastAPI has parsed.
            body, headers = await raw_request.json(), dict(raw_request.headers)
            context = current_request() or enter_request(RequestContext())
            context.disaggregated = moves_kv(request.kv_transfer_params)
            asks = runtime_of(client.renderer).encoder_asks
            if encodes_only(config):
                with client_errors():
                    check_encode_request(body, headers, config)
                context.levels = levels_in(headers.get(LEVELS_HEADER.lower()))
                context.item_tokens = item_tokens_in(headers.get(ITEM_TOKENS_HEADER.lower()))
                if ENCODE_HEADER.lower() in headers:
                    request = without_answer(request)
            elif asks is not None and raw_request.url.path.endswith("/v1/chat/completions"):
                sent = await raw_request.body()
                context.elsewhere = asks.job(body, sent, headers, client.engine_core)
        return await original(self, request, raw_request, *args, **kwargs)

    return create_chat_completion


def without_answer(request: Any) -> Any:
    """A chat completion that sees the same and has nothing to say of the answer.

    Args:
        request: vLLM's ``ChatCompletionRequest``.
    """
    fields = type(request).model_fields
    update = {
        name: field.get_default(call_default_factory=True)
        for name, field in fields.items()
        if name not in SEEN
    }
    return request.model_copy(update=update)


def check_encode_request(body: Mapping[str, Any], headers: Mapping[str, str], config: Any) -> None:
    """Refuse what is no request for encoding.

    Args:
        body: Of the chat completion.
        headers: By lower-case names.
        config: vLLM's configuration of this instance, which encodes only.

    Raises:
        EncodeOnlyError: It is a question.
        PairError: The server that asks makes other outputs of the same media.
    """
    told = headers.get(ENCODE_HEADER.lower())
    if told is None and not is_encode_request(body):
        raise EncodeOnlyError(_ONLY, parameter="messages")
    if not has_media(body.get("messages") or ()):
        raise EncodeOnlyError(f"{_ONLY}; this request has no media", parameter="messages")
    differ = [] if told is None else differing_parts(kept_plan(config.model_config) or {}, told)
    if differ:
        raise PairError(
            "this encoder and the server that asks do not make the same encoder outputs; they "
            f"differ in {', '.join(differ)}",
            parameter=ENCODE_HEADER,
        )


def _with_job(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        extra = getattr(sampling_params, "extra_args", None) or {}
        params = extra.get("ec_transfer_params")
        params = dict(params) if isinstance(params, Mapping) else {}
        # A client cannot make a request wait for what nobody was asked.
        forged = params.pop(JOB, None) is not None
        context = current_request()
        elsewhere = None if context is None else context.elsewhere
        job = getattr(elsewhere, "name", None)
        named = forged or job is not None

        def outputs(prompt: Any, job: str | None) -> Any:
            if named:
                own = params if job is None else params | {JOB: job}
                sampling_params.extra_args = {**extra, "ec_transfer_params": own}
            return original(self, prompt, sampling_params, request_id, *args, **kwargs)

        if elsewhere is None or elsewhere.whole is None:
            return outputs(prompt, job)
        jobs = iter((job, None))
        return answered(elsewhere, lambda prompt: outputs(prompt, next(jobs)), prompt)

    return generate


class EncodeOnly:
    """ASGI middleware: an instance that encodes only answers nothing on vLLM's other routes.

    Args:
        app: The next ASGI application.
        active: Whether this instance encodes only, once that is known.
    """

    def __init__(self, app: Any, active: Callable[[], bool]) -> None:
        self.app = app
        self._active = active

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").rstrip("/")
        asked = scope["type"] == "http" and scope["method"] == "POST"
        if asked and answers_questions(path) and self._active():
            await answer_error(send, EncodeOnlyError(_ONLY))
            return
        if scope["type"] == "websocket" and path.endswith(_LIVE) and self._active():
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "encodes media only"})
            return
        await self.app(scope, receive, send)


def answers_questions(path: str) -> bool:
    """Whether vLLM answers questions on a route, other than that of chat completions."""
    return path.endswith(_ANSWERING)


def encodes_only(vllm_config: Any) -> bool:
    """Whether an instance encodes for others and answers nothing."""
    transfer = vllm_config.ec_transfer_config
    if transfer is None or kept_plan(vllm_config.model_config) is None:
        return False
    return bool(transfer.is_ec_producer and not transfer.is_ec_consumer)
