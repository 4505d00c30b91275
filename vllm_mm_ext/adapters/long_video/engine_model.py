"""The model that a strategy asks: vLLM's engine, by ordinary chat completions of one client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any

from blake3 import blake3

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import AbortedError, client_errors
from vllm_mm_ext.adapters.long_video.ask_requests import (
    chances,
    first_tokens,
    options_for,
    request_for,
    restrict,
)
from vllm_mm_ext.adapters.long_video.state import Shown
from vllm_mm_ext.adapters.long_video.survey import Survey
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.planning import plan
from vllm_mm_ext.long_video.asking import Ask, AskFailedError, Cost, Look, Reply, Window
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.request.context import (
    RequestContext,
    claim_while_rendered,
    current_request,
    enter_request,
)

# Seconds before a prompt is sent again that met a busy server.
_BUSY_PAUSE_S = 1.0


class EngineModel:
    """Asks the engine on behalf of one request of a client.

    What holds for the client's request holds for each prompt: the model or adapter it names, its
    cache salt, its session, the limits of the server.

    Args:
        serving: vLLM's handler of chat completions.
        create: Its ``create_chat_completion`` without this plugin's part about long videos.
        client: The client's request.
        context: Of the client's request.
        survey: What is known of its videos.
        windows: What windows show, kept for later requests.
        weights: Version of the model's weights.
        session: Session of the client's request; None without one.
        priority: Of the prompts.
        rank: The data-parallel rank that the client or a router names; None if neither does.
    """

    def __init__(
        self,
        serving: Any,
        create: Callable[..., Awaitable[Any]],
        client: Any,
        context: RequestContext,
        survey: Survey,
        *,
        windows: ByteBudgetCache[str, Shown],
        weights: str,
        session: str | None,
        priority: int,
        rank: int | None = None,
    ) -> None:
        self._serving = serving
        self._create = create
        self._client = client
        self._context = context
        self._survey = survey
        self._windows = windows
        self._weights = weights
        self._session = session
        self._priority = priority
        self._rank = rank
        self._renderer = serving.renderer
        self._settings = vllm_compat.settings_of(serving.model_config)
        # What the windows of this request show. They stay as they are, whatever the load becomes.
        self._shown: dict[tuple[Window | None, Look | None], Shown] = {}
        # The first error of the engine or the front-end, as vLLM answers it.
        self.first_error: Any = None

    @property
    def context_tokens(self) -> int:
        """Most tokens of a prompt and its reply together."""
        length: int = self._serving.model_config.max_model_len
        return length

    @property
    def identity(self) -> str:
        """What replies depend on besides the prompt."""
        client = self._client
        # Another adapter may have been loaded under the name of an earlier one.
        adapter = self._serving._maybe_get_adapters(client)
        parts = (
            client.model,
            self._weights,
            None if adapter is None else adapter.lora_path,
            client.cache_salt,
            client.chat_template,
            client.chat_template_kwargs,
            client.reasoning_effort,
            client.mm_processor_kwargs,
        )
        return str(blake3(repr(parts).encode()).hexdigest())

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without what a chat template adds."""
        params = self._renderer.default_chat_tok_params
        prompts = [{"prompt": text} for text in texts]
        tokenized = await self._renderer.tokenize_prompts_async(prompts, params)
        return [len(prompt["prompt_token_ids"]) for prompt in tokenized]

    async def ask(self, ask: Ask) -> Reply:
        """Send one prompt, and once more where it fails in a way that may pass.

        Raises:
            AskFailedError: The prompt failed for good; the message is vLLM's.
        """
        reply: Reply = await self._tried(lambda: self._sent(ask))
        return reply

    async def window_key(self, window: Window, look: Look) -> str:
        """Digest of what the model is shown of a window, decoded as often as a prompt is sent.

        Raises:
            AskFailedError: The window cannot be read; the message is vLLM's.
        """
        if (known := self._known(window, look)) is not None:
            return known
        key: str = await self._tried(lambda: self._decoded(window, look))
        return key

    def known_window_key(self, window: Window, look: Look) -> str | None:
        """The same digest where it is known without decoding, else None.

        Without a cache salt the notes may be those that another client asked for. That there are
        any is a cache hit, which clients are told only where the operator lets them.
        """
        told = self._client.cache_salt or self._settings.reports.cache_hits
        return self._known(window, look) if told else None

    def may_keep(self, window: Window) -> bool:
        """Whether the origin of the video allows to keep what comes of it."""
        storable: bool = self._survey.contents[window.video].storable
        return storable

    def _known(self, window: Window, look: Look) -> str | None:
        """The digest of a window that this request has looked at, or an earlier one.

        As with sticky decisions, what was shown under load does not count for ever.
        """
        shown = self._shown.get((window, look))
        if shown is None:
            digest = self._survey.contents[window.video].digest
            shown = self._windows.get(self._place(window, look, digest))
            if shown is None or not self._holds(shown):
                return None
            self._shown[window, look] = shown
        return shown.digest

    def _holds(self, shown: Shown) -> bool:
        sticky = self._settings.quality.sticky
        lasts = sticky.ttl_s if sticky.enabled else 0.0
        return shown.level == 0 or time.monotonic() - shown.made < lasts

    def _place(self, window: Window, look: Look, digest: str) -> str:
        """All that decides what is shown, but for the load of the service."""
        parts = (
            digest,
            window.start,
            window.end,
            self._options(look).model_dump_json(),
            self._client.mm_processor_kwargs,
            self._client.media_io_kwargs,
        )
        return str(blake3(repr(parts).encode()).hexdigest())

    def _options(self, look: Look | None) -> Any:
        bounds = self._settings.quality.bounds
        trained = runtime_of(self._renderer).frontend.traits.trained
        return options_for(look, self._context.options, bounds, trained)

    def _enter(self, window: Window | None, look: Look | None) -> RequestContext:
        """Make a context for one prompt, and make it the current one."""
        shown = self._shown.get((window, look))
        context = RequestContext(
            options=self._options(look),
            session=self._session,
            span=None if window is None else (window.start, window.end),
            contents=dict(zip(self._survey.urls, self._survey.contents, strict=True)),
            levels=None if shown is None else (shown.level,),
        )
        # Traces are kept for the cached tokens only, which vLLM tells traces that are reported.
        context.trace.asked = True
        # Takedowns look at the client's request.
        context.trace.hashes = self._context.trace.hashes
        return enter_request(context)

    def _request(self, ask: Ask) -> Any:
        url = None if ask.window is None else self._survey.urls[ask.window.video]
        return request_for(ask, self._client, url, session=self._session, priority=self._priority)

    def _raw_request(self) -> Any:
        """An HTTP request of a prompt: vLLM reads the rank in its headers; None without a rank."""
        if self._rank is None:
            return None
        # Engine processes import this module too, and need no web framework.
        from starlette.requests import Request

        headers = [(b"x-data-parallel-rank", str(self._rank).encode())]
        return Request({"type": "http", "headers": headers})

    async def _tried(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Result of work, which is done once more where it fails in a way that may pass.

        That the engine was paused counts as no failure.
        """
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        failed = 0
        while True:
            made = await _alone(work())
            if not isinstance(made, ErrorResponse):
                return made
            busy = made.error.code == HTTPStatus.SERVICE_UNAVAILABLE
            if busy and await self.sat_out_pause():
                continue
            failed += 1
            if failed > 1 or not _may_pass(made.error.code):
                break
            if busy:
                await asyncio.sleep(_BUSY_PAUSE_S)
        self.first_error = self.first_error or made
        raise AskFailedError(made.error.message)

    async def sat_out_pause(self) -> bool:
        """Whether the engine was paused; it is not any more.

        vLLM 0.32 has prompts wait meanwhile, 0.33 refuses them unless the pause's mode is `keep`.
        """
        paused = False
        while await self._is_paused():
            paused = True
            await asyncio.sleep(_BUSY_PAUSE_S)
        return paused

    async def _is_paused(self) -> bool:
        try:
            return bool(await self._serving.engine_client.is_paused())
        except Exception:
            # An engine that shuts down tells nothing more; vLLM's answer to a prompt says why.
            return False

    # --- each in a task of its own, as its context is its own -------------------------------------

    async def _sent(self, ask: Ask) -> Any:
        """The reply to a prompt, or vLLM's ``ErrorResponse``."""
        from vllm.entrypoints.serve import create_error_response
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        context = self._enter(ask.window, ask.look)
        request = self._request(ask)
        first = first_tokens(self._renderer.get_tokenizer(), ask.choices) if ask.choices else {}
        if first:
            restrict(request, list(first.values()), self._serving.model_config.max_logprobs)
        started = time.perf_counter()
        try:
            answer = await self._create(self._serving, request, self._raw_request())
        except Exception as error:
            answer = create_error_response(error)
        if isinstance(answer, ErrorResponse):
            return answer
        (choice,) = answer.choices
        # A choice that has no token is no choice, however the engine came to end it.
        if choice.finish_reason == "abort" or (first and not _chosen(choice)):
            return create_error_response(AbortedError())
        cost = Cost(
            answer.usage.prompt_tokens,
            context.trace.cached_tokens or 0,
            answer.usage.completion_tokens,
            time.perf_counter() - started,
        )
        text = "" if first else choice.message.content or ""
        found = chances(first, _chosen(choice)[0]) if first else {}
        activity = next((video.activity for _, video in context.trace.videos), None)
        return Reply(text.strip(), found, cost, activity)

    async def _decoded(self, window: Window, look: Look) -> Any:
        """Digest of what is shown of a window, or vLLM's ``ErrorResponse``."""
        from vllm.entrypoints.serve import create_error_response

        self._enter(window, look)
        try:
            with client_errors(), claim_while_rendered():
                return await self._digest(window, look)
        except Exception as error:
            return create_error_response(error)

    async def _digest(self, window: Window, look: Look) -> str:
        # Planned as for a note: what else is in the prompt may leave less room for the window.
        settings = self._settings.long_video
        request = self._request(Ask(window, look, (settings.prompts.note,), settings.note_tokens))
        await plan(self._renderer, request.messages, *rendering_of(self._serving, request))
        context = current_request()
        assert context is not None
        (item,) = context.items
        content, video_plan = item.content, item.plan
        assert content is not None
        assert video_plan is not None
        runtime = runtime_of(self._renderer)
        with content.in_use():
            digest = await runtime.run(runtime.frontend.window_key(content, video_plan))
        shown = self._shown[window, look] = Shown(digest, item.decision.level, time.monotonic())
        self._windows.put(self._place(window, look, content.digest), shown)
        return digest


def rendering_of(serving: Any, request: Any) -> tuple[Any, Any, dict[str, Any]]:
    """How vLLM renders a request: its ``ChatParams``, ``TokenizeParams`` and prompt extras."""
    extras = {
        name: value
        for name in ("mm_processor_kwargs", "cache_salt")
        if (value := getattr(request, name)) is not None
    }
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    multimodal = serving.model_config.multimodal_config
    chat_params = request.build_chat_params(
        serving.chat_template, serving.chat_template_content_format
    ).with_defaults(
        {**serving.default_chat_template_kwargs, "tools": tools},
        default_media_io_kwargs=None if multimodal is None else multimodal.media_io_kwargs,
    )
    return chat_params, request.build_tok_params(serving.model_config), extras


async def _alone(work: Coroutine[Any, Any, Any]) -> Any:
    """Result of work in a task of its own, which ends with the caller's.

    Raises:
        asyncio.CancelledError: The caller is cancelled. vLLM makes an answer of the cancellation of
            a request, so the task may end with a result all the same.
    """
    result = await asyncio.create_task(work)
    caller = asyncio.current_task()
    if caller is not None and caller.cancelling():
        raise asyncio.CancelledError
    return result


def _chosen(choice: Any) -> Any:
    """What vLLM reports of each token of a choice; empty or None where there is none."""
    return choice.logprobs and choice.logprobs.content


def _may_pass(status: int) -> bool:
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR
