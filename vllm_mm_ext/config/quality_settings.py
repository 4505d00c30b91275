"""Settings of budgets and load tiers, the section ``mm_ext.quality`` of the configuration."""

from __future__ import annotations

from itertools import pairwise

from pydantic import Field, model_validator

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.section import Section


class TierSettings(Section):
    """When quality steps down under load, and by how much.

    Tier 0 is what a request asks for. Tier `i` begins where any of the four signals reaches the
    `i`-th value of its list. The signals are means over the engines of a service.
    """

    kv: tuple[float, ...] = Field(
        (0.8, 0.9), description="Share of KV blocks in use at which tiers 1, 2... begin."
    )
    batch: tuple[float, ...] = Field(
        (32, 64), description="Running and waiting requests at which tiers 1, 2... begin."
    )
    load: tuple[float, ...] = Field(
        (0.6, 0.8),
        description="Running and waiting requests, as a share of `--max-num-seqs`, at which tiers "
        "1, 2... begin.",
    )
    backlog_s: tuple[float, ...] = Field(
        (4.0, 12.0),
        description="Seconds of encoder work that wait at which tiers 1, 2... begin; known with "
        "the plugin's scheduler.",
    )
    resolution: tuple[int, ...] = Field(
        (448, 336, 224),
        description="Frame sizes of tiers 0, 1, 2... relative to the first: with the default, tier "
        "1 has 336/448 of the width and height that tier 0 has, whatever that is.",
    )
    frame_rate: tuple[float, ...] = Field(
        (1.0, 0.75, 0.5), description="Frame rates of tiers 0, 1, 2... relative to tier 0."
    )
    margin: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="A tier is left when all signals are below its values less this share of them.",
    )
    hold_s: float = Field(
        10.0, ge=0, le=3600, description="Seconds they must stay there, for each tier down."
    )
    stale_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds without news from an engine after which it counts as idle; it must be "
        "longer than an engine step.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TierSettings:
        for name in ("kv", "batch", "load", "backlog_s"):
            values = getattr(self, name)
            if any(value <= 0 for value in values) or any(a >= b for a, b in pairwise(values)):
                raise ValueError(f"{name} {list(values)} must be above 0 and ascend")
            if len(values) != self.levels - 1:
                raise ValueError(
                    f"{name} has {len(values)} values; resolution has {self.levels} tiers, "
                    f"so it needs {self.levels - 1}"
                )
        if len(self.frame_rate) != self.levels:
            raise ValueError(
                f"frame_rate has {len(self.frame_rate)} values, resolution {self.levels}; "
                "both have one for each tier"
            )
        for name in ("resolution", "frame_rate"):
            values = getattr(self, name)
            if not values or values[-1] <= 0 or any(a < b for a, b in pairwise(values)):
                raise ValueError(f"{name} {list(values)} must be above 0 and never rise")
        if self.frame_rate[0] != 1.0:
            raise ValueError(f"frame_rate begins with 1.0 (as asked), got {self.frame_rate[0]}")
        return self

    @property
    def levels(self) -> int:
        """Number of tiers, tier 0 included."""
        return len(self.resolution)


class StickySettings(Section):
    """How long a video keeps the tier it was first given, and within a session its tokens.

    A request that names no session, or another one, takes over the tier of the video; its tokens
    are granted by what else is in the request.
    """

    enabled: bool = Field(
        True, description="False: every request is decided anew, and caches hit less often."
    )
    ttl_s: float = Field(
        1800.0,
        gt=0,
        le=7 * 86400,
        description="Seconds after its last use for which a decision holds.",
    )


# Gentle reductions first. Tokens that do not change from frame to frame tell the model least,
# motion between temporal patches that follow each other tells it more, detail inside a frame most.
_REDUCTIONS = (
    Reduction(static="merge", keep=0.75),
    Reduction(static="merge", keep=0.5),
    Reduction(temporal=2, static="merge", keep=0.5),
    Reduction(pool=2, temporal=2, static="merge", keep=0.5),
)


class BudgetSettings(Section):
    """How videos are made to fit, and what they are never lowered below.

    In this order: frames down to a sparse but even coverage, resolution down to its floor, token
    reduction as far as `reductions` goes, frames down to their floor. Of several videos small ones
    get what they want first. What does not fit then is a 400 that says what would.
    """

    context_share: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of the context that the videos of a request may take when they are "
        "first sent. The rest is for what follows in the conversation; within a session, "
        "videos keep their tokens as long as the context holds them.",
    )
    answer_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the context kept for the answer of a request that sets no limit.",
    )
    sparse_fps: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Frames are thinned out to this rate (or to `sparse_frames`, if those are "
        "fewer) before resolution is touched.",
    )
    sparse_frames: int = Field(
        64, ge=1, le=4096, description="As many frames are enough before resolution is touched."
    )
    floor_frames: int = Field(
        4, ge=1, le=4096, description="Frames a video keeps, where it has and was asked that many."
    )
    floor_resolution: int = Field(
        224,
        ge=28,
        le=8192,
        description="A frame keeps this many pixels squared, where it has and was asked that many.",
    )
    reductions: tuple[Reduction, ...] = Field(
        _REDUCTIONS,
        max_length=16,
        description="Token reductions that fitting may use, each at least as strong in every "
        "respect as the one before; empty: none.",
    )

    @model_validator(mode="after")
    def _ascending(self) -> BudgetSettings:
        for weaker, stronger in pairwise(self.reductions):
            if not _at_least(stronger, weaker):
                raise ValueError(
                    f"reductions: {stronger.key()} is not at least as strong as "
                    f"{weaker.key()} before it"
                )
        return self


def _at_least(stronger: Reduction, weaker: Reduction) -> bool:
    return (
        stronger.pool >= weaker.pool
        and stronger.temporal >= weaker.temporal
        and stronger.keep <= weaker.keep
    )


class BoundSettings(Section):
    """What requests may ask for; more is a 400."""

    max_fps: float = Field(8.0, gt=0, le=60, description="Frames per second.")
    max_frames: int = Field(768, ge=1, le=4096, description="Frames of one video.")
    max_total_tokens: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="Tokens of all videos of a request, which are fitted to it; 0: what the "
        "context holds.",
    )
    min_resolution: int = Field(28, ge=28, le=8192, description="Lowest `resolution`.")
    max_resolution: int = Field(2048, ge=28, le=8192, description="Highest `resolution`.")

    @model_validator(mode="after")
    def _ordered(self) -> BoundSettings:
        if self.min_resolution > self.max_resolution:
            raise ValueError(
                f"min_resolution ({self.min_resolution}) must not exceed "
                f"max_resolution ({self.max_resolution})"
            )
        return self


class QualitySettings(Section):
    """Budgets per request, and quality that follows the load of the service.

    Load is known from the plugin's scheduler, or else from vLLM's engine statistics: with
    `--disable-log-stats` and several API servers there are none, and quality does not follow it.
    """

    enabled: bool = Field(
        True, description="Quality follows load. False: tier 0 always; budgets still apply."
    )
    tiers: TierSettings = Field(default_factory=TierSettings)
    sticky: StickySettings = Field(default_factory=StickySettings)
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    bounds: BoundSettings = Field(default_factory=BoundSettings)
