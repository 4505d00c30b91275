"""One record for each media item of a conversation: its source, its plan, what was delivered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.types import AudioNote
from vllm_mm_ext.media.video_plan import VideoPlan

MediaModality = Literal["video", "audio"]


@dataclass(frozen=True)
class VideoReport:
    """A video as the model gets it.

    Attributes:
        policy: Name of the sampling policy.
        frames: Number of frames.
        height, width: Size of a frame in pixels.
        times: Presentation times of the frames in seconds.
        cached: The frames came from the cache: nothing was decoded for this request.
        audio_s: Seconds of sound that come with the frames; None without sound.
        duration_s: Duration of the source in seconds; None where it is not known.
        reduction: The token reduction.
        audio_note: What became of the sound, if the model does not hear all of it; else empty.
        activity: How much happens in the video, 0 to 1; None where the policy does not look.
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
    audio_note: AudioNote = ""
    activity: float | None = None


@dataclass(frozen=True)
class AudioReport:
    """An audio item as the model gets it.

    Attributes:
        seconds: Duration of the item.
        cached: The samples came from the cache: nothing was decoded for this request.
    """

    seconds: float
    cached: bool


@dataclass(eq=False)
class ImageItem:
    """An image of a request.

    Attributes:
        url: URL of the image, as the request spells it.
        digest: Hex BLAKE3 of the encoded image; empty until it is known, or where it never is.
        width, height: Pixels; 0 until the image is read.
    """

    url: str
    digest: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class PlanReport:
    """What was decided about a video before it was decoded.

    Attributes:
        level: Load tier at which the video is served; 0 is full quality.
        lowered: One entry for each thing of which the video gets less than was asked for, with the
            keys ``what``, ``wanted``, ``given`` and ``why``.
    """

    level: int = 0
    lowered: tuple[Mapping[str, str], ...] = ()


@dataclass(eq=False)
class MediaItem:
    """One video or audio of a conversation. Two items may name the same URL.

    Attributes:
        modality: Whether the item is a video or audio.
        url: URL of the item, as the request spells it.
        plan: What the model gets of a video. None leaves the video to vLLM's own loader; audio has
            no plan.
        content: The content behind ``url`` as planning resolved it, so that the connector decodes
            the very content that was planned for; None if planning did not resolve it. The encoded
            bytes are dropped after use, since the item may live as long as the answer.
        decision: What planning decided about the video.
        report: What was delivered to vLLM; None until it is.
        claimed: vLLM has asked for this item.
        digest: Hex BLAKE3 of the encoded file; empty until it is known, or where it never is.
        pictures: What becomes small pictures of the frames, where the operator's page shows them.
    """

    modality: MediaModality
    url: str
    plan: VideoPlan | None = None
    content: MediaRef | None = None
    decision: PlanReport = PlanReport()
    report: VideoReport | AudioReport | None = None
    claimed: bool = False
    digest: str = ""
    pictures: Future[list[bytes]] | None = None

    @property
    def known_digest(self) -> str:
        """Hex BLAKE3 of the encoded file; empty where it is not known."""
        return self.digest or ("" if self.content is None else self.content.digest)
