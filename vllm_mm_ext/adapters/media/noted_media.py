"""Notes media in the report of their request: what vLLM's own loaders read, and small pictures."""

from __future__ import annotations

import asyncio
from typing import Any

from blake3 import blake3

from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.media.recorded import record_of
from vllm_mm_ext.request.context import RequestContext
from vllm_mm_ext.request.media_items import AudioReport, ImageItem, MediaItem, VideoReport
from vllm_mm_ext.sight.thumbnail_strip import strip_of


def noted_video(video: Any, item: MediaItem, context: RequestContext) -> Any:
    """A video that vLLM's own loader has read, noted in the request's report."""
    frames, metadata = video.media
    rate = metadata.get("fps") or 1.0
    indices = metadata.get("frames_indices")
    item.report = VideoReport(
        policy="stock",
        frames=len(frames),
        height=int(frames.shape[1]),
        width=int(frames.shape[2]),
        times=[] if indices is None else [float(index) / rate for index in indices],
        cached=False,
        audio_s=None,
        duration_s=metadata.get("duration"),
    )
    if context.trace.watched:
        item.digest = _digest_of(video)
    return video


def noted_audio(audio: tuple[Any, float], item: MediaItem) -> tuple[Any, float]:
    """A sound that vLLM has read by itself, noted in the request's report."""
    samples, rate = audio
    item.report = AudioReport(samples.shape[-1] / rate, cached=False)
    return audio


def begun_image(url: str, context: RequestContext) -> ImageItem | None:
    """An image that vLLM is about to fetch, noted in the trace of a request that is watched."""
    if not context.trace.watched:
        return None
    item = ImageItem(url)
    context.trace.images.append(item)
    return item


def noted_image(image: Any, item: ImageItem | None) -> Any:
    """An image that vLLM has read, noted in the item of ``begun_image``."""
    if item is not None:
        item.digest = _digest_of(image)
        item.width, item.height = image.media.size
    return image


def take_pictures(
    frames: SampledFrames, item: MediaItem, context: RequestContext, runtime: Runtime
) -> None:
    """Begin to make small pictures of the frames of a request, where the operator wants them.

    There are none of frames that another server has.
    """
    recorded = record_of(frames) is not None
    if context.trace.watched and runtime.config.sight.thumbnails and not recorded:
        item.pictures = runtime.loop.submit(asyncio.to_thread(strip_of, frames))


def _digest_of(media: Any) -> str:
    """Digest of the encoded file of vLLM's ``MediaWithBytes``; empty where it has none."""
    encoded = media.original_bytes
    return str(blake3(encoded).hexdigest()) if encoded else ""
