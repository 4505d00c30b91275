"""Notes media in the report of their request: what vLLM's own loaders read, and small pictures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from blake3 import blake3
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.audio import AudioMediaIO

from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.media.fetch.file_source import digest_of
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.media.recorded import record_of
from vllm_mm_ext.request.context import RequestContext, current_request
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


class NotingConnector(MediaConnector):  # type: ignore[misc]
    """vLLM's connector, which notes the digests of the sounds that vLLM reads by itself."""

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        """Read a medium as vLLM does."""
        return super().load_from_url(url, _noting(media_io, url), **options)

    async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
        """Read a medium as vLLM does."""
        return await super().load_from_url_async(url, _noting(media_io, url), **options)


def _noting(reader: Any, url: str) -> Any:
    """What vLLM reads a medium with; for a sound of a request that is watched, what notes it."""
    context = current_request()
    if context is None or not (context.trace.watched and isinstance(reader, AudioMediaIO)):
        return reader
    wanted = ("audio", url, "")
    found = (one for one in context.items if (one.modality, one.url, one.digest) == wanted)
    item = next(found, None)
    return reader if item is None else _NotedAudioIO(reader, item)


class _NotedAudioIO(AudioMediaIO):  # type: ignore[misc]
    """vLLM's reader of sound, which notes the digest of the file in the item of a request."""

    def __init__(self, reader: AudioMediaIO, item: MediaItem) -> None:
        self.__dict__.update(vars(reader))
        self._item = item

    def load_bytes(self, data: bytes) -> Any:
        """Decode a file."""
        self._item.digest = str(blake3(data).hexdigest())
        return super().load_bytes(data)

    def load_file(self, filepath: Path) -> Any:
        """Decode a local file."""
        # vLLM refuses a file that is larger.
        if filepath.stat().st_size <= (most := self.get_max_bytes()):
            self._item.digest = digest_of(filepath, most)
        return super().load_file(filepath)


def _digest_of(media: Any) -> str:
    """Digest of the encoded file of vLLM's ``MediaWithBytes``; empty where it has none."""
    encoded = media.original_bytes
    return str(blake3(encoded).hexdigest()) if encoded else ""
