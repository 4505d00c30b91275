"""What a request may ask of its videos (the ``mm_ext`` block), as plain validated values.

The HTTP routes read these options from requests, planning decides by them, and the processors lay
tokens out by the reduction among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_mm_ext.config.long_video_settings import LongVideoOptions


class Options(BaseModel):
    """Base of everything a client may send: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reduction(Options):
    """How a video's tokens are made fewer; the count follows from the grid alone.

    The steps apply in the order of the fields, to the grid of tokens after the model's own patch
    merging, ``[grids, height, width]``.
    """

    pool: int = Field(
        1, ge=1, le=8, description="Spatial pooling: each `pool` x `pool` tokens become one."
    )
    temporal: int = Field(
        1,
        ge=1,
        le=8,
        description="Temporal merging: each `temporal` neighbouring grids become one.",
    )
    static: Literal["none", "merge", "prune"] = Field(
        "none",
        description="What happens to the tokens that change least over time: `merge` averages each "
        "into the token before it at its place, where its segment has one, `prune` drops them.",
    )
    keep: float = Field(
        1.0, gt=0, le=1, description="`static`: share of a segment's tokens that is kept."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Reduction:
        if (self.static == "none") != (self.keep == 1.0):
            raise ValueError(
                f"static ({self.static!r}) and keep ({self.keep}) go together: "
                "a share below 1 needs 'merge' or 'prune', and those need a share below 1"
            )
        return self

    @property
    def is_identity(self) -> bool:
        """Nothing is reduced."""
        return self.pool == 1 and self.temporal == 1 and self.static == "none"

    def grid(self, grids: int, height: int, width: int) -> tuple[int, int, int]:
        """Size of the token grid after pooling and temporal merging; partial cells count."""
        return (
            math.ceil(grids / self.temporal),
            math.ceil(height / self.pool),
            math.ceil(width / self.pool),
        )

    def count(self, grids: int, height: int, width: int) -> int:
        """Tokens left of ``grids`` x ``height`` x ``width`` tokens, at least one of any."""
        return self.kept(math.prod(self.grid(grids, height, width)))

    def kept(self, cells: int) -> int:
        """Cells that stay of ``cells`` pooled and merged ones, at least one of any."""
        return cells if self.static == "none" else math.ceil(cells * self.keep)

    def key(self) -> str:
        """Text that differs whenever the outcome could."""
        return f"pool={self.pool},temporal={self.temporal},{self.static}={self.keep!r}"


NO_REDUCTION = Reduction()


@dataclass(frozen=True)
class TrainedReductions:
    """The reductions of a model that learned them, where others give it tokens it never saw.

    Attributes:
        pairs: ``(pool, temporal)`` of each; (1, 1) is among them. Merging or pruning of static
            tokens needs no training, but tokens that lie in a grid, which only (1, 1) leaves.
    """

    pairs: tuple[tuple[int, int], ...]

    def allow(self, reduction: Reduction) -> bool:
        """Whether the model takes what a reduction leaves."""
        pair = (reduction.pool, reduction.temporal)
        return pair in self.pairs and (reduction.static == "none" or pair == (1, 1))

    def towards(self, reduction: Reduction, bound: Reduction) -> Reduction:
        """The strongest of these that is at least ``reduction`` and in no respect past ``bound``.

        Static tokens are merged or pruned only where ``reduction`` does it.
        """
        pools = range(reduction.pool, bound.pool + 1)
        temporals = range(reduction.temporal, bound.temporal + 1)
        fitting = [pair for pair in self.pairs if pair[0] in pools and pair[1] in temporals]
        if reduction.static != "none" or not fitting:
            return reduction
        pool, temporal = max(fitting, key=lambda pair: pair[0] ** 2 * pair[1])
        return Reduction(pool=pool, temporal=temporal)

    def __str__(self) -> str:
        return "; ".join(f"pool {pool}, temporal {temporal}" for pool, temporal in self.pairs)


class Floor(Options):
    """What a video is never lowered below, by a budget or under load."""

    fps: float | None = Field(
        None, gt=0, le=60, description="Frames per second; null: the server's floor."
    )
    frames: int | None = Field(None, ge=1, le=4096, description="Frames; null: the server's floor.")
    resolution: int | None = Field(
        None,
        ge=28,
        le=8192,
        description="A frame keeps this many pixels squared, where the source and the request "
        "have them; null: the server's floor.",
    )


class RequestOptions(Options):
    """The `mm_ext` block of a request. What is left out, or null, is as configured."""

    fps: float | None = Field(
        None, gt=0, le=60, description="Frames per second of each video, before the limits apply."
    )
    min_frames: int | None = Field(
        None, ge=1, le=4096, description="Frames of each video at least, where it has that many."
    )
    max_frames: int | None = Field(None, ge=1, le=4096, description="Frames of each video at most.")
    video_stream: int | None = Field(
        None,
        ge=0,
        le=999,
        description="Which of each file's video streams, counted from 0 (ffmpeg's `0:v:N`); null: "
        "the one that players show.",
    )
    total_tokens: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="Prompt tokens all videos of the request may take together. Their frames, "
        "resolution and token reduction are lowered to fit, down to the floors.",
    )
    resolution: int | None = Field(
        None, ge=28, le=8192, description="A frame has at most this many pixels squared."
    )
    quality: Literal["auto", "fixed"] = Field(
        "auto",
        description="`auto`: resolution and frame rate follow the server's load. `fixed`: they do "
        "not; a budget still applies.",
    )
    audio_stream: int | None = Field(
        None,
        ge=0,
        le=999,
        description="Which of each file's audio streams, counted from 0 (ffmpeg's `0:a:N`); null: "
        "the one that players play.",
    )
    reduction: Reduction | None = Field(
        None,
        description="Token reduction, in place of the default; `{}`: none, null: the default.",
    )
    floor: Floor = Field(default_factory=Floor, description="Lower limits of what is asked.")
    long_video: LongVideoOptions | None = Field(
        None,
        description="Answers from all of a long video, window by window; `{}`: as configured, "
        "null: the server's default.",
    )
    key: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="What routers send the request by ([fleet.md](fleet.md)), any name; null: its "
        "first medium. It changes no answer. All routes take it but `/v1/decisions` and the forms "
        "of `/v1/audio/*`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if v is not None or k not in cls.model_fields}

    @model_validator(mode="after")
    def _ordered(self) -> RequestOptions:
        pairs = (
            ("min_frames", self.min_frames, "max_frames", self.max_frames),
            ("floor.frames", self.floor.frames, "max_frames", self.max_frames),
            ("floor.fps", self.floor.fps, "fps", self.fps),
            ("floor.resolution", self.floor.resolution, "resolution", self.resolution),
        )
        for low_name, low, high_name, high in pairs:
            if low is not None and high is not None and low > high:
                raise ValueError(f"{low_name} ({low}) must not exceed {high_name} ({high})")
        return self


DEFAULT_OPTIONS = RequestOptions()
