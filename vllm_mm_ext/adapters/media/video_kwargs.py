"""``media_io_kwargs.video`` as ``video_backend: mm_ext`` understands it, and what follows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vllm_mm_ext.config.media_settings import SamplingConfig
from vllm_mm_ext.config.schema import problems
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.types import SamplingSpec

KEY = "media_io_kwargs.video"


def _above_zero_or_all(value: float) -> float:
    if value != -1 and value <= 0:
        raise ValueError("must be above 0, or -1")
    return value


_OrAll = AfterValidator(_above_zero_or_all)
# Most frames of a video that a decode worker delivers.
_ALL_FRAMES = 4096

# What vLLM's own loaders are told about the library that decodes for them.
CODEC_KEYS = frozenset(
    {
        "backend",
        "device",
        "hw_decoders",
        "max_height",
        "max_width",
        "num_ffmpeg_threads",
        "pool_size",
        "seek_mode",
        "timeout_sec",
    }
)


class VideoOptionError(MediaError):
    """A key is unknown, or its value out of bounds."""

    code = "option"


class VideoKwargs(BaseModel):
    """The keys, each with the meaning it has for vLLM's loaders.

    Attributes:
        fps: Frames per second; -1 for the configured rate.
        num_frames: Frames of a video that has as many, whatever its length; -1 for all of them.
            With ``fps`` a ceiling, -1 for none. None for what is configured.
        max_frames: Ceiling on the frames of a video.
        min_frames: Floor on the frames of a video.
        max_duration: Seconds. A longer video gets no more frames than one of this length.
        frame_recovery: Whether frames that cannot be decoded are made up for. The plugin always
            does that.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    fps: Annotated[float, Field(le=60), _OrAll] = -1
    num_frames: Annotated[int, Field(le=_ALL_FRAMES), _OrAll] | None = None
    max_frames: int | None = Field(None, ge=1, le=_ALL_FRAMES)
    min_frames: int | None = Field(None, ge=1, le=_ALL_FRAMES)
    max_duration: float | None = Field(None, gt=0)
    frame_recovery: bool = False


def read_video_kwargs(kwargs: Mapping[str, Any]) -> VideoKwargs:
    """Check the keys. Those of vLLM's codecs are passed over: the plugin decodes by itself.

    Args:
        kwargs: ``media_io_kwargs.video`` without ``video_backend``.

    Raises:
        VideoOptionError: A key is unknown, or a value out of bounds; the message names them.
    """
    given = {key: value for key, value in kwargs.items() if key not in CODEC_KEYS}
    try:
        return VideoKwargs.model_validate(given)
    except ValidationError as error:
        found = problems(error, VideoKwargs, KEY)
        message = "; ".join(str(problem) for problem in found)
        raise VideoOptionError(message, parameter=found[0].key) from None


def sampling_for(config: SamplingConfig, kwargs: VideoKwargs) -> SamplingConfig:
    """The configured sampling, with what the keys say instead."""
    fps = config.fps if kwargs.fps == -1 else float(kwargs.fps)
    frames = _ALL_FRAMES if kwargs.num_frames == -1 else kwargs.num_frames
    asked = [count for count in (frames, kwargs.max_frames) if count is not None]
    ceiling = min(asked, default=config.max_frames)
    floor = config.min_frames if kwargs.min_frames is None else kwargs.min_frames
    if frames is not None and kwargs.fps == -1:
        floor = ceiling
    elif kwargs.max_duration is not None:
        ceiling = min(ceiling, max(1, int(kwargs.max_duration * fps)))
    return config.model_copy(
        update={"fps": fps, "max_frames": ceiling, "min_frames": min(floor, ceiling)}
    )


def spec_for(sampling: SamplingConfig, frame_multiple: int) -> SamplingSpec:
    """The sampling a decode worker is asked for.

    Args:
        sampling: Settings in force. For ``stock`` they do not count: its indices follow from the
            probe.
        frame_multiple: Frame counts are rounded down to this.
    """
    return SamplingSpec(
        policy="uniform" if sampling.policy == "stock" else sampling.policy,
        fps=sampling.fps,
        max_frames=sampling.max_frames,
        min_frames=sampling.min_frames,
        min_fps=sampling.min_fps,
        max_fps=sampling.max_fps,
        multiple_of=frame_multiple,
        video_stream=sampling.video_stream,
    )
