"""Which single change makes a plan fit, and how far it must go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.planner.delivery import Delivery
from vllm_mm_ext.planner.gpu_facts import Site
from vllm_mm_ext.planner.plan import CONTEXT_UNIT, Plan

# Sides in pixels of the square frames that are tried, from the largest.
_SIDES = (896, 672, 560, 448, 392, 336, 280, 224, 168, 112)
_TPS = (2, 4, 8)

T = TypeVar("T")


class Replan(Protocol):
    """Plans the same requests anew."""

    def __call__(
        self, site: Site, delivery: Delivery, context: int | None, *, concurrency: int
    ) -> Plan:
        """The plan with another site, delivery, context (None: as needed) or concurrency."""


@dataclass(frozen=True)
class Lever:
    """A change that makes a plan fit.

    Attributes:
        name: What is changed.
        setting: The option of ``vllm-mm plan`` that changes it.
        before, after: The value.
        plan: The plan with it.
    """

    name: str
    setting: str
    before: str
    after: str
    plan: Plan


def levers(plan: Plan, replan: Replan, reductions: Sequence[Reduction]) -> tuple[Lever, ...]:
    """The changes that make a plan fit, each by itself and as small as it can be.

    Args:
        plan: A plan that does not fit.
        replan: Plans the same requests with one thing changed.
        reductions: Token reductions to try, gentle ones first.

    Returns:
        Empty where no single change is enough.
    """
    tried = (
        _context(plan, replan),
        _frames(plan, replan),
        _resolution(plan, replan),
        _reduction(plan, replan, reductions),
        _tp(plan, replan),
        _concurrency(plan, replan),
    )
    return tuple(lever for lever in tried if lever is not None)


def _changed(
    plan: Plan, replan: Replan, *, site: Site | None = None, delivery: Delivery | None = None
) -> Plan:
    """The plan with another site or delivery, and the context that the user asked for."""
    return replan(
        site or plan.site,
        delivery or plan.delivery,
        plan.context_asked,
        concurrency=plan.workload.concurrency,
    )


def _context(plan: Plan, replan: Replan) -> Lever | None:
    """A longer context if videos need it, or a shorter one that the KV cache holds."""

    def with_context(context: int | None) -> Plan:
        concurrency = plan.workload.concurrency
        return replan(plan.site, plan.delivery, context, concurrency=concurrency)

    if plan.context_asked is None:
        return None
    if plan.context_needed > plan.context:
        needed = with_context(None)
        best = needed if needed.fits else None
    else:
        least = -(-plan.context_needed // CONTEXT_UNIT)
        most = (plan.context - 1) // CONTEXT_UNIT
        best = _largest(least, most, lambda units: with_context(units * CONTEXT_UNIT))
    if best is None:
        return None
    return Lever(
        "context",
        f"--context {best.context}",
        f"{plan.context:,} tokens",
        f"{best.context:,} tokens",
        best,
    )


def _concurrency(plan: Plan, replan: Replan) -> Lever | None:
    now = plan.workload.concurrency

    def with_concurrency(count: int) -> Plan:
        return replan(plan.site, plan.delivery, plan.context_asked, concurrency=count)

    best = _largest(1, now - 1, with_concurrency)
    if best is None:
        return None
    fewer = best.workload.concurrency
    return Lever("concurrency", f"--concurrency {fewer}", str(now), str(fewer), best)


def _largest(low: int, high: int, planned: Callable[[int], Plan]) -> Plan | None:
    """The plan that fits with the largest value from ``low`` to ``high``; None if none does."""
    best = None
    while low <= high:
        middle = (low + high) // 2
        other = planned(middle)
        if other.fits:
            best, low = other, middle + 1
        else:
            high = middle - 1
    return best


def _frames(plan: Plan, replan: Replan) -> Lever | None:
    if not plan.workload.videos:
        return None
    unit, most = plan.server.frame_multiple, plan.delivery.max_frames

    def with_frames(units: int) -> Plan:
        frames = units * unit
        delivery = replace(
            plan.delivery,
            max_frames=frames,
            min_frames=min(plan.delivery.min_frames, frames),
        )
        return _changed(plan, replan, delivery=delivery)

    best = _largest(1, (most - 1) // unit, with_frames)
    if best is None:
        return None
    frames = best.delivery.max_frames
    return Lever("frames", f"--max-frames {frames}", f"{most} a video", f"{frames} a video", best)


def _resolution(plan: Plan, replan: Replan) -> Lever | None:
    sizes = [m.size for m in plan.request.media if m.kind == "video"]
    if not plan.server.resizable or not sizes:
        return None
    pixels = max(width * height for width, height in sizes)
    tried = (
        (_changed(plan, replan, delivery=replace(plan.delivery, frame_pixels=side**2)), side)
        for side in _SIDES
        if side**2 < pixels
    )
    best = _first_fitting(tried)
    if best is None:
        return None
    other, side = best
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    now = max((m.size for m in other.request.media if m.kind == "video"), default=(0, 0))
    return Lever(
        "resolution",
        f"--resolution {side}",
        f"frames of {width}x{height}",
        f"frames of {now[0]}x{now[1]}",
        other,
    )


def _reduction(plan: Plan, replan: Replan, reductions: Sequence[Reduction]) -> Lever | None:
    if not plan.workload.videos:
        return None
    best = _first_fitting(_reduced(plan, replan, reductions))
    if best is None:
        return None
    other, reduction = best
    return Lever(
        "reduction",
        f"--reduction {words_of(reduction)}",
        words_of(plan.delivery.reduction),
        words_of(reduction),
        other,
    )


def _reduced(
    plan: Plan, replan: Replan, reductions: Iterable[Reduction]
) -> Iterator[tuple[Plan, Reduction]]:
    for reduction in reductions:
        try:
            delivery = replace(plan.delivery, reduction=reduction)
            yield _changed(plan, replan, delivery=delivery), reduction
        except MediaError:
            # The model was not trained for it.
            continue


def _tp(plan: Plan, replan: Replan) -> Lever | None:
    if plan.site.gpu.is_cpu:
        return None
    tried = (
        (_changed(plan, replan, site=replace(plan.site, tp=tp)), tp)
        for tp in _TPS
        if tp > plan.site.tp and not plan.facts.undivided(tp, plan.site.dp)
    )
    best = _first_fitting(tried)
    if best is None:
        return None
    other, tp = best
    return Lever("tp", f"--tp {tp}", f"{plan.site.tp} GPU a replica", f"{tp} GPUs a replica", other)


def _first_fitting(tried: Iterable[tuple[Plan, T]]) -> tuple[Plan, T] | None:
    return next((pair for pair in tried if pair[0].fits), None)


def words_of(reduction: Reduction) -> str:
    """A reduction as ``vllm-mm plan --reduction`` takes it."""
    words = []
    if reduction.pool > 1:
        words.append(f"pool={reduction.pool}")
    if reduction.temporal > 1:
        words.append(f"temporal={reduction.temporal}")
    if reduction.static != "none":
        words += [f"static={reduction.static}", f"keep={reduction.keep:g}"]
    return ",".join(words) or "none"
