"""What a server's settings say of every decode job: its limits, and how pictures are shown."""

from __future__ import annotations

from vllm_mm_ext.config.media_settings import MediaConfig
from vllm_mm_ext.config.root import MIB
from vllm_mm_ext.media.types import DecodeLimits, PictureRules

# What settings and requests are allowed to ask for; the bytes of the result are bounded too.
_MAX_FRAMES = 4096


def decode_limits(
    config: MediaConfig, *, max_pixels: int, max_audio_s: float, max_audio_bytes: int
) -> DecodeLimits:
    """The limits on a job.

    Args:
        config: The ``media`` section of the plugin's configuration.
        max_pixels, max_audio_s, max_audio_bytes: vLLM's own limits; see ``MediaFrontend``.
    """
    decode, sound = config.decode, config.audio
    return DecodeLimits(
        timeout_s=decode.timeout_s,
        memory_bytes=decode.worker_memory_mb * MIB,
        max_pixels=min(decode.max_pixels, max_pixels if max_pixels > 0 else decode.max_pixels),
        max_frames=_MAX_FRAMES,
        max_output_bytes=decode.max_output_mb * MIB,
        max_duration_s=decode.max_duration_s,
        max_audio_s=min(sound.max_duration_s or max_audio_s, max_audio_s),
        max_audio_bytes=max_audio_bytes,
        truncate_audio=sound.overflow == "truncate",
    )


def picture_rules(config: MediaConfig) -> PictureRules:
    """How pictures are shown.

    Args:
        config: As of ``decode_limits``.
    """
    red, green, blue = bytes.fromhex(config.picture.background[1:])
    stretch = config.picture.pixel_aspect == "stretch"
    return PictureRules(stretch=stretch, background=(red, green, blue))
