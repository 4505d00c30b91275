"""From a decoded picture to the pixels that a player would show, at the size that is wanted."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Literal, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from vllm_mm_ext.media.decode import tone
from vllm_mm_ext.media.decode.shared_array import put
from vllm_mm_ext.media.types import PictureRules, VideoStream

# Sizes of pictures that broadcasters send, mostly of pixels that are not square.
_BROADCAST = frozenset(
    [(w, h) for w in (352, 480, 528, 544, 704, 720) for h in (480, 576)] + [(1440, 1080)]
)
# A picture that would fill a side but for this part of it, and so many pixels, is made to fill it.
_SHORT, _SHORT_PIXELS = 0.04, 1.5

T = TypeVar("T", bound=np.generic)

# FFmpeg's numbers of matrices (AVCOL_SPC_*), as swscale names them. The constant-luminance variant
# of BT.2020, which swscale does not know, is shown with the usual one.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_LIMITED_RANGE, _FULL_RANGE = 1, 2

# At the source's own size, swscale converts 8-bit 4:2:0 by a fast path, which OpenCV uses as well.
_SAME_SIZE = Interpolation.BICUBIC
_FAST_FORMATS = ("yuv420p", "yuvj420p")
# Formats of 8 bits with luma in the first plane and chroma of half its size in the others.
_YUV420 = ("yuv420p", "yuvj420p", "nv12")
# Lines of luma that make a line of the thumbnail. With two, edges that move flicker twice as much.
_LINES = 4
_TO_FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)
# Without FULL_CHR_H_INT, swscale makes RGB of chroma at half the width of the result: 28 to 43 dB
# against an antialiased resize of the full picture, with it 43 to 53 dB. For shrinking, AREA is as
# good as bicubic to the eye (44 to 53 dB) in half the time; for enlarging, bicubic is better.
_SHRINK = Interpolation.AREA | Interpolation.FULL_CHR_H_INT
_ENLARGE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT


def write_rgb(
    frame: VideoFrame,
    converter: VideoReformatter,
    video: VideoStream,
    rules: PictureRules,
    target: npt.NDArray[np.uint8],
) -> None:
    """Write a picture as it is displayed: upright, progressive, in SDR, opaque.

    Args:
        frame: The decoded picture.
        converter: Used by one thread at a time.
        video: The stream's description.
        rules: What the operator chose.
        target: uint8 ``[height, width, 3]``, written in place. The picture is scaled to it, or,
            where its shape is another than that of the video, fitted into it over the background.
    """
    out = _as_decoded(target, video)
    # swscale takes all gray for full range. HEVC, AV1 and others may tag it as limited.
    limited = frame.color_range == _LIMITED_RANGE and frame.format.name.startswith("gray")
    frame = _restored(frame, video)
    out = _fitted(out, frame, video, rules.background)
    curve = tone.curve_of(frame)
    if _may_be_transparent(frame):
        frame, curve = _over(frame, converter, rules.background, curve), None
    if curve is None:
        _copy(_scaled(frame, converter, out, "gbrp"), out, limited=limited)
    else:
        codes = _packed(_scaled(frame, converter, out, "rgb48le"), np.uint16)
        shown = np.empty(out.shape, np.uint8)
        tone.write_sdr(codes, curve, shown)
        put(out, shown)


def write_thumbnail(
    frame: VideoFrame,
    converters: tuple[VideoReformatter, VideoReformatter],
    video: VideoStream,
    target: npt.NDArray[np.uint8],
) -> None:
    """Write a thumbnail by which pictures are compared: brightness, and differences of colour.

    Args:
        frame, video: As for ``write_rgb``.
        converters: For luma and for chroma, as each remembers one pair of sizes. Used by one thread
            at a time.
        target: uint8 ``[height * 3 / 2, width]``, written in place: Y in full range, then Cb and Cr
            of half the height and half the width. Both are even.
    """
    height, width = target.shape[0] * 2 // 3, target.shape[1]
    chroma = target[height:].reshape(2, height // 2, width // 2)
    outs = [_as_decoded(plane, video) for plane in (target[:height], *chroma)]
    known = frame.format.name in _YUV420
    found = (_few_samples if known else _all_samples)(frame, converters, *outs[0].shape)
    for out, samples in zip(outs, found, strict=True):
        out[...] = samples
    if not known or frame.color_range != _FULL_RANGE:
        _TO_FULL_RANGE.take(target[:height], out=target[:height], mode="clip")


def _all_samples(
    frame: VideoFrame,
    converters: tuple[VideoReformatter, VideoReformatter],
    height: int,
    width: int,
) -> list[npt.NDArray[np.uint8]]:
    """A picture shrunk to 4:2:0 in limited range: its three planes."""
    matrix = matrix_of(frame)
    small = converters[0].reformat(
        frame,
        width=width,
        height=height,
        format="yuv420p",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        dst_color_range=ColorRange.MPEG,
        interpolation=_SHRINK,
        threads=1,
    )
    luma, *chroma = _planes(small)
    return [luma[:, :width], *(plane[:, : width // 2] for plane in chroma)]


def _few_samples(
    frame: VideoFrame,
    converters: tuple[VideoReformatter, VideoReformatter],
    height: int,
    width: int,
) -> list[npt.NDArray[np.uint8]]:
    """The same of some lines of 8-bit 4:2:0, in the range that they have.

    swscale takes as long for a line to be shrunk as for a line that it makes. Luma is not copied;
    Cb and Cr are shrunk as one picture, Cr below Cb.
    """
    luma, *chroma = _planes(frame)
    if len(chroma) == 1:
        chroma = [chroma[0][:, 0::2], chroma[0][:, 1::2]]
    step = max(1, frame.height // (_LINES * height))
    small = _shrunk(luma[::step, : frame.width], converters[0], height, width)
    step, half = max(1, frame.height // 2 // height), -(-frame.width // 2)
    lines = np.concatenate([plane[::step, :half] for plane in chroma])
    colours = _shrunk(lines, converters[1], height, width // 2)
    return [small, *colours.reshape(2, height // 2, width // 2)]


def _shrunk(
    lines: npt.NDArray[np.uint8], converter: VideoReformatter, height: int, width: int
) -> npt.NDArray[np.uint8]:
    small = converter.reformat(
        VideoFrame.from_numpy_buffer(lines, format="gray"),
        width=width,
        height=height,
        format="gray",
        interpolation=_SHRINK,
        threads=1,
    )
    return _planes(small)[0][:, :width]


def _planes(frame: VideoFrame) -> list[npt.NDArray[np.uint8]]:
    """Views of the planes of 8 bits, with what pads their lines."""
    planes = frame.planes
    return [np.frombuffer(memoryview(p), np.uint8).reshape(-1, p.line_size) for p in planes]


def is_plain(frame: VideoFrame) -> bool:
    """Whether any decoder shows a picture right that knows 8-bit BT.601 in limited range alone."""
    return (
        frame.format.name == "yuv420p"
        and frame.color_range != _FULL_RANGE
        and matrix_of(frame) == Colorspace.ITU601
        and not frame.interlaced_frame
        and tone.curve_of(frame) is None
    )


def matrix_of(frame: VideoFrame) -> Colorspace:
    """The matrix between a picture's YUV and RGB.

    That of its tags; where tags say nothing, as in mpv, BT.709 for pictures at least 1280 wide or
    more than 576 high, and BT.601 for smaller ones.
    """
    tagged = _MATRICES.get(frame.colorspace)
    if tagged is not None:
        return tagged
    large = frame.width >= 1280 or frame.height > 576
    return Colorspace.ITU709 if large else Colorspace.ITU601


def _as_decoded(target: npt.NDArray[np.uint8], video: VideoStream) -> npt.NDArray[np.uint8]:
    """View of ``target`` in which the picture lies as it was decoded."""
    view = np.rot90(target, video.rotation // 90)
    return view[:, ::-1] if video.mirrored else view


def _fitted(
    out: npt.NDArray[np.uint8],
    frame: VideoFrame,
    video: VideoStream,
    background: tuple[int, int, int],
) -> npt.NDArray[np.uint8]:
    """View of the part of ``out`` that a picture fills; the rest becomes background.

    That is all of it, unless the shape of pictures changes midway: a phone was turned. Where pixels
    may not be square, the shape is not known.
    """
    width, height = video.width, video.height
    if video.rotation in (90, 270):
        width, height = height, width
    wide = frame.width * height / (frame.height * width)
    across, down = min(1.0, wide), min(1.0, 1 / wide)
    is_known = video.sample_aspect == 1 and (frame.width, frame.height) not in _BROADCAST
    missing = max(width * (1 - across - _SHORT), height * (1 - down - _SHORT))
    if missing <= _SHORT_PIXELS or not is_known:
        return out
    out[...] = background
    rows, columns = (
        max(1, round(n * part)) for n, part in zip(out.shape, (down, across), strict=False)
    )
    top, left = (out.shape[0] - rows) // 2, (out.shape[1] - columns) // 2
    return out[top : top + rows, left : left + columns]


def _scaled(
    frame: VideoFrame,
    converter: VideoReformatter,
    out: npt.NDArray[np.uint8],
    pixel_format: Literal["gbrp", "rgb48le"],
) -> VideoFrame:
    """The picture at the size of ``out``; by the fast path, "rgb24" instead of "gbrp"."""
    height, width = out.shape[:2]
    same_size = (width, height) == (frame.width, frame.height)
    as_format: Literal["rgb24", "gbrp", "rgb48le"] = pixel_format
    if same_size and frame.format.name in _FAST_FORMATS and pixel_format == "gbrp":
        interpolation, as_format = _SAME_SIZE, "rgb24"
    elif width * height < frame.width * frame.height:
        interpolation = _SHRINK
    else:
        interpolation = _ENLARGE
    return converter.reformat(
        frame,
        width=width,
        height=height,
        format=as_format,
        src_colorspace=matrix_of(frame),
        interpolation=interpolation,
        threads=1,
    )


def _copy(frame: VideoFrame, out: npt.NDArray[np.uint8], *, limited: bool) -> None:
    """Copy an RGB picture, packed or planar, to ``[height, width, 3]``; ``limited`` is expanded.

    With chroma at full width, swscale makes planes with SIMD and packed pixels without: to 1036x588
    the same bytes take 1.3 ms as planes and 5 ms packed.
    """
    if len(frame.planes) == 1:
        put(out, _packed(frame, np.uint8))
        return
    pixels = np.empty(out.shape, np.uint8)
    for plane, channel in zip(frame.planes, (1, 2, 0), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)
        pixels[..., channel] = rows[:, : frame.width]
    put(out, _TO_FULL_RANGE[pixels] if limited else pixels)


def _packed(frame: VideoFrame, dtype: type[T]) -> npt.NDArray[T]:
    """View ``[height, width, channels]`` of a picture of one plane."""
    rows = np.frombuffer(memoryview(frame.planes[0]), dtype).reshape(frame.height, -1)
    channels = len(frame.format.components)
    pixels: npt.NDArray[T] = rows[:, : frame.width * channels]
    return pixels.reshape(frame.height, frame.width, channels)


# --- interlaced and cropped pictures --------------------------------------------------------------


def _restored(frame: VideoFrame, video: VideoStream) -> VideoFrame:
    """The picture without combing, and without what the container cuts off.

    Frames are chosen far apart, so only the picture itself is there to fill its second field in.
    Of FFmpeg's filters, w3fdif does that best: within 1.2 dB of bwdif, which has the neighbours.
    """
    left, right, top, bottom = video.crop
    width, height = frame.width - left - right, frame.height - top - bottom
    filters: list[tuple[str, str]] = []
    if frame.interlaced_frame and min(frame.width, frame.height) > 3:
        filters.append(("w3fdif", "mode=frame:deint=interlaced"))
    if any(video.crop) and width > 0 and height > 0:
        filters.append(("crop", f"{width}:{height}:{left}:{top}:exact=1"))
    return _filtered(frame, filters) if filters else frame


def _filtered(frame: VideoFrame, filters: list[tuple[str, str]]) -> VideoFrame:
    """A single picture sent through FFmpeg's filters, given by name and arguments."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=Fraction(1, 1000),
    )
    nodes = [graph.add(name, arguments) for name, arguments in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink"))
    graph.configure()
    graph.vpush(frame)
    graph.vpush(None)
    return graph.vpull()


# --- alpha ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _has_alpha(name: str) -> bool:
    kind = av.VideoFormat(name)
    return kind.has_palette or any(component.is_alpha for component in kind.components)


def _may_be_transparent(frame: VideoFrame) -> bool:
    return _has_alpha(frame.format.name)


def _over(
    frame: VideoFrame,
    converter: VideoReformatter,
    background: tuple[int, int, int],
    curve: tone.Curve | None,
) -> VideoFrame:
    """The picture in SDR over a background; at its own size, so that hidden colours do not bleed.

    The background is a colour of SDR, so an HDR picture is converted before it is laid over it.
    """
    rgba = converter.reformat(
        frame,
        format="rgba" if curve is None else "rgba64le",
        src_colorspace=matrix_of(frame),
        interpolation=_ENLARGE,
        threads=1,
    )
    mixed = np.empty((frame.height, frame.width, 3), np.uint8)
    if curve is None:
        pixels = _packed(rgba, np.uint8)
        colours, alphas = pixels[..., :3], pixels[..., 3:]
    else:
        codes = _packed(rgba, np.uint16)
        tone.write_sdr(codes[..., :3], curve, mixed)
        colours, alphas = mixed, (codes[..., 3:] >> 8).astype(np.uint8)
    for colour, opacity, out in zip(colours, alphas, mixed, strict=True):
        alpha = opacity.astype(np.uint16)
        behind = np.array(background, np.uint16) * (255 - alpha)
        out[...] = (colour * alpha + behind + 127) // 255
    return VideoFrame.from_ndarray(mixed, format="rgb24")
