"""What serving calls: decides how the videos of a request are sampled, sized and reduced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction, RequestOptions
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.policies.quality.board import Board, Decision
from vllm_mm_ext.policies.quality.bounds import check_bounds, check_family
from vllm_mm_ext.policies.quality.fit import Ladder, Wish, floors_of, over_budget, share
from vllm_mm_ext.policies.quality.load_signal import LoadSignal
from vllm_mm_ext.policies.quality.sticky import Stickiness
from vllm_mm_ext.policies.quality.tiers import LoadSample
from vllm_mm_ext.policies.quality.videos import (
    ContextUse,
    Family,
    Lowered,
    Reason,
    SamplingDefaults,
    VideoCosts,
    VideoDecision,
    VideoSource,
)


@dataclass(frozen=True)
class _Ask:
    """Sampling and size of one video: fps, bounds of the count, the count, cap, true pixels."""

    fps: float
    min_frames: int
    max_frames: int
    frames: int
    cap: int
    pixels: int


@dataclass(frozen=True)
class _Limit:
    """Tokens that a request's videos share, and what sets that limit."""

    tokens: int
    why: Reason
    words: str
    cure: str = ""


class QualityController:
    """Composes load tiers, standing decisions and fit-to-budget.

    Args:
        settings: The ``quality`` section.
        board: Shared by the processes of the service.
        clock: Seconds, the same for all of them.
        published: What engines publish by themselves, by index.
        engines: Engines of the service.
    """

    def __init__(
        self,
        settings: QualitySettings,
        board: Board,
        *,
        clock: Callable[[], float] = time.monotonic,
        published: Callable[[], Iterable[tuple[int, LoadSample]]] | None = None,
        engines: int = 1,
    ) -> None:
        self.settings = settings
        self.signal = LoadSignal(settings.tiers, board, published, engines)
        self._sticky = Stickiness(settings.sticky, board)
        self._clock = clock

    def check(self, options: RequestOptions) -> None:
        """Refuse options past the server's bounds.

        Raises:
            OptionBoundError: One is; the message names it, its value and the bound.
        """
        check_bounds(options, self.settings.bounds)

    def level(self) -> int:
        """The service's load tier now, 0 for no load."""
        return self.signal.level(self._clock()) if self.settings.enabled else 0

    def _level(self, options: RequestOptions, standing: Decision | None) -> int:
        if options.quality == "fixed" or not self.settings.enabled:
            return 0
        # A board may be older than a change of the settings.
        top = self.settings.tiers.levels - 1
        return min(top, self.level() if standing is None else standing.level)

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
    ) -> tuple[VideoDecision, ...]:
        """Decide about all videos of a request together, and let the decisions stand.

        Args:
            videos: In the order of the request.
            costs: What they would become.
            defaults: What a video gets if the request does not say.
            family: What can be done to videos of the served model.
            options: What the request asks.
            session: Session of the request, None without one.
            context: The context and what else is in it.

        Returns:
            One decision for each video.

        Raises:
            OptionBoundError: An option asks for what the served model cannot do.
            OverBudgetError: The videos do not fit at their lowest quality; says what would.
        """
        check_family(options, family)
        now = self._clock()
        standing = [self._sticky.find(session, video.digest, options, now) for video in videos]
        levels = [self._level(options, decision) for decision in standing]
        asked = [self._asked(index, costs, defaults, options) for index in range(len(videos))]
        eased = [
            self._eased(index, video, asked[index], levels[index], costs, family, options)
            for index, video in enumerate(videos)
        ]
        reduction = (options.reduction or defaults.reduction) if family.reducible else NO_REDUCTION
        decisions = [
            _decision(level, ask, reduction, _load_lowered(before, ask))
            for level, ask, before in zip(levels, eased, asked, strict=True)
        ]
        if family.countable:
            ladders = [
                Ladder(
                    index,
                    self._wish(video, asked[index], eased[index], reduction, options),
                    costs,
                    family,
                )
                for index, video in enumerate(videos)
            ]
            decisions = self._fit(
                decisions, ladders, standing, costs, family, self._limit(options, context), context
            )
        for video, decision in zip(videos, decisions, strict=True):
            self._sticky.remember(
                session,
                video.digest,
                options,
                level=decision.level,
                lowered=bool(decision.lowered),
                tokens=decision.tokens or 0,
                now=now,
            )
        return tuple(decisions)

    def _asked(
        self, index: int, costs: VideoCosts, defaults: SamplingDefaults, options: RequestOptions
    ) -> _Ask:
        """A video as asked. An explicit lower bound lifts the default upper one."""
        fps = options.fps or defaults.fps
        lower = max(options.min_frames or 1, options.floor.frames or 1)
        max_frames = options.max_frames or max(defaults.max_frames, lower)
        min_frames = options.min_frames or min(defaults.min_frames, max_frames)
        cap = (options.resolution or 0) ** 2
        frames = costs.frames(index, fps, min_frames, max_frames)
        pixels = costs.pixels(index, frames, cap)
        return _Ask(fps, min_frames, max_frames, frames, cap, pixels)

    def _eased(
        self,
        index: int,
        video: VideoSource,
        ask: _Ask,
        level: int,
        costs: VideoCosts,
        family: Family,
        options: RequestOptions,
    ) -> _Ask:
        """What is left of it in a load tier, floors respected.

        Rate and upper bound shrink alike: a long clip that its bound limits is eased as much as a
        short one that its rate limits, and a clip on a fixed step stays on one.
        """
        if not level:
            return ask
        tiers = self.settings.tiers
        rate, side = tiers.frame_rate[level], tiers.resolution[level] / tiers.resolution[0]
        floor = self._floor_frames(video, ask, options)
        fps = max(ask.fps * rate, min(ask.fps, options.floor.fps or 0.0))
        max_frames = max(math.ceil(ask.max_frames * rate), floor)
        min_frames = min(max(ask.min_frames, floor), max_frames)
        frames = costs.frames(index, fps, min_frames, max_frames)
        cap, pixels = ask.cap, ask.pixels
        if family.resizable:
            lowest = min(ask.pixels, self._floor_pixels(options))
            cap = max(int(ask.pixels * side**2), lowest)
            pixels = costs.pixels(index, frames, cap)
        return _Ask(fps, min_frames, max_frames, frames, cap, pixels)

    def _wish(
        self,
        video: VideoSource,
        ask: _Ask,
        eased: _Ask,
        reduction: Reduction,
        options: RequestOptions,
    ) -> Wish:
        budget = self.settings.budget
        sparse = min(math.ceil(budget.sparse_fps * video.duration), budget.sparse_frames)
        return Wish(
            video,
            frames=eased.frames,
            sparse_frames=sparse,
            floor_frames=min(eased.frames, self._floor_frames(video, ask, options)),
            cap=eased.cap,
            pixels=eased.pixels,
            floor_pixels=self._floor_pixels(options),
            reduction=reduction,
            reductions=budget.reductions,
        )

    def _floor_frames(self, video: VideoSource, ask: _Ask, options: RequestOptions) -> int:
        """Frames a video keeps; what the request says of that outranks the server's floor."""
        own = [
            options.floor.frames,
            options.min_frames,
            None if options.floor.fps is None else math.ceil(options.floor.fps * video.duration),
        ]
        given = [frames for frames in own if frames is not None]
        return min(ask.frames, max(given, default=self.settings.budget.floor_frames))

    def _floor_pixels(self, options: RequestOptions) -> int:
        return (options.floor.resolution or self.settings.budget.floor_resolution) ** 2

    def _limit(self, options: RequestOptions, context: ContextUse) -> _Limit:
        limits = [
            _Limit(
                context.left,
                "context",
                f"the context of {context.length} tokens with {context.text} of text and "
                f"{context.output} kept for the answer",
                "{missing} tokens less of text or kept for the answer (lower max_tokens)",
            )
        ]
        if (asked := options.total_tokens) is not None:
            cure = "total_tokens of at least {needed}"
            limits.append(_Limit(asked, "total_tokens", "total_tokens", cure))
        if bound := self.settings.bounds.max_total_tokens:
            limits.append(_Limit(bound, "limit", "this server's limit"))
        return min(limits, key=lambda limit: limit.tokens)

    def _fit(
        self,
        decisions: Sequence[VideoDecision],
        ladders: Sequence[Ladder],
        standing: Sequence[Decision | None],
        costs: VideoCosts,
        family: Family,
        limit: _Limit,
        context: ContextUse,
    ) -> list[VideoDecision]:
        if family.max_item_tokens:
            words = "the encoder cache of this server"
            for ladder in ladders:
                if ladder.floor > family.max_item_tokens:
                    raise over_budget([ladder], family.max_item_tokens, costs, words)
        if floors_of(ladders) > limit.tokens:
            raise over_budget(ladders, limit.tokens, costs, limit.words, limit.cure)
        granted = self._grants(ladders, standing, limit, context)
        fitted = []
        for ladder, tokens, decision in zip(ladders, granted, decisions, strict=True):
            place, why = ladder.best(tokens), limit.why
            # A standing grant may be what this left of an earlier one.
            if family.max_item_tokens and place <= ladder.best(family.max_item_tokens):
                place, why = ladder.best(family.max_item_tokens), "limit"
            fitted.append(_lower(decision, ladder, place, why))
        return fitted

    def _grants(
        self,
        ladders: Sequence[Ladder],
        standing: Sequence[Decision | None],
        limit: _Limit,
        context: ContextUse,
    ) -> list[int]:
        """Tokens for each use of each video, whose floors fit together.

        What a use was granted before stays as long as there is room: the plan, and with it every
        cache entry, stays the same. Others share what a first request may take, or if their floors
        need more, all that is left.
        """
        first = min(limit.tokens, int(context.length * self.settings.budget.context_share))
        kept = [
            # A floor may be higher than it was then, and no plan is below it.
            max(ladder.floor, decision.tokens) if decision is not None and decision.tokens else None
            for ladder, decision in zip(ladders, standing, strict=True)
        ]
        fresh = [ladder for ladder, tokens in zip(ladders, kept, strict=True) if tokens is None]
        taken = sum(
            ladder.uses * tokens
            for ladder, tokens in zip(ladders, kept, strict=True)
            if tokens is not None
        )
        for budget in (first - taken, limit.tokens - taken):
            shared = _shared(fresh, budget)
            if shared is not None:
                rest = iter(shared)
                return [next(rest) if tokens is None else tokens for tokens in kept]
        for budget in (first, limit.tokens):
            shared = _shared(ladders, budget)
            if shared is not None:
                return shared
        raise AssertionError("the floors fit into the limit")


def _shared(ladders: Sequence[Ladder], budget: int) -> list[int] | None:
    """Tokens for each use when a budget is divided; None if the floors do not fit into it."""
    if floors_of(ladders) > budget:
        return None
    return share(
        [ladder.demand for ladder in ladders],
        [ladder.floor for ladder in ladders],
        [ladder.uses for ladder in ladders],
        budget,
    )


def _decision(
    level: int, ask: _Ask, reduction: Reduction, lowered: tuple[Lowered, ...]
) -> VideoDecision:
    return VideoDecision(
        level=level,
        fps=ask.fps,
        min_frames=ask.min_frames,
        max_frames=ask.max_frames,
        frame_pixels=ask.cap,
        reduction=reduction,
        frames=ask.frames,
        tokens=None,
        lowered=lowered,
    )


def _load_lowered(before: _Ask, after: _Ask) -> tuple[Lowered, ...]:
    return _differences(
        (before.frames, before.pixels, NO_REDUCTION),
        (after.frames, after.pixels, NO_REDUCTION),
        "load",
    )


def _lower(decision: VideoDecision, ladder: Ladder, place: int, why: Reason) -> VideoDecision:
    """The decision with the plan at ``place`` of its video's ladder."""
    tokens = ladder.cost(place)
    if place == 0:
        return replace(decision, tokens=tokens)
    step, wish = ladder.steps[place], ladder.wish
    fewer = step.frames < wish.frames
    return replace(
        decision,
        min_frames=min(decision.min_frames, step.frames),
        max_frames=step.frames if fewer else decision.max_frames,
        frame_pixels=step.cap,
        reduction=step.reduction,
        frames=step.frames,
        tokens=tokens,
        lowered=decision.lowered
        + _differences(
            (wish.frames, wish.pixels, wish.reduction),
            (step.frames, step.cap or wish.pixels, step.reduction),
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
