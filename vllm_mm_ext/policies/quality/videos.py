"""The values that quality decisions take and give: what is known of a video, what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from vllm_mm_ext.config.options import Reduction, TrainedReductions

Reason = Literal["load", "total_tokens", "context", "limit"]


@dataclass(frozen=True)
class VideoSource:
    """A video of a request, as its container describes it.

    Attributes:
        digest: Digest of the encoded content.
        duration: Seconds.
        num_frames: Frames that the video has.
        width, height: Displayed size in pixels.
        uses: How often the request shows the video; all uses have one plan.
    """

    digest: str
    duration: float
    num_frames: int
    width: int
    height: int
    uses: int = 1


@dataclass(frozen=True)
class SamplingDefaults:
    """What a video gets if its request does not say.

    Attributes:
        fps: Frames per second.
        min_frames, max_frames: Bounds of the number of frames.
        reduction: How its tokens are made fewer.
        cap: Cap on the pixels of one frame, 0 for none.
    """

    fps: float
    min_frames: int
    max_frames: int
    reduction: Reduction
    cap: int = 0


@dataclass(frozen=True)
class Family:
    """What can be done to videos of the served model.

    Attributes:
        resizable: Frames may have different sizes.
        reducible: Tokens can be reduced.
        countable: Tokens can be counted in advance; otherwise videos are not fitted to budgets.
        frame_multiple: Frame counts are multiples of this (temporal patch size).
        max_item_tokens: Tokens that a segment of a video, or a video that is not cut, may have at
            most, as it must fit into vLLM's encoder cache; 0 for any number.
        trained: The reductions the model was trained for; None where any can be used.
    """

    resizable: bool
    reducible: bool
    countable: bool
    frame_multiple: int = 1
    max_item_tokens: int = 0
    trained: TrainedReductions | None = None


@dataclass(frozen=True)
class ContextUse:
    """The context of a request, in tokens.

    Attributes:
        length: The context length of the model.
        text: Tokens of everything that is not video.
        output: Tokens kept for the answer.
    """

    length: int
    text: int
    output: int

    @property
    def left(self) -> int:
        """Tokens left for videos."""
        return max(0, self.length - self.text - self.output)


class TokenCosts(Protocol):
    """How many tokens a request's videos would become; ``index`` is a video's place among them."""

    def tokens(self, index: int, frames: int, cap: int, reduction: Reduction) -> int:
        """Tokens of one use of the video.

        Fewer frames, a lower cap or a stronger reduction never cost more.
        """


class VideoCosts(TokenCosts, Protocol):
    """What a request's videos would become; ``tokens`` are those of the prompt, with sound."""

    def frames(self, index: int, fps: float, min_frames: int, max_frames: int) -> int:
        """Frames that sampling would deliver."""

    def pixels(self, index: int, frames: int, cap: int) -> int:
        """Pixels of one delivered frame if none may have more than ``cap`` (0: no cap)."""

    def item_tokens(
        self, index: int, frames: int, cap: int, reduction: Reduction, fps: float
    ) -> int:
        """Most tokens of a segment of the video, or of the video if it is not cut.

        ``fps`` is the rate asked for, of which the number of frames may leave less.
        """


@dataclass(frozen=True)
class ItemCosts:
    """The ``TokenCosts`` whose tokens are those of the largest segment.

    Attributes:
        costs: What the videos would become.
        rates: Frames per second asked for, of each video.
    """

    costs: VideoCosts
    rates: Sequence[float]

    def tokens(self, index: int, frames: int, cap: int, reduction: Reduction) -> int:
        """As ``VideoCosts.item_tokens``."""
        return self.costs.item_tokens(index, frames, cap, reduction, self.rates[index])


class Lowered(NamedTuple):
    """Something that is lower than asked, and why.

    Attributes:
        what: ``frames``, ``resolution`` or ``reduction``.
        wanted, given: The value before and after, in words.
        why: ``load``; or the budget that the videos had to fit: the request's ``total_tokens``,
            the ``context``, or a ``limit`` of the server.
    """

    what: Literal["frames", "resolution", "reduction"]
    wanted: str
    given: str
    why: Reason


@dataclass(frozen=True)
class VideoDecision:
    """How a video is to be sampled, sized and reduced.

    Attributes:
        level: Load tier, 0 for as asked.
        fps, min_frames, max_frames: For the sampling of the video.
        frame_pixels: Cap on the pixels of one frame, 0 for none.
        reduction: How the tokens of the video are made fewer.
        frames: Frames expected.
        tokens: Prompt tokens expected of each use; None where they cannot be counted.
        lowered: What is lower than asked.
    """

    level: int
    fps: float
    min_frames: int
    max_frames: int
    frame_pixels: int
    reduction: Reduction
    frames: int
    tokens: int | None
    lowered: tuple[Lowered, ...] = ()
