"""What planning calls: decides how the videos of a request are sampled, sized and reduced."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_mm_ext.base.shared_state import Decision, SharedState
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction, RequestOptions
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.policies.quality.bounds import check_bounds, check_family
from vllm_mm_ext.policies.quality.budget import Limit, grants, limit_of
from vllm_mm_ext.policies.quality.fit import Ladder, floors_of, over_budget
from vllm_mm_ext.policies.quality.service_tier import ServiceTier
from vllm_mm_ext.policies.quality.sticky import StickyDecisions
from vllm_mm_ext.policies.quality.targets import Delivery, Targets
from vllm_mm_ext.policies.quality.videos import (
    ContextUse,
    Family,
    ItemCosts,
    Lowered,
    Reason,
    SamplingDefaults,
    VideoCosts,
    VideoDecision,
    VideoSource,
)


class QualityController:
    """Composes load tiers, sticky decisions and fitting to a token budget.

    Args:
        settings: The ``quality`` section.
        state: Shared by the processes of the service.
        clock: Seconds, the same for all of those processes.
        engines: Engines of the service.
    """

    def __init__(
        self,
        settings: QualitySettings,
        state: SharedState,
        *,
        clock: Callable[[], float] = time.monotonic,
        engines: int = 1,
    ) -> None:
        self.settings = settings
        self._tier = ServiceTier(settings.tiers, state, engines)
        self._sticky = StickyDecisions(settings.sticky, state)
        self._clock = clock

    def check(self, options: RequestOptions) -> None:
        """Refuse options past the server's bounds.

        Raises:
            OptionBoundError: One is; the message names it, its value and the bound.
        """
        check_bounds(options, self.settings.bounds)

    def level(self) -> int:
        """The service's load tier now, 0 for no load."""
        return self._tier.level(self._clock()) if self.settings.enabled else 0

    def _level(self, options: RequestOptions, earlier: Decision | None) -> int:
        if options.quality == "fixed" or not self.settings.enabled:
            return 0
        return self.level() if earlier is None else earlier.level

    def plan(
        self,
        videos: Sequence[VideoSource],
        costs: VideoCosts,
        *,
        defaults: SamplingDefaults,
        family: Family,
        options: RequestOptions,
        session: str | None,
        context: ContextUse,
        levels: Sequence[int] | None = None,
        sticky: bool = True,
    ) -> tuple[VideoDecision, ...]:
        """Decide about all videos of a request together.

        Args:
            videos: In the order of the request.
            costs: What they would become.
            defaults: What a video gets if the request does not say.
            family: What can be done to videos of the served model.
            options: What the request asks.
            session: Session of the request, None without one.
            context: The context and what else is in it.
            levels: Load tiers that are decided already, for each video; None: not so.
            sticky: Earlier decisions hold, and these are kept for later requests.

        Returns:
            One decision for each video.

        Raises:
            OptionBoundError: An option asks for what the served model cannot do.
            OverBudgetError: The videos do not fit at their lowest quality; says what would.
        """
        check_family(options, family)
        now = self._clock()
        earlier = [
            self._sticky.find(session, video.digest, options, now) if sticky else None
            for video in videos
        ]
        targets = Targets(self.settings, costs, defaults, family, options)
        decisions, ladders = [], []
        for index, (video, known) in enumerate(zip(videos, earlier, strict=True)):
            level = self._level(options, known)
            if levels is not None and index < len(levels):
                level = min(levels[index], self.settings.tiers.levels - 1)
            asked = targets.asked(index)
            wanted = targets.under_load(index, video, asked, level)
            decisions.append(_decision(level, asked, wanted, targets.reduction))
            target = targets.target(video, asked, wanted)
            ladders.append(Ladder(index, target, costs, family))
        if family.countable:
            limit = limit_of(options, context, self.settings.bounds)
            each = ItemCosts(costs, [decision.fps for decision in decisions])
            items = [Ladder(one.index, one.target, each, family) for one in ladders]
            _check_floors(ladders, items, limit, costs, each, family)
            granted = grants(
                ladders,
                [0 if known is None else known.tokens for known in earlier],
                int(context.length * self.settings.budget.context_share),
                limit.tokens,
            )
            decisions = [
                _fitted(decision, ladder, item, tokens, limit.why, family)
                for decision, ladder, item, tokens in zip(
                    decisions, ladders, items, granted, strict=True
                )
            ]
        for video, decision in zip(videos, decisions, strict=True) if sticky else ():
            self._sticky.remember(
                session,
                video.digest,
                options,
                level=decision.level,
                tokens=decision.tokens or 0,
                now=now,
            )
        return tuple(decisions)


def _check_floors(
    ladders: Sequence[Ladder],
    items: Sequence[Ladder],
    limit: Limit,
    costs: VideoCosts,
    each: ItemCosts,
    family: Family,
) -> None:
    if family.max_item_tokens:
        words = "the encoder cache of this server"
        for item in items:
            if item.floor > family.max_item_tokens:
                raise over_budget([item], family.max_item_tokens, each, words)
    if floors_of(ladders) > limit.tokens:
        raise over_budget(ladders, limit.tokens, costs, limit.words, limit.cure)


def _decision(level: int, asked: Delivery, wanted: Delivery, reduction: Reduction) -> VideoDecision:
    """The decision about a video before it is fitted to a budget."""
    return VideoDecision(
        level=level,
        fps=wanted.fps,
        min_frames=wanted.min_frames,
        max_frames=wanted.max_frames,
        frame_pixels=wanted.cap,
        reduction=reduction,
        frames=wanted.frames,
        tokens=None,
        lowered=_differences(
            (asked.frames, asked.pixels, NO_REDUCTION),
            (wanted.frames, wanted.pixels, NO_REDUCTION),
            "load",
        ),
    )


def _fitted(
    decision: VideoDecision, ladder: Ladder, item: Ladder, tokens: int, why: Reason, family: Family
) -> VideoDecision:
    """The decision with the best plan of its video that fits into ``tokens``.

    ``item`` has the same plans as ``ladder``, and the tokens of the largest segment of each.
    """
    place = ladder.best(tokens)
    # An earlier grant may be what the item limit left of a larger one.
    if family.max_item_tokens and place <= item.best(family.max_item_tokens):
        place, why = item.best(family.max_item_tokens), "limit"
    cost = ladder.cost(place)
    if place == 0:
        return replace(decision, tokens=cost)
    step, target = ladder.steps[place], ladder.target
    fewer = step.frames < target.frames
    return replace(
        decision,
        min_frames=min(decision.min_frames, step.frames),
        max_frames=step.frames if fewer else decision.max_frames,
        frame_pixels=step.cap,
        reduction=step.reduction,
        frames=step.frames,
        tokens=cost,
        lowered=decision.lowered
        + _differences(
            (target.frames, target.pixels, target.reduction),
            (step.frames, step.cap or target.pixels, step.reduction),
            why,
        ),
    )


def _differences(
    wanted: tuple[int, int, Reduction], given: tuple[int, int, Reduction], why: Reason
) -> tuple[Lowered, ...]:
    found = []
    if given[0] < wanted[0]:
        found.append(Lowered("frames", str(wanted[0]), str(given[0]), why))
    if given[1] < wanted[1]:
        words = [f"{pixels} pixels" for pixels in (wanted[1], given[1])]
        found.append(Lowered("resolution", words[0], words[1], why))
    if given[2] != wanted[2]:
        found.append(Lowered("reduction", wanted[2].key(), given[2].key(), why))
    return tuple(found)
