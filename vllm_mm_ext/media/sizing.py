"""Output size of frames: the size to which the model's own video processor would resize them.

Frames that leave the decoder at that size pass the processor's resize unchanged.
"""

from __future__ import annotations

import math

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.types import MediaInfo, SizeRule

# Both Qwen processors refuse frames whose longer side is more than this many times the shorter one
# (transformers, ``smart_resize``).
_MAX_ASPECT = 200
# A frame's share of the pixels of the whole video is at least this many times ``min_pixels``
# (transformers, ``Qwen2VLVideoProcessor.resize``).
_SHARE_FLOOR = 1.05


def target_size(rule: SizeRule, *, width: int, height: int, num_frames: int) -> tuple[int, int]:
    """Size at which frames should leave the decoder.

    Args:
        rule: See ``SizeRule``. The kind ``qwen_vl`` follows ``Qwen2VLVideoProcessor.resize`` of
            transformers; with ``total_pixels`` = ``int(max_video_tokens * factor**2 * 0.9)`` it
            follows that method with ``cap_pixels_per_frame``. The kind ``qwen3_vl`` follows
            ``Qwen3VLVideoProcessor.resize``.
        width, height: Displayed size of the source in pixels.
        num_frames: Number of frames that the decode will return.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        MediaError: The rule's model family does not accept the aspect ratio.
    """
    fitted = _by_kind(rule, width, height, num_frames)
    if rule.kind == "fixed" or not 0 < rule.max_frame_pixels < fitted[0] * fitted[1]:
        return fitted
    factor = rule.factor if rule.kind in ("qwen_vl", "qwen3_vl") else 1
    return _capped(rule.max_frame_pixels, factor, width, height)


def is_pinned(rule: SizeRule, info: MediaInfo, shape: tuple[int, ...]) -> bool:
    """Whether frames have the size that a rule gives to as many of them.

    Args:
        rule: The rule; ``native`` pins no size.
        info: What the container says of their video.
        shape: ``(n, height, width, 3)``.
    """
    if rule.kind == "native" or info.video is None:
        return False
    video = info.video
    size = target_size(rule, width=video.width, height=video.height, num_frames=shape[0])
    return shape[1:3] == size


def _by_kind(rule: SizeRule, width: int, height: int, num_frames: int) -> tuple[int, int]:
    if rule.kind == "native":
        return height, width
    if rule.kind == "fixed":
        return rule.height, rule.width
    if rule.kind == "max_edge":
        return _max_edge(rule.max_edge, width, height)
    if rule.kind == "qwen_vl":
        return _qwen_vl(rule, width, height, max(1, num_frames))
    return _qwen3_vl(rule, width, height, max(rule.temporal_factor, num_frames))


def _capped(most: int, factor: int, width: int, height: int) -> tuple[int, int]:
    """``(height, width)`` of at most ``most`` pixels, at about the source's aspect ratio.

    Both sides are multiples of ``factor``.
    """
    beta = math.sqrt(height * width / most)
    short = max(factor, math.floor(min(height, width) / beta / factor) * factor)
    # If the short side was raised to one factor, the long side gives up the pixels for that.
    long = min(max(height, width) / beta, most / short)
    long = max(factor, math.floor(long / factor) * factor)
    return (long, short) if height > width else (short, long)


def _max_edge(edge: int, width: int, height: int) -> tuple[int, int]:
    longest = max(width, height)
    if longest <= edge:
        return height, width
    return max(1, round(height * edge / longest)), max(1, round(width * edge / longest))


def _qwen_vl(rule: SizeRule, width: int, height: int, num_frames: int) -> tuple[int, int]:
    max_pixels = rule.max_pixels
    if rule.total_pixels:
        share = rule.total_pixels * rule.temporal_factor // num_frames
        max_pixels = max(min(max_pixels, share), int(rule.min_pixels * _SHARE_FLOOR))
    _check_aspect(width, height)
    return _fit(rule, width, height, frames=1, counted_frames=1, max_pixels=max_pixels)


def _qwen3_vl(rule: SizeRule, width: int, height: int, num_frames: int) -> tuple[int, int]:
    factor = rule.factor
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(width, height)
    counted = round(num_frames / rule.temporal_factor) * rule.temporal_factor
    return _fit(
        rule, width, height, frames=num_frames, counted_frames=counted, max_pixels=rule.max_pixels
    )


def _fit(
    rule: SizeRule, width: int, height: int, *, frames: int, counted_frames: int, max_pixels: int
) -> tuple[int, int]:
    """Nearest multiples of ``factor`` whose pixels over the frames are within the budget.

    Qwen3-VL checks the budget with the frame count rounded to the temporal patch
    (``counted_frames``), but scales by the true frame count (``frames``).
    """
    factor = rule.factor
    fitted_height = round(height / factor) * factor
    fitted_width = round(width / factor) * factor
    pixels = counted_frames * fitted_height * fitted_width
    if pixels > max_pixels:
        beta = math.sqrt((frames * height * width) / max_pixels)
        fitted_height = max(factor, math.floor(height / beta / factor) * factor)
        fitted_width = max(factor, math.floor(width / beta / factor) * factor)
    elif pixels < rule.min_pixels:
        beta = math.sqrt(rule.min_pixels / (frames * height * width))
        fitted_height = math.ceil(height * beta / factor) * factor
        fitted_width = math.ceil(width * beta / factor) * factor
    return fitted_height, fitted_width


def _check_aspect(width: int, height: int) -> None:
    aspect = max(width, height) / max(1, min(width, height))
    if aspect > _MAX_ASPECT:
        raise MediaError(
            f"The video is {width}x{height}: an aspect ratio of {aspect:.0f}:1, "
            f"past the limit of {_MAX_ASPECT}:1.",
            parameter="video_url",
            value=f"{width}x{height}",
        )
