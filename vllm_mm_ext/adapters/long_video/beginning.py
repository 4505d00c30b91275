"""What is known of a request about long videos before its windows are looked at."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.long_video.engine_model import rendering_of
from vllm_mm_ext.adapters.long_video.survey import Survey, opened, survey
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.requests import OptionError
from vllm_mm_ext.config.long_video_settings import (
    LongVideoOptions,
    LongVideoSettings,
    Strategy,
)
from vllm_mm_ext.long_video.task import strategy_for
from vllm_mm_ext.request.blocks import KEY
from vllm_mm_ext.request.context import RequestContext
from vllm_mm_ext.request.conversation import list_contents, question_of, video_urls


class Begun(NamedTuple):
    """A request about long videos.

    Attributes:
        asked: What is asked of long video.
        question: The client's question.
        found: What is known of the videos.
        strategy: How they are looked at.
    """

    asked: LongVideoOptions
    question: str
    found: Survey
    strategy: Strategy


async def begun(
    context: RequestContext, settings: LongVideoSettings, serving: Any, request: Any
) -> Any:
    """A request about long videos; None for one that is not, or vLLM's ``ErrorResponse``.

    Args:
        context: Of the request.
        settings: The server's.
        serving: vLLM's handler of chat completions.
        request: vLLM's request.

    Raises:
        VLLMError: The request cannot be answered so; ``error_answers`` says by which class.
    """
    with client_errors():
        list_contents(request.messages)
        asked = asked_of(context, settings, request)
    if asked is None:
        return None
    if (refusal := await serving._check_model(request)) is not None:
        return refusal
    question, runtime = question_of(request.messages), runtime_of(serving.renderer)

    async def look() -> Survey | None:
        return await _surveyed(context, serving, request, asked)

    def strategy_of(found: Survey) -> Strategy:
        return strategy_for(asked.strategy or "auto", question, found.fits)

    # The survey has a trace of its own. That of the request tells takedowns what is looked at.
    held = context.trace.held = dict.fromkeys(video_urls(request.messages), "")
    with client_errors():
        found = await opened(
            look, lambda found: strategy_of(found) != "single", runtime.run, runtime.budget
        )
    if found is None:
        held.clear()
        return None
    return Begun(asked, question, found, strategy_of(found))


def asked_of(
    context: RequestContext, settings: LongVideoSettings, request: Any
) -> LongVideoOptions | None:
    """What is asked of long video; None where it does not come in.

    Args:
        context: Of the request.
        settings: The server's.
        request: vLLM's request.

    Returns:
        The options with a strategy, and with the frame rate that the request asks for elsewhere.

    Raises:
        OptionError: Long video is asked for, and there is no video, or another server answers.
    """
    asked = context.options.long_video
    has_video = bool(video_urls(request.messages))
    if asked is None:
        if settings.default == "off" or not has_video or context.disaggregated:
            return None
        asked = LongVideoOptions()
    elif not has_video:
        raise OptionError(
            f"{KEY}.long_video is about videos, and this request has no video_url with a URL",
            parameter=f"{KEY}.long_video",
        )
    elif context.disaggregated and asked.strategy != "single":
        # Each of the two servers would look at the windows by itself, and write other notes.
        raise OptionError(
            f"{KEY}.long_video.strategy = {asked.strategy or 'auto'!r}: one server prefills this "
            "request and another one answers it, which takes one prompt with all of the video. "
            "Such requests take: single",
            parameter=f"{KEY}.long_video.strategy",
            value=asked.strategy,
        )
    default = "auto" if settings.default == "off" else settings.default
    return asked.model_copy(
        update={
            "strategy": asked.strategy or default,
            "fps": context.options.fps if asked.fps is None else asked.fps,
        }
    )


async def _surveyed(
    context: RequestContext, serving: Any, request: Any, asked: LongVideoOptions
) -> Survey | None:
    """What is known of the request; None where vLLM's own loaders read its videos."""
    from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs

    validate_request_mm_kwargs(
        mm_processor_kwargs=request.mm_processor_kwargs,
        media_io_kwargs=request.media_io_kwargs,
        trust_request_mm_kwargs=serving.online_renderer.trust_request_mm_kwargs,
    )
    return await survey(
        context, serving.renderer, request.messages, *rendering_of(serving, request), asked.fps
    )
