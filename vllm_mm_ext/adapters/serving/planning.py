"""Plans all videos of a conversation together, before any of them is decoded.

Each video is fetched and probed, the conversation's text is counted, and the quality controller
decides what every video gets of the context, under the present load. The media connector then
delivers by these plans.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm import envs

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector, VideoJob, server_job
from vllm_mm_ext.adapters.quality.service import controller_for
from vllm_mm_ext.adapters.runtime import Runtime, current_runtime
from vllm_mm_ext.adapters.serving.requests import OptionError, current_request
from vllm_mm_ext.base.tasks import all_or_none
from vllm_mm_ext.config.options import DEFAULT_OPTIONS
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaFetcher, MediaRef
from vllm_mm_ext.media.request_claim import current_claim
from vllm_mm_ext.media.types import MediaInfo
from vllm_mm_ext.media.video_plan import VideoPlan, set_plans
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.quality.videos import (
    ContextUse,
    Family,
    SamplingDefaults,
    VideoDecision,
    VideoSource,
)
from vllm_mm_ext.request.conversation import (
    template_tokens,
    text_of,
    video_urls,
    videos_without_url,
)
from vllm_mm_ext.request.costs import FrontendCosts, PlannedVideo
from vllm_mm_ext.request.trace import PlanTrace, current_trace


async def plan(renderer: Any, messages: Sequence[Any], chat_params: Any, tok_params: Any) -> None:
    """Plan the videos of a conversation in the current context.

    Args:
        renderer: vLLM's renderer.
        messages: OpenAI chat messages.
        chat_params: vLLM's ``ChatParams`` in force.
        tok_params: vLLM's ``TokenizeParams``, or None for the model's own.

    Raises:
        VLLMError: A video cannot be served or does not fit, or an option is past the server's
            bounds.
    """
    with client_errors():
        jobs = _Conversation(renderer, messages, chat_params, tok_params)
        if jobs.nothing_to_plan:
            return
        videos = await jobs.runtime.run(jobs.probe())
        prompt = await renderer.tokenize_prompt_async(*jobs.text())
        # Counting tokens of hours of video takes its time, which others need not wait for.
        text = len(prompt["prompt_token_ids"])
        started = time.perf_counter()
        decisions = await asyncio.to_thread(jobs.decisions, videos, text)
        jobs.plan_by(videos, decisions, time.perf_counter() - started)


def plan_blocking(
    renderer: Any, messages: Sequence[Any], chat_params: Any, tok_params: Any
) -> None:
    """As ``plan``, for ``LLM.chat``."""
    with client_errors():
        jobs = _Conversation(renderer, messages, chat_params, tok_params)
        if jobs.nothing_to_plan:
            return
        videos = jobs.runtime.run_blocking(jobs.probe())
        prompt = renderer.tokenize_prompt(*jobs.text())
        started = time.perf_counter()
        decisions = jobs.decisions(videos, len(prompt["prompt_token_ids"]))
        jobs.plan_by(videos, decisions, time.perf_counter() - started)


class _Conversation:
    """One conversation on its way to a plan."""

    def __init__(
        self, renderer: Any, messages: Sequence[Any], chat_params: Any, tok_params: Any
    ) -> None:
        self.renderer = renderer
        self.messages = messages
        self.tools = chat_params.chat_template_kwargs.get("tools")
        self.tok_params = tok_params or renderer.default_chat_tok_params
        self.request = current_request()
        self.jobs: dict[str, VideoJob] = {}
        self.stages: list[dict[str, float]] = []
        asked = self.request.options != DEFAULT_OPTIONS
        if asked:
            self.controller.check(self.request.options)
            if videos_without_url(messages):
                raise OptionError(
                    "mm_ext options apply to videos that are sent with their URL; this request has "
                    "one that is named by its uuid alone, or sent as embeddings",
                    parameter="mm_ext",
                )
        self.urls = video_urls(messages)
        if not self.urls or renderer.mm_processor is None:
            return
        # vLLM's own limit first: what it refuses is not even fetched.
        renderer.mm_processor.info.validate_num_items("video", len(self.urls))
        connector = vllm_compat.media_connector(renderer.model_config, chat_params.media_io_kwargs)
        if isinstance(connector, MMExtMediaConnector):
            self.connector = connector
            self.runtime: Runtime = current_runtime()
            self.jobs = self._jobs()
        if asked and len(self.jobs) < len(set(self.urls)):
            raise OptionError(
                "this server leaves some of these videos to a loader of vLLM's own, which takes "
                "no mm_ext options",
                parameter="mm_ext",
            )

    @property
    def nothing_to_plan(self) -> bool:
        return not self.jobs

    @property
    def controller(self) -> QualityController:
        return controller_for(self.renderer.config)

    def _jobs(self) -> dict[str, VideoJob]:
        """What the server would do with each video that the front-end samples itself."""
        options = self.connector.media_io_kwargs.get("video", {})
        jobs = {}
        for url in dict.fromkeys(self.urls):
            job = server_job(self.runtime, options, url, None)
            if job is not None and job.plan.chooser is None:
                jobs[url] = job
        return jobs

    # --- on the front-end's loop ------------------------------------------------------------------

    async def probe(self) -> list[PlannedVideo]:
        """Fetch and probe all videos at once."""
        fetcher = self.runtime.fetcher(
            self.connector.allowed_local_media_path, self.connector.allowed_media_domains
        )
        probed = await all_or_none(self._probe_one(fetcher, url) for url in self.jobs)
        uses = Counter(self.urls)
        return [
            PlannedVideo(url, uses[url], ref, info, info.video, self.jobs[url].plan)
            for url, (ref, info) in zip(self.jobs, probed, strict=True)
            # The connector says what is wrong with media without pictures.
            if info.video is not None
        ]

    async def _probe_one(self, fetcher: MediaFetcher, url: str) -> tuple[MediaRef, MediaInfo]:
        started = time.perf_counter()
        ref = await fetcher.resolve(
            url, timeout_s=envs.VLLM_VIDEO_FETCH_TIMEOUT, claim=current_claim(fetcher.budget)
        )
        try:
            fetched = time.perf_counter()
            info = await self.runtime.frontend.probe(ref)
        except MediaChangedError:
            # It changed between looking it up and reading it: once more, with what is there now.
            ref = await fetcher.resolve(
                url, timeout_s=envs.VLLM_VIDEO_FETCH_TIMEOUT, claim=current_claim(fetcher.budget)
            )
            fetched = time.perf_counter()
            info = await self.runtime.frontend.probe(ref)
        self.stages.append({"fetch": fetched - started, "probe": time.perf_counter() - fetched})
        return ref, info

    # --- deciding ---------------------------------------------------------------------------------

    def text(self) -> tuple[Any, Any]:
        """The conversation's text and how to tokenize it, for vLLM's tokenizer threads."""
        return {"prompt": text_of(self.messages, self.tools)}, self.tok_params

    def plan_by(
        self, videos: Sequence[PlannedVideo], decisions: Sequence[VideoDecision], seconds: float
    ) -> None:
        """Plan by what the controller decided in so many seconds, in the request's context."""
        if not videos:
            return
        set_plans(
            {v.url: _plan_of(v, d) for v, d in zip(videos, decisions, strict=True)},
            {v.url: v.ref for v in videos},
        )
        if trace := current_trace():
            for stages in self.stages:
                trace.add_stages(stages)
            trace.order = list(self.urls)
            trace.plans = {
                video.url: PlanTrace(
                    decision.level, tuple(lowered._asdict() for lowered in decision.lowered)
                )
                for video, decision in zip(videos, decisions, strict=True)
            }
            trace.add_stages({"plan": seconds})

    def decisions(
        self, videos: Sequence[PlannedVideo], text_tokens: int
    ) -> tuple[VideoDecision, ...]:
        """What the controller decides about the videos."""
        if not videos:
            return ()
        traits, limits = self.runtime.frontend.traits, self.runtime.frontend.limits
        costs = FrontendCosts(videos, self.renderer.mm_processor, traits, limits)
        controller = self.controller
        # All videos of a server are sampled alike.
        plan = videos[0].plan
        countable = costs.knows_tokens
        family = Family(
            resizable=plan.size.kind != "fixed",
            reducible=countable,
            countable=countable,
            frame_multiple=traits.frame_multiple,
            max_item_tokens=self._largest_item(),
            trained=traits.trained,
        )
        defaults = SamplingDefaults(
            plan.sampling.fps, plan.sampling.min_frames, plan.sampling.max_frames, plan.reduction
        )
        sources = [
            VideoSource(
                video.ref.digest,
                video.stream.duration,
                video.stream.num_frames,
                video.stream.width,
                video.stream.height,
                video.uses,
            )
            for video in videos
        ]
        return controller.plan(
            sources,
            costs,
            defaults=defaults,
            family=family,
            options=self.request.options,
            session=self.request.session,
            context=self._context(controller, text_tokens),
        )

    def _largest_item(self) -> int:
        """Tokens that vLLM's encoder cache surely holds, where a video is one item; 0: no limit."""
        config = self.renderer.config
        if vllm_compat.settings_of(config.model_config).segments.tokens:
            return 0
        tokens: int = config.scheduler_config.max_num_batched_tokens
        return tokens

    def _context(self, controller: QualityController, text_tokens: int) -> ContextUse:
        length: int = self.tok_params.max_total_tokens or self.renderer.model_config.max_model_len
        share = int(length * controller.settings.budget.answer_share)
        return ContextUse(
            length=length,
            text=text_tokens + template_tokens(self.messages),
            output=self.tok_params.max_output_tokens or share,
        )


def _plan_of(video: PlannedVideo, decision: VideoDecision) -> VideoPlan:
    sampling = replace(
        video.plan.sampling,
        fps=decision.fps,
        min_frames=decision.min_frames,
        max_frames=decision.max_frames,
    )
    return replace(
        video.plan,
        sampling=sampling,
        size=replace(video.plan.size, max_frame_pixels=decision.frame_pixels),
        reduction=decision.reduction,
    )
