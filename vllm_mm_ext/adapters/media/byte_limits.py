"""How many encoded bytes one medium may have, how long it may take to come, by which setting."""

from __future__ import annotations

from vllm_mm_ext.config.media_settings import FetchConfig
from vllm_mm_ext.config.root import MIB
from vllm_mm_ext.media.fetch.blob import ByteLimit
from vllm_mm_ext.media.fetch.source import TimeLimit


def download_limit() -> ByteLimit | None:
    """Of a download, None for none."""
    from vllm import envs

    # As in vLLM, zero or less means no limit.
    size_mb = int(envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB)
    return ByteLimit(size_mb * MIB, "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB") if size_mb > 0 else None


def local_limit(config: FetchConfig) -> ByteLimit:
    """Of a local file, or of media within a request."""
    return ByteLimit(config.max_local_mb * MIB, "mm_ext.media.fetch.max_local_mb")


def audio_limit() -> ByteLimit:
    """Of an audio item, whatever its URL."""
    from vllm.multimodal.media.audio import AudioMediaIO

    return ByteLimit(AudioMediaIO().get_max_bytes(), "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB")


def video_timeout() -> TimeLimit:
    """Of the first attempt to download a video."""
    from vllm import envs

    return TimeLimit(envs.VLLM_VIDEO_FETCH_TIMEOUT, "VLLM_VIDEO_FETCH_TIMEOUT")


def audio_timeout() -> TimeLimit:
    """Of the first attempt to download an audio item."""
    from vllm import envs

    return TimeLimit(envs.VLLM_AUDIO_FETCH_TIMEOUT, "VLLM_AUDIO_FETCH_TIMEOUT")
