"""Plans all videos of a conversation together, before any of them is decoded.

Each video is fetched and probed, and the tokens of the conversation's text are counted. Then the
quality controller decides how much of the context each video gets under the present load. The media
connector delivers the videos by these plans.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from blake3 import blake3
from vllm.transformers_utils.processor import get_video_processor_cls_name

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.media.byte_limits import video_timeout
from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector, server_plan
from vllm_mm_ext.adapters.media.request_budgets import charge_download, download_budget
from vllm_mm_ext.adapters.processors.model_traits import requested_size, splits_videos
from vllm_mm_ext.adapters.processors.segment_info import largest_item
from vllm_mm_ext.adapters.quality.service import controller_for
from vllm_mm_ext.adapters.rendering_wrappers import on_processor_thread
from vllm_mm_ext.adapters.runtime import Runtime, runtime_of
from vllm_mm_ext.adapters.serving.requests import OptionError
from vllm_mm_ext.adapters.sight.stage_notes import note_plan, note_probe
from vllm_mm_ext.base.tasks import all_or_none
from vllm_mm_ext.config.options import DEFAULT_OPTIONS, NO_REDUCTION
from vllm_mm_ext.fleet.encode_request import has_media
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.types import MediaInfo, SizeRule
from vllm_mm_ext.media.use_media import use_media
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.quality.videos import (
    ContextUse,
    Family,
    SamplingDefaults,
    VideoDecision,
    VideoSource,
)
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.conversation import (
    embeds_sound,
    list_contents,
    template_tokens,
    text_of,
    video_urls,
    videos_without_url,
)
from vllm_mm_ext.request.costs import FrontendCosts, PlannedVideo
from vllm_mm_ext.request.media_items import MediaItem, PlanReport


async def plan(
    renderer: Any,
    messages: Sequence[Any],
    chat_params: Any,
    tok_params: Any,
    extras: Mapping[str, Any],
) -> None:
    """Plan the videos of a conversation, and make its context the current one.

    Args:
        renderer: vLLM's renderer.
        messages: OpenAI chat messages.
        chat_params: vLLM's ``ChatParams`` of the request.
        tok_params: vLLM's ``TokenizeParams`` of the request, or None for the model's own.
        extras: The request's ``cache_salt`` and ``mm_processor_kwargs``, if it has them.

    Raises:
        MediaError: A video cannot be served or does not fit, or an option is beyond the server's
            bounds; whoever calls this turns it into vLLM's (``rendering_wrappers``).
    """
    context = _entered(renderer, messages, extras.get("cache_salt"))
    hf_kwargs = extras.get("mm_processor_kwargs")
    planning = Conversation(context, renderer, messages, chat_params, tok_params, hf_kwargs)
    if planning.nothing_to_plan:
        if has_media(messages):
            planning.context.encode_elsewhere(())
        return
    videos = await planning.runtime.run(planning.probe())
    prompt = await renderer.tokenize_prompt_async(*planning.text())
    text = len(prompt["prompt_token_ids"])
    started = time.perf_counter()
    # Counting the tokens of hours of video takes long, so it must not block an event loop.
    decisions = await on_processor_thread(renderer, partial(planning.decisions, videos, text))
    planning.context.encode_elsewhere([decision.level for decision in decisions])
    planning.plan_by(videos, decisions, time.perf_counter() - started)


def plan_blocking(
    renderer: Any,
    messages: Sequence[Any],
    chat_params: Any,
    tok_params: Any,
    extras: Mapping[str, Any],
) -> None:
    """As ``plan``, for ``LLM.chat``, which does all work in the caller's thread."""
    context = _entered(renderer, messages, extras.get("cache_salt"))
    hf_kwargs = extras.get("mm_processor_kwargs")
    planning = Conversation(context, renderer, messages, chat_params, tok_params, hf_kwargs)
    if planning.nothing_to_plan:
        return
    videos = planning.runtime.run_blocking(planning.probe())
    prompt = renderer.tokenize_prompt(*planning.text())
    started = time.perf_counter()
    decisions = planning.decisions(videos, len(prompt["prompt_token_ids"]))
    planning.plan_by(videos, decisions, time.perf_counter() - started)


def _entered(renderer: Any, messages: Sequence[Any], cache_salt: str | None) -> RequestContext:
    """Make a context for a conversation that vLLM begins to render, and make it current."""
    list_contents(messages)
    request = current_request() or RequestContext()
    settings = vllm_compat.settings_of(renderer.model_config)
    request.trace.shows_cache_hits = settings.reports.cache_hits
    return enter_request(request.conversation(renderer, cache_salt))


class Conversation:
    """One conversation while its videos are planned.

    Attributes:
        plans: For each URL whose frames the plugin chooses, what the server's settings make of it.

    Args:
        context: Context of the conversation; the conversation's videos are added to it.
        renderer: vLLM's renderer.
        messages: OpenAI chat messages.
        chat_params: vLLM's ``ChatParams`` of the request.
        tok_params: vLLM's ``TokenizeParams`` of the request, or None for the model's own.
        hf_kwargs: The request's ``mm_processor_kwargs``, or None.

    Raises:
        MediaError: An option is beyond the server's bounds, or cannot be used for these videos.
        VLLMValidationError: There are more videos than ``--limit-mm-per-prompt`` allows.
    """

    def __init__(
        self,
        context: RequestContext,
        renderer: Any,
        messages: Sequence[Any],
        chat_params: Any,
        tok_params: Any,
        hf_kwargs: Mapping[str, object] | None,
    ) -> None:
        self.context = context
        self.renderer = renderer
        self.messages = messages
        self.tools = chat_params.chat_template_kwargs.get("tools")
        self.tok_params = tok_params or renderer.default_chat_tok_params
        self.plans: dict[str, VideoPlan] = {}
        self._densest: dict[str, float] = {}
        self.stages: list[dict[str, float]] = []
        asked = context.options != DEFAULT_OPTIONS
        if asked:
            self.controller.check(context.options)
            if videos_without_url(messages):
                raise OptionError(
                    "mm_ext options apply to videos that are sent with their URL; this request has "
                    "one that is named by its uuid alone, or sent as embeddings",
                    parameter="mm_ext",
                )
        urls = video_urls(messages)
        if not urls or renderer.mm_processor is None:
            return
        # vLLM's own limit comes first, so that videos that it refuses are not even fetched.
        renderer.mm_processor.info.validate_num_items("video", len(urls))
        connector = vllm_compat.media_connector(renderer.model_config, chat_params.media_io_kwargs)
        if isinstance(connector, MMExtMediaConnector):
            self.connector, self._downloads = connector, download_budget()
            self.runtime: Runtime = runtime_of(renderer)
            size = None
            if self.runtime.config.media.resize == "target":
                size = requested_size(renderer.mm_processor.info, hf_kwargs)
            # vLLM does not mix sound given as embeddings with the sound of videos.
            splits = splits_videos(renderer.mm_processor, hf_kwargs or {})
            self._embeds_sound = embeds_sound(messages)
            self._cut = splits and not self._embeds_sound
            self._take_items(urls, size)
        if asked and len(self.plans) < len(set(urls)):
            raise OptionError(
                "this server leaves some of these videos to a loader of vLLM's own, which takes "
                "no mm_ext options",
                parameter="mm_ext",
            )

    @property
    def nothing_to_plan(self) -> bool:
        return not self.plans

    @property
    def controller(self) -> QualityController:
        return controller_for(self.renderer.config)

    def _take_items(self, urls: Sequence[str], size: SizeRule | None) -> None:
        """Add the videos to the context, each with the plan that the server's settings give.

        ``size`` is the request's own rule for the size of frames, if it has one.

        Uses of one URL get the same plan. Only videos whose frames the plugin chooses are planned
        further.
        """
        options = self.connector.media_io_kwargs.get("video", {})
        processor = get_video_processor_cls_name(self.renderer.model_config)
        plans = {
            url: self._with_streams(server_plan(self.runtime, options, url, processor, size))
            for url in set(urls)
        }
        self.items = [MediaItem("video", url, plans[url]) for url in urls]
        self._uses = Counter(urls)
        self.context.add(self.items)
        for url in dict.fromkeys(urls):
            plan = plans[url]
            if plan is not None and plan.chooser is None:
                self.plans[url] = plan

    def _with_streams(self, plan: VideoPlan | None) -> VideoPlan | None:
        """A plan as the request asks: its streams, its span, and no reduction of whole videos."""
        options = self.context.options
        if plan is None:
            return None
        if not self._cut:
            plan = replace(plan, reduction=NO_REDUCTION)
        if self.context.silent or self._embeds_sound:
            plan = replace(plan, audio=False)
        if options.audio_stream is not None:
            plan = replace(plan, audio_stream=options.audio_stream)
        if options.video_stream is not None:
            sampling = replace(plan.sampling, video_stream=options.video_stream)
            plan = replace(plan, sampling=sampling)
        if self.context.span is not None:
            plan = replace(plan, sampling=replace(plan.sampling, span=self.context.span))
        return plan

    # --- on the front-end's loop ------------------------------------------------------------------

    async def probe(self) -> list[PlannedVideo]:
        """Fetch and probe all videos at once; more than a request may download are refused."""
        probed = await all_or_none(self._probe_one(*planned) for planned in self.plans.items())
        planned = (
            PlannedVideo.of(url, self._uses[url], content, info, plan)
            for (url, plan), (content, info) in zip(self.plans.items(), probed, strict=True)
        )
        # A file without a video stream is left out: the connector raises the error for it.
        return [video for video in planned if video is not None]

    async def _probe_one(self, url: str, plan: VideoPlan) -> tuple[MediaRef, MediaInfo]:
        claim = self.context.budget_claim(self.runtime.budget)
        known = self.context.contents.get(url)
        probed = await use_media(
            self.connector.fetcher(self.runtime),
            url,
            lambda content: self.runtime.frontend.probe(content, plan.sampling.video_stream),
            claim=claim,
            content=None if known is None else known.claimed_by(claim),
            timeout_s=video_timeout(),
        )
        charge_download(self._downloads, self.context, url, self._uses[url] * probed.content.size)
        self.stages.append({"fetch": probed.fetch_s, "probe": probed.use_s})
        note_probe(self.context.trace, self.runtime.recorder, url, probed)
        return probed.content, probed.result

    # --- deciding ---------------------------------------------------------------------------------

    def text(self) -> tuple[Any, Any]:
        """The conversation's text and its ``TokenizeParams``, as vLLM's tokenizer takes them."""
        return {"prompt": text_of(self.messages, self.tools)}, self.tok_params

    def plan_by(
        self, videos: Sequence[PlannedVideo], decisions: Sequence[VideoDecision], seconds: float
    ) -> None:
        """Write the controller's decisions into the plans of the conversation's items.

        Args:
            videos: The planned videos.
            decisions: One decision for each of them.
            seconds: Seconds that deciding took.
        """
        if not videos:
            return
        decided = {v.url: (v, d) for v, d in zip(videos, decisions, strict=True)}
        for item in self.items:
            if item.url in decided:
                video, decision = decided[item.url]
                item.plan = video.planned(decision, self._densest.get(item.url))
                item.content = video.ref
                lowered = tuple(entry._asdict() for entry in decision.lowered)
                item.decision = PlanReport(decision.level, lowered)
        trace = self.context.trace
        for stages in self.stages:
            trace.add_stages(stages)
        trace.add_stages({"plan": seconds})
        note_plan(trace, self.runtime.recorder, seconds)

    def decisions(
        self, videos: Sequence[PlannedVideo], text_tokens: int
    ) -> tuple[VideoDecision, ...]:
        """The controller's decision about each video.

        Args:
            videos: The videos.
            text_tokens: Tokens of the conversation's text.

        Raises:
            MediaError: The videos do not fit, or an option cannot be used.
        """
        if not videos:
            return ()
        costs, traits = self.costs(videos), self.runtime.frontend.traits
        # All videos of a server are sampled alike.
        plan = videos[0].plan
        countable, info = costs.knows_tokens, self.renderer.mm_processor.info
        largest = largest_item(self.renderer.config, info, cut=self._cut)
        family = Family(
            resizable=plan.size.kind != "fixed",
            reducible=countable and self._cut,
            countable=countable,
            frame_multiple=traits.frame_multiple,
            max_item_tokens=self.context.limit_items(largest),
            trained=traits.trained,
        )
        sampling = plan.sampling
        floor = sampling.min_frames
        if self.context.options.fps is not None:
            # The server's number of frames (``media_io_kwargs``) gives way to a request's rate.
            floor = min(floor, self.runtime.config.media.sampling.min_frames)
        defaults = SamplingDefaults(
            sampling.fps, floor, sampling.max_frames, plan.reduction, plan.size.max_frame_pixels
        )
        sources = [
            VideoSource(
                *(self._own(video), video.stream.duration, video.stream.num_frames),
                *(video.stream.width, video.stream.height, video.uses),
            )
            for video in videos
        ]
        # The load and earlier decisions are each server's own.
        apart = self.context.disaggregated
        decisions = self.controller.plan(
            sources,
            costs,
            defaults=defaults,
            family=family,
            options=self.context.options,
            session=self.context.session,
            context=self.context_use(text_tokens),
            levels=[0] * len(sources) if apart else self.context.levels,
            # A long video has hundreds of windows. They would push out what conversations go by.
            sticky=self.context.span is None and not apart,
        )
        limited = family.max_item_tokens and countable and self._cut
        if limited and sampling.policy == "adaptive":
            self._densest = {
                video.url: costs.densest(
                    *(index, made.frames, made.frame_pixels, made.reduction),
                    *(made.fps, family.max_item_tokens),
                )
                for index, (video, made) in enumerate(zip(videos, decisions, strict=True))
            }
        return decisions

    def costs(self, videos: Sequence[PlannedVideo]) -> FrontendCosts:
        """What videos of the conversation cost."""
        frontend, processor = self.runtime.frontend, self.renderer.mm_processor
        return FrontendCosts(videos, processor, frontend.traits, frontend.limits, cut=self._cut)

    def _own(self, video: PlannedVideo) -> str:
        """A digest of a video, the engine, the ``cache_salt`` and the sampling.

        It is the key of sticky decisions. Requests with different salts share no prefix cache in
        vLLM, nor do requests to different engines, so they share no decisions either. With other
        ``media_io_kwargs`` the video is sampled otherwise, and needs other tokens.
        """
        hasher = blake3(str(self.runtime.number).encode())
        for part in (video.ref.digest, self.context.cache_salt or "", video.plan.key()):
            hasher.update(b"|" + part.encode())
        return str(hasher.hexdigest())

    def context_use(self, text_tokens: int) -> ContextUse:
        """The context of the conversation, and what its text and the answer take of it.

        Args:
            text_tokens: Tokens of the conversation's text.
        """
        length: int = self.tok_params.max_total_tokens or self.renderer.model_config.max_model_len
        share = int(length * self.controller.settings.budget.answer_share)
        # A router asks the server that prefills for one token.
        apart = self.context.disaggregated
        return ContextUse(
            length=length,
            text=text_tokens + template_tokens(self.messages),
            output=share if apart else self.tok_params.max_output_tokens or share,
        )
