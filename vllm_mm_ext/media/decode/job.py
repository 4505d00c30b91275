"""One decode job, from a file to arrays. It runs in a worker process, or in any other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import (
    MediaError,
    MediaTooLargeError,
    NoSuchStreamError,
    UnreadableMediaError,
    by_decoder,
)
from vllm_mm_ext.media.audio.audio_track import Track, check_audio, decode_audio
from vllm_mm_ext.media.audio.sound_placement import FileOrder
from vllm_mm_ext.media.audio.stream_choice import chosen_audio
from vllm_mm_ext.media.decode.decoders import Decoder, UnsuitableFileError, get_decoder
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.open_files import OpenFile
from vllm_mm_ext.media.decode.packets import read_beside
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.decode.sound_probe import probe_sound
from vllm_mm_ext.media.decode.substitutes import Frames, Rows, decode_chosen
from vllm_mm_ext.media.output_bytes import audio_bytes
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.span import first_row, info_of
from vllm_mm_ext.media.types import (
    AudioStream,
    DecodeRequest,
    DecodeResult,
    FrameSelection,
    MediaInfo,
    SamplingSpec,
)

# Makes an array of this shape and dtype with undefined contents.
Allocate = Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[np.generic]]

# Longest edge in pixels of the thumbnails that the adaptive policy looks at: its scores are tuned
# to this size.
_THUMBNAIL_EDGE = 64
# The share of a worker's memory that may hold pictures of thumbnails until frames are chosen. With
# the default limit on memory that is 700 pictures of 720p.
_KEPT_SHARE = 4


def run_job(
    path: str,
    request: DecodeRequest,
    allocate: Allocate = np.empty,
    reserve: Callable[[int], None] | None = None,
    kept: OpenFile | None = None,
) -> DecodeResult:
    """Probe a file, choose frames, and decode the frames and the audio track in parallel.

    Args:
        path: A local file, ``/proc/self/fd/N`` included.
        request: What to do.
        allocate: Makes the memory of the result's ``frames`` and ``audio``.
        reserve: The job calls this at most once, before it decodes, with the bytes that frames and
            audio will take.
        kept: The file that stays open for further jobs about spans of it; ``path`` is its path.

    Returns:
        What was asked for, with the packet table of the file. With a span, ``info`` is that of the
        span, as is all that a selection says.

    Raises:
        MediaError: The file is unreadable, lacks a wanted stream, or is past a limit.
    """
    timings: dict[str, float] = {}
    limits = request.limits
    try:
        with _timed(timings, "probe"):
            number = request.sampling.video_stream if request.sampling else None
            info = (None if kept is None else kept.info) or request.info
            if info is None and request.sound_alone:
                info = probe_sound(path, limits)
            info = info or probe(path, limits, number, request.picture)
        if kept is not None:
            kept.info = info
        if request.probe_only:
            return DecodeResult(info=info, timings=timings)
        keep = limits.memory_bytes // _KEPT_SHARE
        try:
            return _decode(path, info, request, allocate, reserve, timings, keep, kept)
        except MemoryError:
            adaptive = request.sampling is not None and request.sampling.policy == "adaptive"
            if kept is None and not adaptive:
                raise
        if kept is not None:
            kept.close_readers()
        # Kept pictures may have taken the memory that is missing. They are gone outside of the
        # handler, whose error holds them.
        return _decode(path, info, request, allocate, None, timings, 0, None)
    except MemoryError as error:
        raise MediaTooLargeError(
            f"Decoding the media needs more memory than the limit of {limits.memory_bytes} bytes."
        ) from error


def _decode(
    path: str,
    info: MediaInfo,
    request: DecodeRequest,
    allocate: Allocate,
    reserve: Callable[[int], None] | None,
    timings: dict[str, float],
    keep_bytes: int,
    kept: OpenFile | None,
) -> DecodeResult:
    whole, info = info, info_of(info, request.sampling)
    sound = _wanted_audio(info, request)
    selection: FrameSelection | None = None
    shape: tuple[int, ...] = (0,)
    decoder = get_decoder(
        request.decoder,
        max_pixels=request.limits.max_pixels,
        picture=request.picture,
        keep_bytes=keep_bytes,
        gpu=request.gpu,
        seconds=request.limits.timeout_s / 4,
    )
    if kept is not None:
        decoder.kept = kept.video(whole, request)
    if request.sampling is not None:
        if info.video is None:
            raise NoSuchStreamError(
                "The media has no video stream that holds a frame.", parameter="video_url"
            )
        with _timed(timings, "profile"):
            selection = _select(path, whole, info, request.sampling, request, decoder)
        shape = _output_shape(info, selection, request)
    if reserve is not None:
        reserve(math.prod(shape) + (0 if sound is None else audio_bytes(info, sound, request)))

    result = DecodeResult(info=info, timings=timings)
    with ThreadPoolExecutor(1) as beside:
        audio: Future[Track] | None = None
        if sound is not None:
            audio = beside.submit(
                _audio, path, whole, info, sound, request, allocate, timings, kept
            )
        elif request.audio == "optional" and info.unsupported_audio:
            result.audio_note = "unsupported"
        if selection is not None:
            with _timed(timings, "decode"):
                _frames(path, whole, selection, request, decoder, shape, allocate, result)
        if audio is not None:
            try:
                track = audio.result()
            finally:
                audio = None  # It may hold the error whose traceback holds this frame.
            result.audio_note = track.note
            if len(track.samples):
                result.audio, result.audio_rate = track.samples, track.rate
    return result


def _wanted_audio(info: MediaInfo, request: DecodeRequest) -> AudioStream | None:
    """The audio stream to decode, or None; refuses a file without one where sound is required."""
    if request.audio == "none":
        return None
    stream = chosen_audio(info.audio, request.audio_stream)
    if request.audio == "required":
        if stream is None:
            why = " that can be decoded" if info.unsupported_audio else ""
            raise NoSuchStreamError(f"The media has no audio stream{why}.", parameter="input_audio")
        check_audio(stream, request.limits)
    return stream


def _select(
    path: str,
    whole: MediaInfo,
    info: MediaInfo,
    spec: SamplingSpec,
    request: DecodeRequest,
    decoder: Decoder,
) -> FrameSelection:
    """Choose frames of the clip ``info``, which is the wanted span of the file ``whole``."""
    from vllm_mm_ext.media.sampling import select

    assert whole.packets is not None
    first = first_row(whole.packets, spec)

    def thumbnails(indices: Sequence[int], likely: Sequence[int]) -> npt.NDArray[np.uint8]:
        rows = np.asarray(indices, np.int64) + first
        keep = (np.asarray(likely, np.int64) + first).tolist()
        return decoder.thumbnails(path, whole, rows, _THUMBNAIL_EDGE, request.threads, keep)

    return select(info, spec, thumbnails)


def _output_shape(
    info: MediaInfo, selection: FrameSelection, request: DecodeRequest
) -> tuple[int, int, int, int]:
    """Shape of the decoded frames; refuses more frames or bytes than the limits allow."""
    assert info.video is not None
    limits, count = request.limits, len(selection.indices)
    if count > limits.max_frames:
        raise MediaTooLargeError(
            f"{count} frames were asked for, past the limit of {limits.max_frames}.",
            parameter="video_url",
            value=count,
        )
    height, width = target_size(
        request.size, width=info.video.width, height=info.video.height, num_frames=count
    )
    num_bytes = count * height * width * 3
    if num_bytes > limits.max_output_bytes:
        raise MediaTooLargeError(
            f"{count} frames of {width}x{height} take {num_bytes} bytes, "
            f"past the limit of {limits.max_output_bytes}.",
            parameter="video_url",
            value=num_bytes,
        )
    return count, height, width, 3


def _frames(
    path: str,
    whole: MediaInfo,
    selection: FrameSelection,
    request: DecodeRequest,
    decoder: Decoder,
    shape: tuple[int, ...],
    allocate: Allocate,
    result: DecodeResult,
) -> None:
    """Decode the selected frames and put them, with the selection as it is then, into ``result``.

    In place of frames that do not decode others are chosen, unless the client named the frames.
    """
    out = cast("npt.NDArray[np.uint8]", allocate(shape, np.uint8))
    info = result.info
    assert info.video is not None
    assert info.packets is not None
    assert whole.packets is not None
    first, count = first_row(whole.packets, request.sampling), len(info.packets)
    own_size = request.size.kind == "native" and shape[1:3] == (info.video.height, info.video.width)
    size = None if own_size else (shape[1], shape[2])

    def decode(rows: Rows, into: Frames, seen: set[int]) -> Rows:
        nonlocal decoder
        shown: set[int] = set()
        try:
            found = decoder.decode(path, whole, rows + first, size, into, request.threads, shown)
        except UnsuitableFileError:
            decoder = PyAVDecoder(request.limits.max_pixels, picture=request.picture)
            found = decoder.decode(path, whole, rows + first, size, into, request.threads, shown)
        seen.update(row - first for row in shown if first <= row < first + count)
        return found

    chosen, named = selection.indices, selection.policy == "explicit"
    # A file that is slow to decode is rather served with fewer frames than stopped for its time.
    seconds = request.limits.timeout_s / 4
    times = info.packets.time
    rows = decode_chosen(decode, times, chosen, out, substitute=not named, seconds=seconds)
    if not len(rows):
        raise UnreadableMediaError(
            "None of the chosen frames could be decoded.", parameter="video_url"
        )
    if not np.array_equal(rows, chosen):
        selection = replace(
            selection,
            indices=rows,
            times=info.packets.time[rows],
            # Frames missing at the end leave the others where they were.
            step=selection.step if np.array_equal(rows, chosen[: len(rows)]) else None,
        )
    result.frames, result.selection = out[: len(rows)], selection
    result.decoder, result.decoder_note = decoder.name, decoder.note


def _audio(
    path: str,
    whole: MediaInfo,
    info: MediaInfo,
    stream: AudioStream,
    request: DecodeRequest,
    allocate: Allocate,
    timings: dict[str, float],
    kept: OpenFile | None,
) -> Track:
    """Decode the sound; what is optional and cannot be decoded is left out, with a note.

    Args:
        path, request, timings: As of the job.
        whole, info: Of the whole file, and of the wanted span.
        stream: Of the whole file.
        allocate, kept: As of ``run_job``.
    """
    video = info.video if request.sampling is not None else None
    is_part = request.sampling is not None and request.sampling.span is not None
    begin = video.start if video is not None and is_part and not video.origins else None

    def beside() -> FileOrder:
        assert video is not None
        return _file_order(path, whole, video.start, stream, request.limits.max_pixels)

    with _timed(timings, "audio"):
        try:
            track = decode_audio(
                path,
                stream,
                request.limits,
                origins=() if video is None else video.origins or (video.start,),
                beside=None if video is None else beside,
                end=None if video is None else video.duration,
                begin=begin,
                is_part=is_part,
                reader=None
                if kept is None or video is None
                else kept.sound(stream.number, request.limits.max_pixels),
            )
            if not len(track.samples):
                return track
            out = np.asarray(allocate(track.samples.shape, np.float32), np.float32)
        except Exception as error:
            if kept is not None:
                kept.close_sound()
            # PyAV raises ValueError and the like too. An error of the plugin's own code goes on.
            known = isinstance(error, MediaError | MemoryError)
            if request.audio == "required" or not (known or by_decoder(error)):
                raise
            large = isinstance(error, MediaTooLargeError | MemoryError)
            return Track(np.empty(0, np.float32), 0, "too_large" if large else "unreadable")
        out[...] = track.samples
    return replace(track, samples=out)


def _file_order(
    path: str, whole: MediaInfo, start: float, stream: AudioStream, max_pixels: int
) -> FileOrder:
    """Where the sound lies in the file among the pictures.

    Args:
        path, whole: The file.
        start: Start of the wanted span on the clock of the file's first picture.
        stream: The sound.
        max_pixels: See ``open_container``.
    """
    assert whole.video is not None
    assert whole.packets is not None
    before, sound, stamps = read_beside(path, max_pixels, whole.video.index, stream.index)
    times = np.full(len(stamps), np.nan)
    known = whole.packets.order < len(stamps)
    begin = start - whole.video.start
    times[whole.packets.order[known]] = whole.packets.time[known] - begin
    return FileOrder(np.array(before, np.int64), np.array(sound), np.array(stamps), times)


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Write the seconds that the body takes into ``timings``."""
    start = time.monotonic()
    try:
        yield
    finally:
        timings[stage] = time.monotonic() - start
