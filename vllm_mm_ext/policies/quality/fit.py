"""Fit-to-budget: what is lowered, in which order, until the videos of a request fit. Pure.

A video has a ladder of plans. The first step of the ladder is the video's target; each further step
lowers one thing and nothing rises again, so a larger budget never gives a plan that is worse in any
respect:

1. Frames, down to a sparse but even coverage. Neighbouring frames of one or more a second resemble
   each other, so this costs the least.
2. Resolution, down to its floor. What happens and when stays known; fine print is lost.
3. Token reduction, as far as allowed. It merges or drops tokens that the encoder made of the whole
   picture.
4. Frames, down to their floor. From here on events are missed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.errors import OverBudgetError
from vllm_mm_ext.policies.quality.videos import Family, TokenCosts, VideoSource

# Sides differ by the larger of the patch sizes in use: smaller steps would change no token count.
_SIDE_STEP = 28


@dataclass(frozen=True)
class Target:
    """What one video is to get if the budget allows, and how far it may be lowered.

    Attributes:
        source: The video.
        frames: Frames wanted (those that sampling would deliver).
        sparse_frames: Frames that are enough before resolution is touched.
        floor_frames: Frames that the video keeps in any case.
        cap: Wanted cap on the pixels of one frame, 0 for none.
        pixels: Pixels that one frame has then.
        floor_pixels: Pixels that a frame keeps, where the target has that many.
        reduction: Token reduction wanted.
        reductions: Stronger reductions that may be used, in order.
    """

    source: VideoSource
    frames: int
    sparse_frames: int
    floor_frames: int
    cap: int
    pixels: int
    floor_pixels: int
    reduction: Reduction
    reductions: tuple[Reduction, ...] = ()


@dataclass(frozen=True)
class Step:
    """One plan of a ladder: frames, cap on the pixels of one frame (0: none), reduction."""

    frames: int
    cap: int
    reduction: Reduction


class Ladder:
    """The plans of one video from best to lowest, and what each costs per use of the video.

    Args:
        index: The video's place in its request.
        target: What the video is to get at best and at least.
        costs: What plans cost. Counting is slow, so only plans that a search visits are counted.
        family: What can be lowered for the served model.
    """

    def __init__(self, index: int, target: Target, costs: TokenCosts, family: Family) -> None:
        self.target = target
        self.steps = _steps(target, family)
        self.index = index
        self._costs = costs
        self._known: dict[int, int] = {}

    def cost(self, place: int) -> int:
        """Tokens of the plan at ``place``."""
        if place not in self._known:
            step = self.steps[place]
            self._known[place] = self._costs.tokens(
                self.index, step.frames, step.cap, step.reduction
            )
        return self._known[place]

    @property
    def uses(self) -> int:
        """How often the request shows the video."""
        return self.target.source.uses

    @property
    def demand(self) -> int:
        """Tokens of the first plan, the target."""
        return self.cost(0)

    @property
    def floor(self) -> int:
        """Tokens of the lowest plan."""
        return self.cost(len(self.steps) - 1)

    def best(self, budget: int) -> int:
        """Place of the first plan that fits into ``budget`` tokens; the last one if none does."""
        if self.demand <= budget:
            return 0
        last = len(self.steps) - 1
        return bisect_left(range(last), True, key=lambda place: self.cost(place) <= budget)


def share(
    demands: Sequence[int], floors: Sequence[int], uses: Sequence[int], budget: int
) -> list[int]:
    """Divide a budget: small demands are met in full, larger ones get equal shares.

    Args:
        demands: Tokens each video wants per use.
        floors: Tokens each video needs per use; all uses together must not exceed the budget.
        uses: How often each video is shown.
        budget: Tokens for all.

    Returns:
        Tokens for a use of each video, at least its floor; all uses together take at most
        ``budget``. No share shrinks when the budget grows.
    """

    def at(level: int) -> list[int]:
        return [
            max(floor, min(demand, level)) for demand, floor in zip(demands, floors, strict=True)
        ]

    def total(tokens: Sequence[int]) -> int:
        return sum(map(mul, uses, tokens))

    ceiling = max((*demands, *floors), default=0)
    # The highest water level whose sum fits.
    level = bisect_left(range(ceiling + 1), True, key=lambda mark: total(at(mark)) > budget) - 1
    return at(max(0, level))


def floors_of(ladders: Sequence[Ladder]) -> int:
    """Tokens of all uses of some videos at their lowest plans."""
    return sum(ladder.uses * ladder.floor for ladder in ladders)


def over_budget(
    ladders: Sequence[Ladder], budget: int, costs: TokenCosts, reason: str, cure: str = ""
) -> OverBudgetError:
    """The error for videos whose lowest plans do not fit, with what would.

    Args:
        ladders: The ladders of all videos that share the budget.
        budget: Tokens that those videos have.
        costs: What plans cost.
        reason: What sets the budget, in words.
        cure: What would raise the budget, in words; ``{needed}`` and ``{missing}`` are filled in.
    """
    needed = floors_of(ladders)
    count = sum(ladder.uses for ladder in ladders)
    many = f"The {count} videos of this request need" if count > 1 else "The video needs"
    whose = "their" if count > 1 else "its"
    lowest = ", ".join(dict.fromkeys(_words(ladder) for ladder in ladders))
    hints = [*_fewer_videos(ladders, budget), *_less_of_one(ladders, budget, costs)]
    if cure:
        hints.append(cure.format(needed=needed, missing=needed - budget))
    return OverBudgetError(
        f"{many} {needed} tokens at {whose} lowest quality ({lowest}), but {reason} leaves "
        f"{budget}. What would fit: {' or '.join(hints)}.",
        parameter="video_url",
        value=needed,
    )


def _steps(target: Target, family: Family) -> list[Step]:
    multiple = family.frame_multiple
    sparse = max(target.floor_frames, min(target.frames, target.sparse_frames))
    steps = [Step(target.frames, target.cap, target.reduction)]
    # Where frames share a pixel budget fewer of them would be larger, so lowered plans keep the
    # size of the target.
    cap = target.pixels if family.resizable else 0
    steps += [
        Step(frames, cap, target.reduction) for frames in _counts(target.frames, sparse, multiple)
    ]
    frames = steps[-1].frames
    if family.resizable:
        floor = min(target.pixels, target.floor_pixels)
        steps += [Step(frames, pixels, target.reduction) for pixels in _caps(target.pixels, floor)]
        cap = floor
    reduction = target.reduction
    for allowed in target.reductions if family.reducible else ():
        stronger = strongest(reduction, allowed)
        if family.trained is not None:
            stronger = family.trained.towards(reduction, stronger)
        if stronger != reduction:
            reduction = stronger
            steps.append(Step(frames, cap, reduction))
    steps += [
        Step(count, cap, reduction) for count in _counts(frames, target.floor_frames, multiple)
    ]
    return steps


def _counts(above: int, floor: int, multiple: int) -> list[int]:
    """Multiples of ``multiple`` below ``above``, descending to ``floor``."""
    lowest = max(math.ceil(floor / multiple) * multiple, multiple)
    highest = math.ceil(above / multiple) * multiple - multiple
    return list(range(highest, lowest - 1, -multiple))


def _caps(pixels: int, floor: int) -> list[int]:
    """Caps below ``pixels``, descending to ``floor``; squares, as a resolution option is."""
    highest = (math.isqrt(max(0, pixels - 1)) // _SIDE_STEP) * _SIDE_STEP
    squares = [side * side for side in range(highest, 0, -_SIDE_STEP) if side * side > floor]
    return [*squares, floor] if floor < pixels else []


def strongest(asked: Reduction, allowed: Reduction) -> Reduction:
    """Two reductions in one: in each respect the stronger of both.

    Static tokens are treated as ``asked`` says, where it says how.
    """
    static = asked.static if asked.static != "none" else allowed.static
    return Reduction(
        pool=max(asked.pool, allowed.pool),
        temporal=max(asked.temporal, allowed.temporal),
        static=static,
        keep=min(asked.keep, allowed.keep),
    )


def _words(ladder: Ladder) -> str:
    step = ladder.steps[-1]
    size = f" of at most {step.cap} pixels" if step.cap else ""
    return f"{step.frames} frame{'s' if step.frames != 1 else ''}{size}"


def _fewer_videos(ladders: Sequence[Ladder], budget: int) -> list[str]:
    used = fitting = 0
    floors = sorted(ladder.floor for ladder in ladders for _ in range(ladder.uses))
    for floor in floors:
        used += floor
        fitting += used <= budget
    return [f"{fitting} of the videos"] if 0 < fitting < len(floors) else []


def _less_of_one(ladders: Sequence[Ladder], budget: int, costs: TokenCosts) -> list[str]:
    """Hints that hold if every video had an equal part."""
    count = sum(ladder.uses for ladder in ladders)
    part = budget // count
    greediest = max(range(len(ladders)), key=lambda place: ladders[place].floor)
    ladder = ladders[greediest]
    lowest = ladder.steps[-1]

    def cost(frames: int) -> int:
        return costs.tokens(ladder.index, frames, lowest.cap, lowest.reduction)

    fewer = _largest(lowest.frames - 1, lambda frames: cost(frames) <= part)
    each = " each" if count > 1 else ""
    if fewer:
        return [f"at most {fewer} frames{each} (lower floor.frames, floor.fps or min_frames)"]
    return ["shorter videos" if each else "a shorter video"]


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` that fits, 0 if none does."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))
