"""What is known of a request about long videos before any of it is decoded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm_mm_ext.adapters.rendering_wrappers import on_processor_thread
from vllm_mm_ext.adapters.serving.planning import Conversation
from vllm_mm_ext.base.tasks import all_or_none
from vllm_mm_ext.errors import NoSuchStreamError
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaRef
from vllm_mm_ext.policies.quality.videos import ContextUse
from vllm_mm_ext.request.context import RequestContext
from vllm_mm_ext.request.conversation import video_urls, videos_without_url
from vllm_mm_ext.request.costs import PlannedVideo

# Frames of a video at any rate.
_ANY_FRAMES = 1 << 30


@dataclass(frozen=True)
class Survey:
    """The videos of a request and the room in its prompt.

    Attributes:
        urls: URL of each video, as the request spells it; a video that is shown twice counts once.
        contents: The content of each.
        durations: Seconds of each.
        codecs: FFmpeg's name of the codec of each.
        fits: All of them fit one prompt at the frame rate asked.
        context_use: The context, and what the client's own text and the answer take of it.
    """

    urls: tuple[str, ...]
    contents: tuple[MediaRef, ...]
    durations: tuple[float, ...]
    codecs: tuple[str, ...]
    fits: bool
    context_use: ContextUse


async def survey(
    context: RequestContext,
    renderer: Any,
    messages: Sequence[Any],
    chat_params: Any,
    tok_params: Any,
    extras: Mapping[str, Any],
    fps: float | None,
) -> Survey | None:
    """Probe the videos of a request and count its text.

    Args:
        context: The client's; nothing is added to it.
        renderer: vLLM's renderer.
        messages: OpenAI chat messages.
        chat_params: vLLM's ``ChatParams`` of the request.
        tok_params: vLLM's ``TokenizeParams`` of the request.
        extras: The request's ``cache_salt`` and ``mm_processor_kwargs``, if it has them.
        fps: Frames per second asked; None as the server samples.

    Returns:
        None where some of the videos are not for the front-end to read: they have no URL, or one of
        vLLM's own loaders is in charge. With options this is an error.

    Raises:
        MediaError: A video cannot be read, or an option cannot be used for these videos.
        VLLMValidationError: There are more videos than ``--limit-mm-per-prompt`` allows.
    """
    # A context of its own: the client's trace reports what the model got.
    own = RequestContext(context.options).conversation(renderer, extras.get("cache_salt"))
    hf_kwargs = extras.get("mm_processor_kwargs")
    try:
        planning = Conversation(own, renderer, messages, chat_params, tok_params, hf_kwargs)
        urls = dict.fromkeys(video_urls(messages))
        if len(planning.plans) < len(urls) or videos_without_url(messages):
            return None
        videos = await planning.runtime.run(planning.probe())
        prompt = await renderer.tokenize_prompt_async(*planning.text())
    finally:
        own.end_claim()
    if len(videos) < len(urls):
        raise NoSuchStreamError(
            "The media has no video stream that holds a frame.", parameter="video_url"
        )
    use = planning.context_use(len(prompt["prompt_token_ids"]))
    fits = await on_processor_thread(renderer, partial(_fits, planning, videos, use.left, fps))
    return Survey(
        tuple(video.url for video in videos),
        tuple(video.ref for video in videos),
        tuple(video.stream.duration for video in videos),
        tuple(video.stream.codec for video in videos),
        fits,
        use,
    )


async def opened(
    look: Callable[[], Awaitable[Survey | None]],
    wanted: Callable[[Survey], bool],
    run: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]],
    budget: MediaBudget,
) -> Survey | None:
    """What ``look`` finds, with the bytes of the videos at hand.

    The file of a recording that goes on may have grown since it was probed, and no cache may have
    it. Then it is looked at once more: whatever grew just now is read to know what it is.

    Args:
        look: Makes a survey.
        wanted: Whether the bytes are needed.
        run: Runs work on the front-end's loop.
        budget: The media budget of the front-end.

    Raises:
        MediaError: As ``look`` and ``MediaRef.open`` raise it.
    """
    for is_last in (False, True):
        found = await look()
        if found is None or not wanted(found):
            break
        # The survey's claim has ended; bytes that nothing holds have to be waited for with another.
        claim = budget.claim()
        contents = tuple(content.claimed_by(claim) for content in found.contents)
        try:
            await run(all_or_none(content.open() for content in contents))
            return replace(found, contents=contents)
        except MediaChangedError:
            if is_last:
                raise
        finally:
            claim.end()
    return found


def _fits(
    planning: Conversation, videos: Sequence[PlannedVideo], room: int, fps: float | None
) -> bool:
    """Whether one prompt holds all frames of all videos at the rate asked."""
    options, costs = planning.context.options, planning.costs(videos)
    counted, tokens = costs.knows_tokens, 0
    for index, video in enumerate(videos):
        sampling = video.plan.sampling
        frames = costs.frames(index, fps or sampling.fps, sampling.min_frames, _ANY_FRAMES)
        if frames > (options.max_frames or sampling.max_frames):
            return False
        if counted:
            own = video.plan.size.max_frame_pixels
            cap = own if options.resolution is None else options.resolution**2
            reduction = options.reduction or video.plan.reduction
            tokens += video.uses * costs.tokens(index, frames, cap, reduction)
    return tokens <= min(room, options.total_tokens or room)
