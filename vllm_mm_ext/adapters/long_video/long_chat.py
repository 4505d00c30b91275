"""Answers a chat completion about long videos: windows first, then one answer from their notes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import replace
from typing import Any

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.long_video import chat_chunks
from vllm_mm_ext.adapters.long_video.ask_requests import first_tokens
from vllm_mm_ext.adapters.long_video.beginning import Begun, begun
from vllm_mm_ext.adapters.long_video.engine_model import EngineModel
from vllm_mm_ext.adapters.long_video.final_request import final_request_tokens
from vllm_mm_ext.adapters.long_video.state import Place
from vllm_mm_ext.adapters.long_video.survey import Survey
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.requests import OptionError
from vllm_mm_ext.config.long_video_settings import LongVideoOptions, LongVideoSettings
from vllm_mm_ext.long_video.asking import AskFailedError, filled
from vllm_mm_ext.long_video.looking import Progress
from vllm_mm_ext.long_video.running import Outcome, check_room, look_through
from vllm_mm_ext.long_video.task import Task, WindowStrategy, task_of
from vllm_mm_ext.request.blocks import KEY
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.conversation import with_texts_for_videos
from vllm_mm_ext.request.long_report import LongVideoReport

Create = Callable[..., Awaitable[Any]]

# The last of all priorities that vLLM takes.
_LAST = (1 << 63) - 1


async def answer(serving: Any, request: Any, raw_request: Any, create: Create) -> Any:
    """What ``create_chat_completion`` returns, by way of windows where long video is asked for.

    Args:
        serving: vLLM's handler of chat completions.
        request: vLLM's request.
        raw_request: The HTTP request, or None.
        create: ``create_chat_completion`` of the handler's class, as it was.

    Raises:
        VLLMError: The request cannot be answered so; ``error_answers`` says by which class.
    """
    context = current_request() or enter_request(RequestContext())
    config = vllm_compat.settings_of(serving.model_config)
    # What fails here, vLLM does not tell the server that may have prefilled the prompt.
    made = await serving._with_kv_transfer_rejection_cleanup(
        begun(context, config.long_video, serving, request), request, raw_request
    )
    if made is None:
        return await create(serving, request, raw_request)
    if not isinstance(made, Begun):
        return made
    asked, question, found, strategy = made
    report = LongVideoReport(strategy, config.reports.cache_hits)
    context.trace.long_video = report
    contents = zip(found.urls, (content.digest for content in found.contents), strict=True)
    context.trace.held.update(contents)
    if strategy == "single":
        # From here on the request is one that asks for this frame rate and nothing else.
        context.options = context.options.model_copy(update={"fps": asked.fps, "long_video": None})
        return await create(serving, request, raw_request)
    # An encoder would decode and encode whole videos, of which windows are shown here.
    context.elsewhere = None
    runtime = runtime_of(serving.renderer)
    # A text of one token stands where notes about each video will.
    rendered = await final_request_tokens(
        serving, _with_texts(request, dict.fromkeys(found.urls, "."))
    )
    if not isinstance(rendered, int):
        return rendered
    use = found.context_use
    found = replace(found, context_use=replace(use, text=max(use.text, rendered)))
    with client_errors():
        model = EngineModel(
            serving,
            create,
            request,
            context,
            found,
            windows=runtime.long_video.windows,
            weights=await _weight_version(serving.engine_client),
            session=serving._get_session_id(request, raw_request),
            priority=_priority(serving, request, raw_request, config.long_video),
            rank=serving._get_data_parallel_rank(raw_request),
        )
        task = await _task(serving, config.long_video, asked, strategy, question, found, model)
        place = runtime.long_video.enter()
    if runtime.recorder is not None:
        for codec, content in zip(found.codecs, found.contents, strict=True):
            runtime.recorder.surveyed(codec, content.size)
    chat = _LongChat(serving, request, raw_request, create, model, task, found, report, place)
    return chat.stream() if request.stream else await chat.whole()


async def _weight_version(engine_client: Any) -> str:
    """What notes are kept by: of several API servers, only one is asked to forget its notes."""
    try:
        version: str = await engine_client.get_weight_version()
    except RuntimeError:
        # Data-parallel engines have different weights: no request may share what they note.
        return secrets.token_hex()
    return version


def forget_notes(renderer: Any) -> None:
    """Forget what was noted about videos: the model's weights may change.

    Args:
        renderer: vLLM's renderer.
    """
    if renderer.mm_processor is not None:
        runtime_of(renderer).long_video.notes.clear()


async def _task(
    serving: Any,
    settings: LongVideoSettings,
    asked: LongVideoOptions,
    strategy: WindowStrategy,
    question: str,
    found: Survey,
    model: EngineModel,
) -> Task:
    """What is done for a request, after all checks, before anything is decoded.

    Args:
        serving: As of ``answer``.
        settings: The server's.
        asked: What is asked of long video.
        strategy: How the windows are looked at.
        question: The client's question.
        found: What is known of the videos.
        model: Asks the engine for this request.

    Raises:
        MediaError: The request cannot be answered so.
    """
    if strategy in ("auto", "search"):
        strategy = _with_choices(strategy, settings, serving)
    videos = len(found.urls)
    texts = [_text(settings, video, videos, "") for video in range(videos)]
    task = task_of(
        settings,
        asked,
        strategy=strategy,
        question=question,
        durations=found.durations,
        answer_room=found.context_use.left - sum(await model.count_tokens(texts)),
    )
    await check_room(task, model)
    return task


def _priority(serving: Any, request: Any, raw_request: Any, settings: LongVideoSettings) -> int:
    """Priority of a request's prompts: after other requests, where there are priorities."""
    own: int = serving._get_priority(request, raw_request)
    policy = serving.engine_client.vllm_config.scheduler_config.policy
    return min(own + settings.priority, _LAST) if policy == "priority" else own


def _with_choices(
    strategy: WindowStrategy, settings: LongVideoSettings, serving: Any
) -> WindowStrategy:
    """A strategy that compares yes with no; `auto` does without where they begin alike.

    Raises:
        OptionError: It is `search`, and they do.
    """
    prompts = settings.prompts
    try:
        first_tokens(serving.renderer.get_tokenizer(), (prompts.yes, prompts.no))
    except ValueError as error:
        if strategy == "auto":
            return "map_reduce"
        raise OptionError(
            f"{KEY}.long_video.strategy = 'search': this server cannot tell yes from no "
            f"(mm_ext.long_video.prompts): {error}. Other strategies: rolling, map_reduce",
            parameter=f"{KEY}.long_video.strategy",
            value="search",
        ) from None
    return strategy


def _text(settings: LongVideoSettings, video: int, videos: int, notes: str) -> str:
    """What stands in the conversation where a video stood."""
    what = "the video" if videos == 1 else f"video {video + 1}"
    return filled(settings.prompts.answer, notes=notes, what=what)


def _with_texts(request: Any, texts: Mapping[str, str]) -> Any:
    """The request that is answered in the end, with texts in place of videos."""
    messages = with_texts_for_videos(request.messages, texts)
    return request.model_copy(update={"messages": messages})


def _ignored(_: Progress) -> None:
    """Progress that nobody is told."""


class _LongChat:
    """One request, after all checks.

    Args:
        serving, request, raw_request, create: As of ``answer``.
        model: Asks the engine for this request.
        task: What is asked.
        found: What is known of the videos.
        report: Of the answer.
        place: Among the requests that are answered at once.
    """

    def __init__(
        self,
        serving: Any,
        request: Any,
        raw_request: Any,
        create: Create,
        model: EngineModel,
        task: Task,
        found: Survey,
        report: LongVideoReport,
        place: Place,
    ) -> None:
        self._serving = serving
        self._request = request
        self._raw_request = raw_request
        self._create = create
        self._model = model
        self._task = task
        self._found = found
        self._report = report
        self._place = place
        self._runtime = runtime_of(serving.renderer)
        self._context = current_request()

    async def whole(self) -> Any:
        """The answer that is not streamed: vLLM's response, or its ``ErrorResponse``."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

        try:
            outcome = await self._looked(_ignored)
            if not isinstance(outcome, Outcome):
                return outcome
            response = await self._answered(outcome)
        finally:
            self._place.leave()
        if isinstance(response, ChatCompletionResponse):
            self._report.hear_all(choice.message.content for choice in response.choices)
            usage = chat_chunks.with_cost(response.usage.model_dump(), self._report.cost)
            response.usage = type(response.usage)(**usage)
        return response

    async def stream(self) -> AsyncGenerator[str, None]:
        """The server-sent events of a streamed answer, with those about windows before it."""
        if self._context is not None:
            # Whoever sends the events may do so in another context.
            enter_request(self._context)
        head = self._head()
        events: asyncio.Queue[Progress | None] = asyncio.Queue()
        looking = asyncio.create_task(self._looked(events.put_nowait))
        looking.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (progress := await events.get()) is not None:
                block = {"progress": self._report.progress(progress)}
                yield chat_chunks.without_text(head, {KEY: block})
            outcome = await looking
            answer = await self._answered(outcome) if isinstance(outcome, Outcome) else outcome
            # A sum over thousands of windows, which an answer of thousands of chunks would repeat.
            cost = self._report.cost
            if isinstance(answer, AsyncGenerator):
                async with aclosing(answer):
                    async for chunk in answer:
                        yield chat_chunks.joined(chunk, head, cost)
            else:
                yield chat_chunks.event(answer.model_dump())
                yield chat_chunks.DONE
        except Exception as error:
            yield f"data: {self._serving.create_streaming_error_response(error)}\n\n"
            yield chat_chunks.DONE
        finally:
            looking.cancel()
            try:
                await asyncio.wait([looking])
            finally:
                # Starlette may cancel a stream more than once.
                self._place.leave()

    async def _looked(self, progress: Callable[[Progress], None]) -> Any:
        """What looking at the windows gave; vLLM's ``ErrorResponse`` where all failed."""
        contents = self._found.contents
        with client_errors(), ExitStack() as held:
            for content in contents:
                held.enter_context(content.in_use())
            try:
                return await look_through(
                    self._task, self._model, self._runtime.long_video.notes, progress
                )
            except AskFailedError as error:
                failed = self._model.first_error
                failed.error.message = str(error)
                return failed

    async def _answered(self, outcome: Outcome) -> Any:
        """vLLM's answer to the client's request, with notes in place of videos."""
        self._report.outcome = outcome
        urls = self._found.urls
        texts = {
            urls[evidence.video]: _text(
                self._task.settings, evidence.video, len(urls), evidence.text
            )
            for evidence in outcome.evidence
        }
        request = _with_texts(self._request, texts)
        # vLLM 0.33 may refuse requests while the engine is paused.
        await self._model.sat_out_pause()
        return await self._create(self._serving, request, self._raw_request)

    def _head(self) -> chat_chunks.Head:
        serving, request = self._serving, self._request
        request_id = serving._base_request_id(self._raw_request, request.request_id)
        name = serving.models.model_name(serving._maybe_get_adapters(request))
        return chat_chunks.Head(f"chatcmpl-{request_id}", name)
