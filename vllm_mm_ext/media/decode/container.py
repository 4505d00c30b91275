"""Opens untrusted media with FFmpeg, within an allow-list of formats and protocols."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer

from vllm_mm_ext.errors import UnreadableMediaError, UnsupportedFormatError
from vllm_mm_ext.media.decode.pixel_limit import ffmpeg_limit

# Self-contained formats only. With playlists and scripts (hls, dash, concat, image sequences, ...)
# a client's file could make the server read other files or contact other hosts.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,ivf,obu,"
    "flv,live_flv,asf,rm,mxf,mjpeg,nut,gif,apng,dv,y4m,yuv4mpegpipe,ogg,wav,w64,mp3,flac,aac,ac3,"
    "eac3,dts,aiff,caf,amr,amrnb,amrwb,au,ape,tta,wv,tak,tta,truehd,voc,mpc,mpc8,spdif,gsm"
)
_PROTOCOLS = "file"
# FFmpeg's flags of formats whose timestamps may start anew, and of those without an index.
TIMES_RESTART = 0x200
NO_INDEX = 0x100


@contextmanager
def open_container(
    path: str, *, max_pixels: int, guess: bool = False, hardware: HWAccel | None = None
) -> Iterator[InputContainer]:
    """Open ``path`` for reading and close it afterwards.

    Args:
        path: A local file; ``/proc/self/fd/N`` works too.
        max_pixels: Most pixels of a picture; FFmpeg gets ``ffmpeg_limit`` of it.
        guess: Let FFmpeg decode the first frames, to learn the audio parameters and the reordering
            delay of files whose headers leave them out. Opening 720p H.264 then takes some 30 ms
            instead of under 1 ms.
        hardware: What decodes the file's streams instead of FFmpeg's own decoders, where it can.

    Raises:
        UnsupportedFormatError: FFmpeg knows the format, but the format is not on the allow-list.
        UnreadableMediaError: FFmpeg does not know the format, or the file is damaged.
    """
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": _PROTOCOLS,
        "max_pixels": str(ffmpeg_limit(max_pixels)),
        "enable_drefs": "0",
    }
    if not guess:
        # No decoder has this name, so avformat_find_stream_info cannot decode.
        options["codec_whitelist"] = "none"
    try:
        container = av.open(path, options=options, metadata_errors="replace", hwaccel=hardware)
    except av.error.ArgumentError as error:
        # FFmpeg's error for a format that is not on the whitelist.
        raise UnsupportedFormatError(
            "The media could not be opened: it is not in a supported audio or video format."
        ) from error
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise UnreadableMediaError(
            f"The media could not be opened: {describe(error)}. "
            "It is not a supported audio or video file, or it is damaged."
        ) from error
    with container:
        yield container


def dumped(container: InputContainer) -> str:
    """FFmpeg's own description of an open file: PyAV shows programmes and cropping nowhere else."""
    before = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        return str(container.dumps_format())  # type: ignore[attr-defined]
    finally:
        av.logging.set_level(before)


def describe(error: BaseException) -> str:
    """FFmpeg's reason for an error, without the name of the server's file."""
    return str(getattr(error, "strerror", None) or type(error).__name__)
