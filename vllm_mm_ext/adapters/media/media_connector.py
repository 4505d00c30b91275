"""vLLM's media connector, backed by the front-end: fetch once, decode once, remember."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from vllm import envs
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.video import get_video_loader_backend_for_processor

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.media.byte_limits import audio_limit, audio_timeout, video_timeout
from vllm_mm_ext.adapters.media.downloads import StockDownloads
from vllm_mm_ext.adapters.media.media_records import recorded_or_decoded
from vllm_mm_ext.adapters.media.noted_media import (
    NotingConnector,
    begun_image,
    noted_audio,
    noted_image,
    noted_video,
    take_pictures,
)
from vllm_mm_ext.adapters.media.request_budgets import charge_request, charge_request_async
from vllm_mm_ext.adapters.media.video_kwargs import read_video_kwargs, sampling_for, spec_for
from vllm_mm_ext.adapters.runtime import Runtime, runtime_of
from vllm_mm_ext.adapters.sight.stage_notes import note_use
from vllm_mm_ext.media.fetch.data_url import is_jpeg_sequence, padded, plain_base64, split_data_url
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher, MediaRef
from vllm_mm_ext.media.frontend import AudioResult, VideoResult
from vllm_mm_ext.media.types import FrameSelection, MediaInfo, SizeRule
from vllm_mm_ext.media.use_media import MediaUse, use_media
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.context import RequestContext, current_request
from vllm_mm_ext.request.media_items import AudioReport, MediaItem, VideoReport

# `--media-io-kwargs '{"video": {...}}'` keys the front-end understands itself; with any other
# key the operator means a stock loader, and gets it.
VIDEO_KEYS = frozenset({"fps", "num_frames", "max_frames", "min_frames"})
# Models turn frame indices into seconds as index / fps. For a variable frame rate no single fps
# is right, so indices are given in milliseconds.
VFR_TICKS_PER_S = 1000.0


@dataclass(frozen=True)
class StockChoice:
    """Chooses the frames that a loader of vLLM's own would read.

    Attributes:
        loader: The loader.
    """

    loader: vllm_compat.StockLoader

    def __call__(self, info: MediaInfo) -> Sequence[int]:
        """Indices of the frames of a probed video."""
        return self.loader.indices(*_frames_and_rate(info))

    def metadata(self, info: MediaInfo, selection: FrameSelection) -> dict[str, Any]:
        """What the loader would tell a model about the frames delivered."""
        indices = [int(i) for i in selection.indices]
        return self.loader.metadata(*_frames_and_rate(info), indices)


def server_plan(
    runtime: Runtime,
    options: Mapping[str, Any],
    url: str,
    video_processor: str | None,
    size: SizeRule | None = None,
) -> VideoPlan | None:
    """What the server's settings make of a video.

    Args:
        runtime: Of the engine that is asked.
        options: ``media_io_kwargs.video`` in force.
        url: As the request spells it.
        video_processor: vLLM's name of the model's video processor class, or None.
        size: The rule for the size of frames; None for the server's.

    Returns:
        None where a stock loader is in charge.

    Raises:
        VLLMValidationError: An option is out of bounds.
    """
    kwargs = dict(options)
    chosen = kwargs.pop("video_backend", None)
    ours = (
        runtime.config.media.enabled
        and chosen in (None, vllm_compat.LOADER_NAME)
        and (chosen is not None or kwargs.keys() <= VIDEO_KEYS)
        and not is_jpeg_sequence(url)
        and not runtime.frontend.traits.reads_files
    )
    if not ours:
        return None
    frontend = runtime.frontend
    with client_errors():
        sampling = sampling_for(runtime.config.media.sampling, read_video_kwargs(kwargs))
    rule = frontend.size_rule
    if size is not None:
        # The server's cap on the pixels of a frame holds for the request's size, too.
        rule = replace(size, max_frame_pixels=rule.max_frame_pixels)
    plan = VideoPlan(
        spec_for(sampling, frontend.traits.frame_multiple),
        rule,
        audio=frontend.wants_audio_in_video,
        audio_stream=runtime.config.media.audio.audio_stream,
        reduction=runtime.default_reduction,
    )
    if sampling.policy != "stock":
        return plan
    of_model = None if chosen else get_video_loader_backend_for_processor(video_processor)
    stock = vllm_compat.StockLoader(of_model or envs.VLLM_VIDEO_LOADER_BACKEND, kwargs)
    return replace(
        plan,
        chooser=StockChoice(stock),
        chooser_name=f"{stock.name}{sorted(kwargs.items())}",
    )


class MMExtMediaConnector(NotingConnector):
    """Drop-in for vLLM's ``MediaConnector``; same constructor, same limits.

    Video and audio go through the front-end of the engine that is asked. Images, embeddings,
    JPEG-sequence data URLs and videos for which a stock loader was configured take vLLM's own path,
    with downloads by the front-end's rules.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection = StockDownloads(
            self.allowed_local_media_path, self.allowed_media_domains, _asking
        )

    def fetch_video(self, video_url: str, **kwargs: Any) -> Any:
        """Fetch, sample and decode a video; see ``fetch_video_async``."""
        context, runtime = _asking()
        item = self._video_item(context, runtime, video_url, kwargs.get("video_processor"))
        if item.plan is None:
            return noted_video(super().fetch_video(video_url, **kwargs), item, context)
        with client_errors(), _in_use(item):
            used = runtime.run_blocking(self._video(context, runtime, item, item.plan))
        charge_request(self, context, video_url, used)
        take_pictures(used.result.frames, item, context, runtime)
        return _deliver_video(used, item, item.plan, context, runtime)

    async def fetch_video_async(self, video_url: str, **kwargs: Any) -> Any:
        """Fetch, sample and decode a video.

        Args:
            video_url: http(s), file or data URL.
            **kwargs: ``image_mode`` and ``video_processor`` as vLLM passes them.

        Returns:
            vLLM's ``MediaWithBytes((frames, metadata), identity)``. ``identity`` is the digest
            of source and plan, so vLLM's hasher never reads the frames.

        Raises:
            VLLMError: The media cannot be served; ``error_answers`` says by which class.
        """
        context, runtime = _asking()
        item = self._video_item(context, runtime, video_url, kwargs.get("video_processor"))
        if item.plan is None:
            stock = await super().fetch_video_async(video_url, **kwargs)
            return noted_video(stock, item, context)
        with client_errors(), _in_use(item):
            used = await runtime.run(self._video(context, runtime, item, item.plan))
        await charge_request_async(self, context, video_url, used)
        take_pictures(used.result.frames, item, context, runtime)
        return _deliver_video(used, item, item.plan, context, runtime)

    def fetch_image(self, image_url: str, **kwargs: Any) -> Any:
        """Fetch an image as vLLM does."""
        item = begun_image(image_url, _asking()[0])
        return noted_image(super().fetch_image(image_url, **kwargs), item)

    async def fetch_image_async(self, image_url: str, **kwargs: Any) -> Any:
        """Fetch an image as vLLM does."""
        item = begun_image(image_url, _asking()[0])
        return noted_image(await super().fetch_image_async(image_url, **kwargs), item)

    def fetch_audio(self, audio_url: str) -> Any:
        """Fetch and decode audio; see ``fetch_audio_async``."""
        context, runtime = _asking()
        item = context.claim("audio", audio_url)
        if not self._handles_audio(runtime):
            return noted_audio(super().fetch_audio(audio_url), item)
        with client_errors():
            used = runtime.run_blocking(self._audio(context, runtime, item))
        charge_request(self, context, audio_url, used)
        return _deliver_audio(used, item, context, runtime)

    async def fetch_audio_async(self, audio_url: str) -> Any:
        """Fetch and decode audio to mono at the model's rate.

        Returns:
            ``(waveform float32 [samples], rate in Hz)``.

        Raises:
            VLLMError: The media cannot be served; ``error_answers`` says by which class.
        """
        context, runtime = _asking()
        item = context.claim("audio", audio_url)
        if not self._handles_audio(runtime):
            return noted_audio(await super().fetch_audio_async(audio_url), item)
        with client_errors():
            used = await runtime.run(self._audio(context, runtime, item))
        await charge_request_async(self, context, audio_url, used)
        return _deliver_audio(used, item, context, runtime)

    def _load_data_url(self, url: str, media_io: Any) -> Any:
        """As vLLM's, with the reading of ``data:`` URLs that videos and audio get.

        Raises:
            VLLMValidationError: The URL is not a base64 ``data:`` URL.
        """
        with client_errors():
            media_type, start = split_data_url(url)
        # The frames of a JPEG sequence are separated by commas.
        parts = plain_base64(url[start:]).split(",")
        return media_io.load_base64(media_type, ",".join(map(padded, parts)))

    # --- what was asked ---------------------------------------------------------------------------

    def _handles_audio(self, runtime: Runtime) -> bool:
        # An audio backend the operator chose (`media_io_kwargs.audio`) stays in charge.
        return runtime.config.media.enabled and not self.media_io_kwargs.get("audio")

    def _video_item(
        self, context: RequestContext, runtime: Runtime, url: str, video_processor: str | None
    ) -> MediaItem:
        """The item of the request that vLLM asks for; what was not planned is as on the server."""
        options = self.media_io_kwargs.get("video", {})
        return context.claim(
            "video", url, lambda: server_plan(runtime, options, url, video_processor)
        )

    # --- doing it (on the front-end's loop) -------------------------------------------------------

    async def _video(
        self, context: RequestContext, runtime: Runtime, item: MediaItem, plan: VideoPlan
    ) -> MediaUse[VideoResult]:
        return await use_media(
            self.fetcher(runtime),
            item.url,
            lambda content: recorded_or_decoded(context, runtime, content, plan),
            content=item.content,
            claim=context.budget_claim(runtime.budget),
            timeout_s=video_timeout(),
        )

    async def _audio(
        self, context: RequestContext, runtime: Runtime, item: MediaItem
    ) -> MediaUse[AudioResult]:
        def hear(content: MediaRef) -> Awaitable[AudioResult]:
            # Known from now on, as whoever asked may go on without a sound.
            item.digest = content.digest
            return runtime.frontend.audio(content, context.options.audio_stream)

        return await use_media(
            self.fetcher(runtime),
            item.url,
            hear,
            claim=context.budget_claim(runtime.budget),
            timeout_s=audio_timeout(),
            max_bytes=audio_limit(),
        )

    def fetcher(self, runtime: Runtime) -> MediaFetcher:
        """What fetches media of a runtime's requests within this connector's access settings."""
        return runtime.fetcher(self.allowed_local_media_path, self.allowed_media_domains)


# --- around a call of vLLM's ----------------------------------------------------------------------


def _asking() -> tuple[RequestContext, Runtime]:
    """Who asks: the request being rendered, else a caller that uses the connector by itself."""
    context = current_request() or RequestContext()
    return context, runtime_of(context.renderer)


def _in_use(item: MediaItem) -> AbstractContextManager[None]:
    """While this is open, the item's content keeps its bytes; the request keeps the item."""
    return nullcontext() if item.content is None else item.content.in_use()


def _deliver_video(
    used: MediaUse[VideoResult],
    item: MediaItem,
    plan: VideoPlan,
    context: RequestContext,
    runtime: Runtime,
) -> Any:
    """A video as vLLM takes it, noted in the request's report."""
    result = used.result
    frames, selection = result.frames, result.selection
    stock = plan.chooser if isinstance(plan.chooser, StockChoice) else None
    if stock is None:
        metadata = metadata_of(result.info, selection, frames.digest or "")
    else:
        metadata = stock.metadata(result.info, selection)
    item.digest = used.content.digest
    item.report = VideoReport(
        policy=selection.policy if stock is None else "stock",
        frames=len(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        times=selection.times.tolist(),
        cached=result.cached,
        audio_s=None if frames.audio is None else len(frames.audio) / (frames.audio.rate or 1),
        duration_s=result.info.duration,
        reduction=frames.reduction,
        audio_note=result.audio_note,
        activity=selection.activity,
    )
    _note(context, runtime, item, used)
    return MediaWithBytes((frames, metadata), (frames.digest or "").encode())


def _deliver_audio(
    used: MediaUse[AudioResult], item: MediaItem, context: RequestContext, runtime: Runtime
) -> tuple[Any, int]:
    """A waveform as vLLM takes it, noted in the request's report."""
    waveform = used.result.waveform
    rate = waveform.rate or 0
    item.report = AudioReport(len(waveform) / rate, used.result.cached)
    _note(context, runtime, item, used)
    return waveform, rate


def _note(
    context: RequestContext,
    runtime: Runtime,
    item: MediaItem,
    used: MediaUse[VideoResult] | MediaUse[AudioResult],
) -> None:
    """Note in the trace, and in the metrics, what an item took; it has its report."""
    trace, result = context.trace, used.result
    trace.add_stages({"fetch": used.fetch_s, item.modality: used.fetch_s + used.use_s})
    trace.add_work(result.stages)
    note_use(trace, runtime.recorder, item, used, planned=used.content is item.content)
    if runtime.recorder is not None:
        # The file of a long video was counted when it was surveyed; its windows are parts of it.
        size = used.content.size if context.span is None else 0
        runtime.recorder.delivered(item, result.codec, size)


def metadata_of(info: MediaInfo, selection: FrameSelection, digest: str) -> dict[str, Any]:
    """The metadata vLLM's models expect, for frames this plugin chose.

    Keys are exactly those of stock loaders: models build ``VideoMetadata(**metadata)`` and refuse
    others. ``video_backend`` carries the content digest, so that different frames never share a
    hash with a model that also hashes metadata.
    """
    assert info.video is not None
    indices = [int(i) for i in selection.indices]
    total, fps = info.video.num_frames, info.video.fps
    if info.video.is_vfr or fps <= 0:
        fps = VFR_TICKS_PER_S
        indices = [round(float(t) * fps) for t in selection.times]
        total = max(round(info.video.duration * fps), indices[-1] + 1)
    return {
        "total_num_frames": total,
        "fps": fps,
        "duration": info.video.duration,
        "video_backend": f"mm_ext:{digest[:16]}",
        "frames_indices": indices,
        "do_sample_frames": False,
    }


def _frames_and_rate(info: MediaInfo) -> tuple[int, float]:
    assert info.video is not None
    return info.video.num_frames, info.video.fps
