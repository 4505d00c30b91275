"""The tokens that the videos of a request share, and how they are divided among them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mm_ext.config.options import RequestOptions
from vllm_mm_ext.config.quality_settings import BoundSettings
from vllm_mm_ext.policies.quality.fit import Ladder, floors_of, share
from vllm_mm_ext.policies.quality.videos import ContextUse, Reason


@dataclass(frozen=True)
class Limit:
    """Tokens that the videos of a request may have at most.

    Attributes:
        tokens: How many.
        why: What sets the limit, as reported to the client.
        words: The same for error messages.
        cure: What would raise the limit, for error messages (see ``fit.over_budget``).
    """

    tokens: int
    why: Reason
    words: str
    cure: str = ""


def limit_of(options: RequestOptions, context: ContextUse, bounds: BoundSettings) -> Limit:
    """The lowest of the limits that a request has.

    Args:
        options: What the request asks.
        context: The context and what else is in it.
        bounds: What this server allows.
    """
    limits = [
        Limit(
            context.left,
            "context",
            f"the context of {context.length} tokens with {context.text} of text and "
            f"{context.output} kept for the answer",
            "{missing} tokens less of text or kept for the answer (lower max_tokens)",
        )
    ]
    if (asked := options.total_tokens) is not None:
        cure = "total_tokens of at least {needed}"
        limits.append(Limit(asked, "total_tokens", "total_tokens", cure))
    if bound := bounds.max_total_tokens:
        limits.append(Limit(bound, "limit", "this server's limit"))
    return min(limits, key=lambda limit: limit.tokens)


def grants(ladders: Sequence[Ladder], earlier: Sequence[int], first: int, limit: int) -> list[int]:
    """Divide tokens among videos; what a video was granted before stays while it can.

    So the plan of that video, and with it every cache entry, stays the same. Other videos share
    what a first request may take or, if their floors need more, all that is left. Where earlier
    grants leave too little for that, all videos share anew.

    Args:
        ladders: Plans of the videos; the floors of all fit into ``limit`` together.
        earlier: Tokens that each use of each video was granted before, 0 for none.
        first: Tokens that the videos may take when they are first sent.
        limit: Tokens that they may take at most.

    Returns:
        Tokens for each use of each video, at least its floor; all uses take at most ``limit``.
    """
    first = min(first, limit)
    # A floor may be higher than it was at the earlier grant, and no plan is below it.
    kept = [
        max(ladder.floor, tokens) if tokens else 0
        for ladder, tokens in zip(ladders, earlier, strict=True)
    ]
    taken = sum(ladder.uses * tokens for ladder, tokens in zip(ladders, kept, strict=True))
    new = [ladder for ladder, tokens in zip(ladders, kept, strict=True) if not tokens]
    for budget in (first - taken, limit - taken):
        if floors_of(new) <= budget:
            shares = iter(_shares(new, budget))
            return [tokens or next(shares) for tokens in kept]
    return _shares(ladders, first if floors_of(ladders) <= first else limit)


def _shares(ladders: Sequence[Ladder], budget: int) -> list[int]:
    return share(
        [ladder.demand for ladder in ladders],
        [ladder.floor for ladder in ladders],
        [ladder.uses for ladder in ladders],
        budget,
    )
