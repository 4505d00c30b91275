"""vLLM's media connector, backed by the front-end: fetch once, decode once, remember."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.video import get_video_loader_backend_for_processor

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.media.downloads import StockDownloads
from vllm_mm_ext.adapters.runtime import Runtime, current_runtime
from vllm_mm_ext.config.root import SamplingConfig
from vllm_mm_ext.media.fetch.fetcher import MediaChangedError, MediaRef
from vllm_mm_ext.media.frontend import AudioResult, VideoResult
from vllm_mm_ext.media.request_claim import current_claim
from vllm_mm_ext.media.types import FrameSelection, MediaInfo, SamplingSpec
from vllm_mm_ext.media.video_plan import VideoPlan, planned, resolved
from vllm_mm_ext.request.trace import VideoTrace, current_trace

R = TypeVar("R", VideoResult, AudioResult)

# `--media-io-kwargs '{"video": {...}}'` keys the front-end understands itself; with any other
# key the operator means a stock loader, and gets it.
VIDEO_KEYS = frozenset({"fps", "num_frames", "max_frames", "min_frames"})
MAX_REQUEST_FPS = 60.0
MAX_REQUEST_FRAMES = 4096
# Models turn frame indices into seconds as index / fps. For a variable frame rate no single fps
# is right, so indices are given in milliseconds.
VFR_TICKS_PER_S = 1000.0


@dataclass(frozen=True)
class VideoJob:
    """One video as asked.

    Attributes:
        plan: What to deliver.
        stock: The loader whose choice of frames the plan follows, or None.
        ref: The media, where planning resolved it already.
    """

    plan: VideoPlan
    stock: vllm_compat.StockLoader | None = None
    ref: MediaRef | None = None

    def using_ref(self) -> AbstractContextManager[None]:
        """While this is open, ``ref`` keeps its bytes; the request keeps ``ref`` to its end."""
        return nullcontext() if self.ref is None else self.ref.in_use()


def server_job(
    runtime: Runtime, options: Mapping[str, Any], url: str, video_processor: str | None
) -> VideoJob | None:
    """What the server's settings make of a video.

    Args:
        runtime: Of the process.
        options: ``media_io_kwargs.video`` in force.
        url: As the request spells it.
        video_processor: vLLM's name of the model's video processor class, or None.

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
        and kwargs.keys() <= VIDEO_KEYS
        and url[:15].lower() != "data:video/jpeg"
    )
    if not ours:
        return None
    frontend = runtime.frontend
    sampling = sampling_with(runtime.config.media.sampling, kwargs)
    plan = VideoPlan(
        spec_for(sampling, frontend.traits.frame_multiple),
        frontend.size_rule,
        audio=frontend.wants_audio_in_video,
        reduction=runtime.default_reduction,
    )
    if sampling.policy != "stock":
        return VideoJob(plan)
    of_model = None if chosen else get_video_loader_backend_for_processor(video_processor)
    stock = vllm_compat.StockLoader(of_model or envs.VLLM_VIDEO_LOADER_BACKEND, kwargs)
    plan = replace(
        plan,
        chooser=lambda info: stock.indices(*_frames_and_rate(info)),
        chooser_name=f"{stock.name}{sorted(kwargs.items())}",
    )
    return VideoJob(plan, stock)


class MMExtMediaConnector(MediaConnector):  # type: ignore[misc]
    """Drop-in for vLLM's ``MediaConnector``; same constructor, same limits.

    Video and audio go through the process's ``MediaFrontend``. Images, embeddings, JPEG-sequence
    data URLs and videos for which a stock loader was configured take vLLM's own path, with
    downloads by the front-end's rules.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection = StockDownloads(
            self.allowed_local_media_path, self.allowed_media_domains, client_errors
        )

    def fetch_video(self, video_url: str, **kwargs: Any) -> Any:
        """Fetch, sample and decode a video; see ``fetch_video_async``."""
        runtime = current_runtime()
        job = self._video_job(runtime, video_url, kwargs.get("video_processor"))
        if job is None:
            return super().fetch_video(video_url, **kwargs)
        with client_errors(), job.using_ref():
            result = runtime.run_blocking(self._video(runtime, video_url, job))
        return self._deliver_video(result, job, video_url)

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
        runtime = current_runtime()
        job = self._video_job(runtime, video_url, kwargs.get("video_processor"))
        if job is None:
            return await super().fetch_video_async(video_url, **kwargs)
        with client_errors(), job.using_ref():
            result = await runtime.run(self._video(runtime, video_url, job))
        return self._deliver_video(result, job, video_url)

    def fetch_audio(self, audio_url: str) -> Any:
        """Fetch and decode audio; see ``fetch_audio_async``."""
        runtime = current_runtime()
        if not self._handles_audio(runtime):
            return super().fetch_audio(audio_url)
        with client_errors():
            result = runtime.run_blocking(self._audio(runtime, audio_url))
        return self._deliver_audio(result)

    async def fetch_audio_async(self, audio_url: str) -> Any:
        """Fetch and decode audio to mono at the model's rate.

        Returns:
            ``(waveform float32 [samples], rate in Hz)``.

        Raises:
            VLLMError: The media cannot be served; ``error_answers`` says by which class.
        """
        runtime = current_runtime()
        if not self._handles_audio(runtime):
            return await super().fetch_audio_async(audio_url)
        with client_errors():
            result = await runtime.run(self._audio(runtime, audio_url))
        return self._deliver_audio(result)

    # --- what was asked ---------------------------------------------------------------------------

    def _handles_audio(self, runtime: Runtime) -> bool:
        # An audio backend the operator chose (`media_io_kwargs.audio`) stays in charge.
        return runtime.config.media.enabled and not self.media_io_kwargs.get("audio")

    def _video_job(
        self, runtime: Runtime, url: str, video_processor: str | None
    ) -> VideoJob | None:
        """The request's plan for the video, else the server's; None for a stock loader.

        Called in the request's own task: plans are in its context, which the front-end's loop
        does not inherit.
        """
        options = self.media_io_kwargs.get("video", {})
        job = server_job(runtime, options, url, video_processor)
        if job is None:
            return None
        plan = planned(url) or job.plan
        return VideoJob(plan, job.stock if plan.chooser else None, resolved(url))

    # --- doing it (on the front-end's loop) -------------------------------------------------------

    async def _video(self, runtime: Runtime, url: str, job: VideoJob) -> VideoResult:
        return await self._fetched(
            runtime,
            url,
            lambda ref: runtime.frontend.video(ref, job.plan),
            ref=job.ref,
            stage="video",
            timeout_s=envs.VLLM_VIDEO_FETCH_TIMEOUT,
            max_bytes=None,
        )

    async def _audio(self, runtime: Runtime, url: str) -> AudioResult:
        return await self._fetched(
            runtime,
            url,
            runtime.frontend.audio,
            ref=None,
            stage="audio",
            timeout_s=envs.VLLM_AUDIO_FETCH_TIMEOUT,
            max_bytes=AudioMediaIO().get_max_bytes(),
        )

    async def _fetched(
        self,
        runtime: Runtime,
        url: str,
        use: Callable[[MediaRef], Awaitable[R]],
        *,
        ref: MediaRef | None,
        stage: str,
        timeout_s: float,
        max_bytes: int | None,
    ) -> R:
        """Resolve ``url`` unless it is, use it, and add the times of both to the stages."""
        fetcher = runtime.fetcher(self.allowed_local_media_path, self.allowed_media_domains)
        started = time.perf_counter()
        if ref is None:
            ref = await fetcher.resolve(
                url, timeout_s=timeout_s, max_bytes=max_bytes, claim=current_claim(fetcher.budget)
            )
        try:
            fetched = time.perf_counter()
            result = await use(ref)
        except MediaChangedError:
            # It changed between looking it up and reading it: once more, with what is there now.
            ref = await fetcher.resolve(
                url, timeout_s=timeout_s, max_bytes=max_bytes, claim=current_claim(fetcher.budget)
            )
            fetched = time.perf_counter()
            result = await use(ref)
        stages = {
            "fetch": fetched - started,
            **result.stages,
            stage: time.perf_counter() - started,
        }
        return replace(result, stages=stages)

    # --- handing it to vLLM (in the request's context) --------------------------------------------

    def _deliver_video(self, result: VideoResult, job: VideoJob, url: str) -> Any:
        frames, selection = result.frames, result.selection
        if job.stock is None:
            metadata = metadata_of(result.info, selection, frames.digest or "")
        else:
            indices = [int(i) for i in selection.indices]
            metadata = job.stock.metadata(*_frames_and_rate(result.info), indices)
        if trace := current_trace():
            trace.add_stages(result.stages)
            trace.videos.append(
                VideoTrace(
                    policy=selection.policy if job.stock is None else "stock",
                    frames=len(frames),
                    height=frames.shape[1],
                    width=frames.shape[2],
                    times=selection.times.tolist(),
                    cached=result.cached,
                    audio_s=None
                    if frames.audio is None
                    else len(frames.audio) / (frames.audio.rate or 1),
                    url=url,
                    duration_s=result.info.duration,
                    reduction=frames.reduction,
                )
            )
        return MediaWithBytes((frames, metadata), (frames.digest or "").encode())

    def _deliver_audio(self, result: AudioResult) -> tuple[Any, int]:
        waveform = result.waveform
        rate = waveform.rate or 0
        if trace := current_trace():
            trace.add_stages(result.stages)
            seconds = round(len(waveform) / rate, 2)
            trace.audios.append({"seconds": seconds, "cached": result.cached})
        return waveform, rate


def sampling_with(config: SamplingConfig, kwargs: Mapping[str, Any]) -> SamplingConfig:
    """Apply ``media_io_kwargs.video`` (server-wide, or per request where vLLM allows it).

    Raises:
        VLLMValidationError: A value is out of bounds; the message names key, value and bounds.
    """
    if not kwargs:
        return config
    for key, value in kwargs.items():
        rate = key == "fps"
        high = MAX_REQUEST_FPS if rate else MAX_REQUEST_FRAMES
        number = isinstance(value, int | float) and not isinstance(value, bool)
        unlimited = key in ("fps", "num_frames") and number and value == -1
        # The comparison also refuses what is no number (NaN).
        valid = number and (0 < value <= high if rate else value % 1 == 0 and 1 <= value <= high)
        if not (valid or unlimited):
            bounds = (
                f"a number above 0 and at most {high}"
                if rate
                else (f"a whole number from 1 to {high}")
            )
            raise VLLMValidationError(
                f"media_io_kwargs.video.{key} must be {bounds}, got {value!r}",
                parameter=key,
                value=value,
            )
    values: dict[str, Any] = {}
    if kwargs.get("fps", -1) > 0:
        values["fps"] = float(kwargs["fps"])
    if kwargs.get("num_frames", -1) > 0:
        values["max_frames"] = int(kwargs["num_frames"])
    for key in ("max_frames", "min_frames"):
        if key in kwargs:
            values[key] = int(kwargs[key])
    low_frames = values.get("min_frames", config.min_frames)
    values["min_frames"] = min(low_frames, values.get("max_frames", config.max_frames))
    return config.model_copy(update=values)


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
    )


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
