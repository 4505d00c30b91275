"""The media of a conversation, one record per item: what it is, how it is made, what was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.video_plan import VideoPlan

MediaModality = Literal["video", "audio"]


@dataclass(frozen=True)
class VideoReport:
    """A video as the model gets it.

    Attributes:
        policy: How its frames were chosen.
        frames: Number of frames.
        height, width: Size of a frame in pixels.
        times: Presentation times of the frames in seconds.
        cached: Nothing was decoded for this request.
        audio_s: Seconds of sound that come with the frames; None without sound.
        duration_s: Duration of the source in seconds; None where it is not known.
        reduction: How the video's tokens are made fewer.
    """

    policy: str
    frames: int
    height: int
    width: int
    times: Sequence[float]
    cached: bool
    audio_s: float | None
    duration_s: float | None = None
    reduction: Reduction = NO_REDUCTION


@dataclass(frozen=True)
class AudioReport:
    """An audio item as the model gets it.

    Attributes:
        seconds: Its duration.
        cached: Nothing was decoded for this request.
    """

    seconds: float
    cached: bool


@dataclass(frozen=True)
class PlanReport:
    """What was decided about a video before it was decoded.

    Attributes:
        level: Load level it is served at; 0 is full quality.
        lowered: What the video does not get of what was asked: ``what``, ``wanted``, ``given``,
            ``why``.
    """

    level: int = 0
    lowered: tuple[Mapping[str, str], ...] = ()


@dataclass(eq=False)
class MediaItem:
    """One video or audio of a conversation. Two items may name the same URL.

    Attributes:
        modality: What it is.
        url: As the request spells it.
        plan: What the model gets of a video. None leaves the video to vLLM's own loader; audio has
            no plan.
        content: The media behind ``url``, where planning resolved it: what was planned is what is
            decoded. Its bytes are let go when they have been used; the item may live as long as
            the answer.
        decision: What planning decided about it.
        report: What was delivered to vLLM; None until then.
        claimed: vLLM asked for this item.
    """

    modality: MediaModality
    url: str
    plan: VideoPlan | None = None
    content: MediaRef | None = None
    decision: PlanReport = PlanReport()
    report: VideoReport | AudioReport | None = None
    claimed: bool = False
