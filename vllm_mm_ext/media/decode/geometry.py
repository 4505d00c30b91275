"""How a video's pictures lie on the screen: cropping, shape of the pixels, turns and mirrors."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Stream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream as AvVideoStream

from vllm_mm_ext.media.decode import tone
from vllm_mm_ext.media.decode.container import dumped, open_container
from vllm_mm_ext.media.decode.packets import demux
from vllm_mm_ext.media.decode.picture import is_plain
from vllm_mm_ext.media.decode.pixel_limit import check_pixels, ffmpeg_limit
from vllm_mm_ext.media.types import MediaInfo, PictureRules, VideoStream

# Packets that are tried for a first picture, from the first keyframe on.
_MAX_PACKETS = 64
# Nobody looks at the picture's pixels; without these steps it takes an eighth less.
_NO_PIXELS = {"skip_idct": "all", "skip_loop_filter": "all"}
# FFmpeg turns a picture whose matrix is this near to a quarter turn by that quarter turn.
_TOLERANCE_DEGREES = 1.0
# Pictures of which the ratios of sides differ by no more have one shape: sides are rounded.
_SAME_SHAPE = 0.02
# A picture of a larger part of the width that the container says has been cropped, not shrunk.
_SHRUNK = 0.9
# The native decoders of VP8 and VP9 leave the second stream of pictures out, which holds the alpha.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def displayed(path: str, info: MediaInfo, max_pixels: int, rules: PictureRules) -> MediaInfo:
    """Complete a description with how the video is displayed.

    Containers leave out what bitstreams say (the size behind H.264's cropping, the shape of pixels
    in transport streams, the orientation in an SEI message), so one picture is decoded: 1 ms at
    360p, 18 ms at 1080p.

    Args:
        path: The file.
        info: What its container says; the size of the video is the one of its pictures as stored.
        max_pixels: Most pixels of a picture.
        rules: Whether pictures are stretched.

    Returns:
        ``info`` with the displayed size of the video, and its orientation, pixel aspect and crop.

    Raises:
        MediaTooLargeError: The picture has more than ``max_pixels`` pixels.
    """
    video = info.video
    if video is None:
        return info
    with open_container(path, max_pixels=max_pixels) as container:
        streams = container.streams
        stream = streams[video.index] if video.index < len(streams) else None
        if not isinstance(stream, AvVideoStream):
            # FFmpeg finds the streams of some formats only by decoding.
            return info
        aspect, crop = stream.sample_aspect_ratio, _cropping(container, video.index)
        decoder = decoder_of(stream)
        decoder.options = {"max_pixels": str(ffmpeg_limit(max_pixels)), **_NO_PIXELS}
        decoder.thread_count = 1
        packets = demux(container, stream)
        picture, said = _first_picture(decoder, _from_keyframe(packets))
        # Calls begin with small pictures until the line proves good.
        grows = (
            picture is not None
            and not any(crop)
            and _is_smaller(picture, video)
            and _grows(decoder, packets, video)
        )
    width, height, rotation, mirrored, plain = video.width, video.height, 0, False, True
    if picture is not None:
        check_pixels(picture.width, picture.height, max_pixels)
        width, height, plain = picture.width, picture.height, is_plain(picture)
        rotation, mirrored = orientation(picture)
        if grows:
            width, height, plain = video.width, video.height, False
    if crop[0] + crop[1] >= width or crop[2] + crop[3] >= height:
        crop = (0, 0, 0, 0)
    width, height = width - crop[0] - crop[1], height - crop[2] - crop[3]
    # As in FFmpeg, what the container says counts before what the bitstream says.
    shape = float(next((ratio for ratio in (aspect, said) if ratio and ratio > 0), 1))
    if rules.stretch:
        width, height = stretched(width, height, shape, max_pixels)
        plain = plain and shape == 1.0
    if rotation in (90, 270):
        width, height = height, width
    shown = replace(
        video,
        width=width,
        height=height,
        pixel_format=video.pixel_format if picture is None else picture.format.name,
        rotation=rotation,
        mirrored=mirrored,
        sample_aspect=shape,
        crop=crop,
        plain=plain and not rotation and not mirrored and not any(crop),
    )
    return replace(info, video=shown)


def _is_smaller(picture: VideoFrame, video: VideoStream) -> bool:
    """Whether a picture is smaller than the container says, and of the shape that it says."""
    ratio = picture.width * video.height / (picture.height * video.width)
    return picture.width <= _SHRUNK * video.width and abs(ratio - 1) <= _SAME_SHAPE


def _grows(decoder: VideoCodecContext, packets: Iterator[Packet[Any]], video: VideoStream) -> bool:
    """Whether a picture of the size that the container says follows, among the next keyframes."""
    with contextlib.suppress(av.FFmpegError):
        for packet in islice((packet for packet in packets if packet.is_keyframe), _MAX_PACKETS):
            picture, _ = _first_picture(decoder, iter([packet]))
            if picture and (picture.width, picture.height) == (video.width, video.height):
                return True
    return False


def stretched(width: int, height: int, aspect: float, max_pixels: int) -> tuple[int, int]:
    """Size at which a picture of non-square pixels has its display shape, in square pixels.

    One side is enlarged, so that no pixel is lost, as players do; where the picture would have more
    than ``max_pixels`` then, the other side is made smaller instead.

    Args:
        width, height: Size of the picture in its own pixels.
        aspect: Width of one of these pixels divided by its height.
        max_pixels: Most pixels of the result.

    Returns:
        ``(width, height)``.
    """
    wide, high = round(width * max(1.0, aspect)), round(height * max(1.0, 1.0 / aspect))
    if wide * high > max_pixels:
        wide, high = round(width * min(1.0, aspect)), round(height * min(1.0, 1.0 / aspect))
    return max(1, wide), max(1, high)


def orientation(picture: VideoFrame) -> tuple[int, bool]:
    """How a picture is turned for display.

    Returns:
        The clockwise rotation, 0, 90, 180 or 270 degrees, and whether the picture is mirrored left
        to right before it is rotated. Other angles count as 0.
    """
    matrix = tone.side_data(picture).get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        # FFmpeg's angle is counter-clockwise.
        return _quarter_turn(-picture.rotation), False
    # A point (x, y) of the picture is shown at (a x + c y, b x + d y), y pointing down.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return _quarter_turn(math.degrees(math.atan2(b, a))), mirrored


def _quarter_turn(degrees: float) -> int:
    turned = 90 * round(degrees / 90)
    return turned % 360 if abs(degrees - turned) <= _TOLERANCE_DEGREES else 0


def decoder_of(stream: Stream) -> VideoCodecContext:
    """The decoder for a stream: FFmpeg's usual one, or one that keeps the stream's alpha channel.

    Args:
        stream: A video stream of an open container.
    """
    usual = stream.codec_context
    assert isinstance(usual, VideoCodecContext)
    # Without this FFmpeg rounds what it cuts off at the left down to a multiple of 32 or more.
    usual.flags |= Flags.unaligned
    name = _ALPHA_DECODERS.get(usual.codec.canonical_name)
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if name is None or tags.get("alpha_mode") != "1":
        return usual
    try:
        context = av.CodecContext.create(name, "r")
    except ValueError:
        # This FFmpeg was built without libvpx.
        return usual
    assert isinstance(context, VideoCodecContext)
    return context


def _first_picture(
    decoder: VideoCodecContext, packets: Iterator[Packet[Any]]
) -> tuple[VideoFrame | None, Fraction | None]:
    """The first picture of some packets that decodes, and the pixel aspect of the bitstream."""
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return None, None
            pictures = decoder.decode(packet)
            if not pictures and packet.is_keyframe:
                # A decoder holds its first picture back, in case an earlier one follows.
                pictures = decoder.decode(None)
                decoder.flush_buffers()
        except av.EOFError:
            return None, None
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            continue
        if pictures:
            return pictures[0], decoder.sample_aspect_ratio


def _from_keyframe(packets: Iterator[Packet[Any]]) -> Iterator[Packet[Any]]:
    """The packets to try: what comes before the first keyframe of a stream joined midway is none.

    Where no packet is marked as a keyframe, they are the first of all.
    """
    early: list[Packet[Any]] = []
    with contextlib.suppress(av.FFmpegError):
        # The probe has refused files of very many packets.
        for packet in packets:
            if packet.is_keyframe:
                return islice(chain([packet], packets), _MAX_PACKETS)
            if len(early) < _MAX_PACKETS:
                early.append(packet)
    return iter(early)


def _cropping(container: InputContainer, index: int) -> tuple[int, int, int, int]:
    """Columns and rows that a container cuts off its pictures: left, right, top, bottom.

    These are the clean aperture of MP4 and the cropping of Matroska.
    """
    for section in re.split(r"^  Stream ", dumped(container), flags=re.MULTILINE)[1:]:
        if re.match(rf"#0:{index}\D", section):
            pattern = r"^      Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)$"
            found = re.search(pattern, section, re.IGNORECASE | re.MULTILINE)
            if found:
                left, right, top, bottom = (int(number) for number in found.groups())
                return left, right, top, bottom
    return 0, 0, 0, 0
