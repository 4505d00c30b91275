"""The NVDEC backend: PyAV's decoder with the GPU's video engines behind it.

FFmpeg parses the stream and gives the engines one picture after the other, so runs, timestamps and
the order of frames are those of the PyAV backend. Wanted pictures are copied to host memory in the
format in which FFmpeg's own decoder returns them, and from there on they are treated alike.
Whatever the GPU cannot do, or fails to do, is done by the PyAV backend.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vllm_mm_ext.media.decode import tone
from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.decode.decoders import nvdec_device
from vllm_mm_ext.media.decode.decoders.nvdec_device import Ability, Gpu, NoGpuError
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.decoders.read_plan import plan_runs, split_lanes
from vllm_mm_ext.media.decode.decoders.reader import Emit, Read, Reader, read_planned
from vllm_mm_ext.media.decode.pixel_limit import ffmpeg_limit
from vllm_mm_ext.media.types import (
    AS_PLAYERS,
    GpuRules,
    MediaInfo,
    PacketTable,
    PictureRules,
    VideoStream,
)

# Decoders of one file at a time: the driver spreads them over the engines.
_MAX_LANES = 8
# Pictures that a decoder holds in GPU memory at most: FFmpeg warns that NVDEC may fail with more.
_PICTURES = 32
# Formats in GPU memory, each with those of FFmpeg's own decoders that hold the same samples.
_SAME_SAMPLES = frozenset(
    {
        *(("nv12", "yuv420p"), ("nv12", "yuvj420p")),
        *(("p010le", "yuv420p10le"), ("p016le", "yuv420p10le")),
        *(("p012le", "yuv420p12le"), ("p016le", "yuv420p12le")),
        *(("nv16", "yuv422p"), ("p210le", "yuv422p10le")),
        *(("yuv444p", "yuv444p"), ("yuv444p", "yuvj444p")),
    }
)
_MAX_NOTE = 200


class RefusedError(Exception):
    """A file that is not for the GPU, though nothing is wrong with either."""


class NvdecDecoder(PyAVDecoder):
    """Decodes on the GPU what is worth it; see ``Decoder`` for the contract.

    Args:
        max_pixels, picture, keep_bytes: See ``Decoder``.
        rules: Limits, and which files are worth it.
        always: Every file that the GPU can decode goes there, whatever the rules say.
        seconds: How long the GPU may work on one call before the CPU takes over.
    """

    name = "pyav"  # Until the GPU has decoded something.

    def __init__(
        self,
        max_pixels: int,
        *,
        picture: PictureRules = AS_PLAYERS,
        keep_bytes: int = 0,
        rules: GpuRules,
        always: bool,
        seconds: float,
    ) -> None:
        super().__init__(max_pixels, picture=picture, keep_bytes=keep_bytes)
        self._rules = rules
        self._always = always
        self._seconds = seconds

    def _read(
        self,
        path: str,
        info: MediaInfo,
        rows: npt.NDArray[np.int64],
        emit: Emit,
        threads: int,
        seen: set[int],
    ) -> set[int]:
        if not len(rows):
            return set()
        with nvdec_device.watched(2 * self._seconds):
            read = self._on_gpu(path, info, rows, emit)
        if read is None:
            self.name = "pyav"
            return super()._read(path, info, rows, emit, threads, seen)
        self.name = "nvdec"
        seen |= read.shown
        return read.decoded

    def _on_gpu(
        self, path: str, info: MediaInfo, rows: npt.NDArray[np.int64], emit: Emit
    ) -> Read | None:
        """Decode all ``rows`` on the GPU; None if that is not to be, or did not work."""
        table, video = info.packets, info.video
        assert table is not None
        assert video is not None
        worth = self._always or worth_it(self._rules, video.codec, work(table, rows, video))
        if not (table.exact and worth and nvdec_device.has_seat()):
            return None
        try:
            gpu = nvdec_device.gpu()
        except NoGpuError as error:
            self.note = str(error)[:_MAX_NOTE]
            return None
        if gpu.resting:
            return None
        try:
            lanes = lanes_for(ability_for(gpu, video), video, self._rules.memory_bytes)
            if not lanes:
                return None
            read = self._gpu_pass(path, table, video, rows, emit, lanes)
        except RefusedError:
            return None
        except Exception as error:
            # FFmpeg, the driver or PyAV: whatever it is, the CPU can do without them.
            gpu.failed()
            self.note = f"{type(error).__name__}: {error}"[:_MAX_NOTE]
            return None
        if len(read.decoded) < len(rows):
            # Of damaged files the CPU decoder says which frames there are.
            return None
        gpu.succeeded()
        return read

    def _gpu_pass(
        self,
        path: str,
        table: PacketTable,
        video: VideoStream,
        rows: npt.NDArray[np.int64],
        emit: Emit,
        lanes: int,
    ) -> Read:
        deadline = time.monotonic() + self._seconds

        def lane(part: npt.NDArray[np.int64]) -> Read:
            with _GpuReader(path, video, self._max_pixels, deadline) as reader:

                def fetched(row: int, frame: VideoFrame, converter: VideoReformatter) -> None:
                    emit(row, reader.fetch(frame), converter)

                runs = plan_runs(table, part)
                return read_planned(reader, table, runs, fetched, leave_out=False)

        parts = split_lanes(table, rows, lanes)
        if len(parts) == 1:
            return lane(rows)
        with ThreadPoolExecutor(len(parts)) as pool:
            results = list(pool.map(lane, parts))
        return Read(*(set[int]().union(*column) for column in zip(*results, strict=True)))


class _GpuReader(Reader):
    """A reader whose frames lie in GPU memory; any error of the decoder is raised.

    Args:
        path: The file.
        video: Its video stream.
        max_pixels: Most pixels of a picture.
        deadline: ``time.monotonic()`` value at which it gives up.
    """

    strict = True

    def __init__(self, path: str, video: VideoStream, max_pixels: int, deadline: float) -> None:
        super().__init__(path, video.index, max_pixels, threads=1)
        # PyAV does not open a file for a GPU of which no stream has a GPU decoder by default.
        hardware = None if video.codec == "av1" else nvdec_device.accelerator()
        self._opened = open_container(path, max_pixels=max_pixels, hardware=hardware)
        self._codec, self._format = video.codec, video.pixel_format
        self._deadline = deadline

    def __enter__(self) -> _GpuReader:
        super().__enter__()
        try:
            self._choose_decoder()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _choose_decoder(self) -> None:
        usual = self._stream.codec_context
        self._size = (usual.width, usual.height)
        if self._codec == "av1":
            # FFmpeg's usual decoder of AV1 is a library; its own one does nothing but drive a GPU.
            context = av.CodecContext.create("av1", "r", nvdec_device.accelerator())
            assert isinstance(context, VideoCodecContext)
            context.extradata = usual.extradata
            # PyAV has set the GPU's format, by which that decoder takes the GPU for set up already.
            context.pix_fmt = "yuv420p"
            context.options = {"max_pixels": str(ffmpeg_limit(self._max_pixels))}
            context.thread_count = 1
            self._context = context
        if not self._context.is_hwaccel:
            raise RefusedError("FFmpeg has no GPU decoder for the stream")

    def decode(self, packet: Packet[Any] | None, *, needed: bool = True) -> list[VideoFrame]:
        """As ``Reader.decode``.

        Raises:
            TimeoutError: The deadline is over.
            av.FFmpegError: The decoder failed.
        """
        if time.monotonic() > self._deadline:
            raise TimeoutError("the GPU took too long")
        return super().decode(packet, needed=needed)

    def fetch(self, frame: VideoFrame) -> VideoFrame:
        """A picture in host memory, as FFmpeg's own decoder would have returned it.

        Raises:
            RefusedError: That cannot be promised.
        """
        there = frame.sw_format
        if frame.format.name != "cuda" or there is None:
            raise RefusedError("the picture is not on the GPU")
        size = (frame.width, frame.height)
        if size != self._size or size[0] % 2 or size[1] % 2:
            # FFmpeg does not crop GPU pictures at the left and the top, and copies half of an odd
            # height, rounded down, of the chroma.
            raise RefusedError(f"a picture of {size}, of a video of {self._size}")
        if self._codec == "av1" and tone.curve_of(frame) is not None:
            # What the container says of an HDR picture does not reach this decoder.
            raise RefusedError("an HDR picture of AV1")
        return same_samples(frame, there.name, self._format, self.converter)


def same_samples(
    frame: VideoFrame, there: str, here: str, converter: VideoReformatter
) -> VideoFrame:
    """A picture with its samples laid out as another format has them, none of them changed.

    Args:
        frame: The picture, in GPU memory or in host memory.
        there: Its pixel format.
        here: The wanted pixel format.
        converter: Used by one thread at a time.

    Raises:
        RefusedError: The formats do not hold the same samples.
    """
    if (there, here) not in _SAME_SAMPLES:
        raise RefusedError(f"{there} in place of {here}")
    return converter.reformat(frame, format=here, threads=1)


# --- the rules ------------------------------------------------------------------------------------


def work(table: PacketTable, rows: npt.NDArray[np.int64], video: VideoStream) -> float:
    """Megapixels that have to be decoded to get ``rows``: whole runs from keyframes on.

    Args:
        table: Packet table with exact timestamps.
        rows: int64 ``[n]`` wanted rows, strictly increasing.
        video: The stream.
    """
    pictures = sum(run.num_packets for run in plan_runs(table, rows))
    return pictures * video.width * video.height / 1e6


def worth_it(rules: GpuRules, codec: str, megapixels: float) -> bool:
    """Whether the GPU is the faster one, by what was measured; nothing was: no."""
    least: Mapping[str, float] = dict(rules.from_megapixels)
    return codec in least and megapixels >= least[codec]


def ability_for(gpu: Gpu, video: VideoStream) -> Ability | None:
    """What the GPU can do with a stream; None: nothing, as for one without a readable picture."""
    if not video.pixel_format:
        return None
    kind = av.VideoFormat(video.pixel_format, 64, 64)
    if len(kind.components) != 3 or kind.is_rgb:  # Alpha and gray, too.
        return None
    size = (kind.chroma_width(64), kind.chroma_height(64))
    chroma = {(32, 32): "4:2:0", (32, 64): "4:2:2", (64, 64): "4:4:4"}.get(size, "other")
    return gpu.ability(video.codec, chroma, kind.components[0].bits)


def lanes_for(ability: Ability | None, video: VideoStream, memory_bytes: int) -> int:
    """How many decoders may work on a file at a time; 0: none.

    Args:
        ability: What the GPU can do with the stream.
        video: The stream.
        memory_bytes: GPU memory for the pictures of all decoders.
    """
    pixels = video.width * video.height
    if ability is None or pixels > ability.max_pixels:
        return 0
    if max(video.width, video.height) > max(ability.max_width, ability.max_height):
        return 0
    samples = {"4:2:0": 1.5, "4:2:2": 2.0}.get(ability.chroma, 3.0)
    one = _PICTURES * pixels * samples * (1 if ability.bits == 8 else 2)
    return min(max(1, ability.engines), _MAX_LANES, int(memory_bytes / one))
