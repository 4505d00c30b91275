"""A picture's colours, fields and transparency are shown as a player shows them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.picture import write_rgb, write_thumbnail
from vllm_mm_ext.media.types import (
    DecodeRequest,
    PictureRules,
    SamplingSpec,
    SizeRule,
    VideoStream,
)
from vllm_mm_ext.testing.media import make_clip

# FFmpeg's numbers of matrices, transfer functions and primaries.
BT709, UNKNOWN, BT601, YCGCO, BT2020, BT2020_CONSTANT = 1, 2, 6, 8, 9, 10
PQ, HLG = 16, 18
# Share of red and of blue in luma.
WEIGHTS = {BT709: (0.2126, 0.0722), BT601: (0.299, 0.114), BT2020: (0.2627, 0.0593)}
UPRIGHT = VideoStream(0, "h264", 64, 48, 0, 25.0, False, 1, 1.0, "")


def drawn(frame: av.VideoFrame, size: tuple[int, int] | None = None) -> np.ndarray:
    out = np.empty((*(size or (frame.height, frame.width)), 3), np.uint8)
    video = replace(UPRIGHT, width=frame.width, height=frame.height)
    write_rgb(frame, VideoReformatter(), video, PictureRules(), out)
    return out


def decoded(path: Path, *, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """The first picture of a file, at its native size."""
    sampling = SamplingSpec("explicit", indices=(0,))
    rules = PictureRules(background=background)
    frames = run_job(str(path), DecodeRequest(sampling, SizeRule(), picture=rules)).frames
    assert frames is not None
    return frames[0]


def encode(path: Path, codec: str, pixel_format: str, frames: list[av.VideoFrame], **options: str):
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = pixel_format
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# --- matrix and range -----------------------------------------------------------------------------


def flat(width: int, height: int, y: int, cb: int, cr: int, matrix: int, *, full: bool = False):
    """One colour everywhere, as 8-bit 4:2:0."""
    planes = np.full((height * 3 // 2, width), y, np.uint8)
    planes[height : height * 5 // 4] = cb
    planes[height * 5 // 4 :] = cr
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    frame.colorspace, frame.color_range = matrix, 2 if full else 0
    return frame


def expected(y: int, cb: int, cr: int, matrix: int, *, full: bool = False) -> np.ndarray:
    """The formula of BT.601, BT.709 and BT.2020, which differ by the weights."""
    red_share, blue_share = WEIGHTS[matrix]
    luma = y / 255 if full else (y - 16) / 219
    b, r = ((c - 128) / (255 if full else 224) for c in (cb, cr))
    red, blue = luma + 2 * (1 - red_share) * r, luma + 2 * (1 - blue_share) * b
    green = (luma - red_share * red - blue_share * blue) / (1 - red_share - blue_share)
    return np.array([red, green, blue]).clip(0, 1) * 255


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("size", "tagged", "shown"),
    [
        ((720, 576), UNKNOWN, BT601),
        ((1024, 576), UNKNOWN, BT601),
        ((1280, 532), UNKNOWN, BT709),
        ((960, 720), UNKNOWN, BT709),
        ((1920, 1080), BT601, BT601),
        ((320, 180), BT709, BT709),
        ((320, 180), BT2020, BT2020),
        ((320, 180), BT2020_CONSTANT, BT2020),
        ((320, 180), YCGCO, BT601),
        ((1280, 720), 3, BT709),
    ],
)
def test_the_matrix_is_that_of_the_tags_or_else_of_the_size(
    size: tuple[int, int], tagged: int, shown: int, full: bool
) -> None:
    color = (120, 100, 170)
    frame = flat(*size, *color, tagged, full=full)
    for target in (None, (48, 64)):
        picture = drawn(frame, target)
        assert np.abs(picture - expected(*color, shown, full=full)).max() <= 3


@pytest.mark.parametrize(
    ("name", "pixel_format", "tagged", "limited"),
    [
        ("libx265", "gray", 0, True),  # the encoder's default, as the standard's
        ("libx265", "gray", 2, False),
        ("libx265", "gray10le", 1, True),
        ("ffv1", "gray", 1, True),
        ("ffv1", "gray", 0, False),  # as in FFmpeg
    ],
)
def test_gray_is_shown_in_the_range_of_its_tags(
    tmp_path: Path, name: str, pixel_format: str, tagged: int, limited: bool
) -> None:
    values = np.repeat(np.array([[16, 126, 235]], np.uint8), 96, 0).repeat(64, 1)
    wide = values.astype(np.uint16) * 4 if pixel_format == "gray10le" else values
    frame = av.VideoFrame.from_ndarray(wide, format=pixel_format)
    frame.color_range = tagged
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream(name, rate=25)
        stream.width, stream.height, stream.pix_fmt = 192, 96, pixel_format
        stream.codec_context.color_range = tagged
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    picture = decoded(tmp_path / "a.mkv")[48, 32::64, 0]
    np.testing.assert_allclose(picture, [0, 128, 255] if limited else [16, 126, 235], atol=3)


def opencv(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).read()[1], cv2.COLOR_BGR2RGB)


def test_large_video_without_tags_differs_from_stock_by_the_matrix_alone(tmp_path: Path) -> None:
    """Stock's OpenCV takes all video for BT.601, which shifts the colours of HD."""
    color = (120, 100, 170)
    frames = [flat(1280, 720, *color, UNKNOWN)]
    path = encode(tmp_path / "a.mp4", "libx264", "yuv420p", frames, crf="1", preset="ultrafast")
    assert np.abs(opencv(path) - expected(*color, BT601)).mean() < 3
    assert np.abs(decoded(path) - expected(*color, BT709)).mean() < 3
    small = make_clip(tmp_path / "b.mp4", width=720, height=576, duration=0.1).path
    np.testing.assert_array_equal(decoded(small), opencv(small))


def test_resized_pictures_are_those_of_an_antialiased_resize(tmp_path: Path) -> None:
    """Signal to noise against the resize that the models' processors do."""
    import torch
    from torchvision.transforms.v2 import functional

    path = make_clip(tmp_path / "a.mp4", width=640, height=360, duration=0.1, quality=10).path
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    # As 4:4:4, the picture at its own size has chroma at full width.
    native = torch.from_numpy(drawn(frame.reformat(format="yuv444p"))).permute(2, 0, 1)
    for size in ((84, 140), (252, 448), (336, 616), (504, 896)):
        wanted = functional.resize(
            native, list(size), interpolation=functional.InterpolationMode.BICUBIC, antialias=True
        )
        error = drawn(frame, size).astype(float) - wanted.permute(1, 2, 0).numpy()
        assert 10 * np.log10(255**2 / (error**2).mean()) > 38


# --- interlaced material --------------------------------------------------------------------------


def moving(number: int) -> np.ndarray:
    """Slanted stripes that move 4 pixels a field, 64 high."""
    y, x = np.indices((96, 160))
    bright = np.sin((x + y / 2 - 4 * number) / 5) * 90 + 128
    return np.repeat(bright[..., None], 3, axis=2).astype(np.uint8)


def filtered(frames: list[av.VideoFrame], name: str, arguments: str) -> list[av.VideoFrame]:
    """Pictures sent through one of FFmpeg's filters."""
    graph, out, like = Graph(), [], frames[0]
    source = graph.add_buffer(
        width=like.width, height=like.height, format=like.format, time_base=Fraction(1, 25)
    )
    graph.link_nodes(source, graph.add(name, arguments), graph.add("buffersink")).configure()
    for frame in [*frames, None]:
        graph.vpush(frame)
        try:
            while True:
                out.append(graph.vpull())
        except (av.BlockingIOError, av.EOFError):
            pass
    return out


@pytest.mark.parametrize("first", [0, 1], ids=["top first", "bottom first"])
def test_combing_is_gone_nearly_as_if_the_neighbours_had_been_there(
    tmp_path: Path, first: int
) -> None:
    frames = []
    for number in range(6):
        woven = moving(2 * number)
        woven[1 - first :: 2] = moving(2 * number + 1)[1 - first :: 2]
        frames.append(av.VideoFrame.from_ndarray(woven).reformat(format="yuv420p"))
    flagged = filtered(frames, "setfield", "bff" if first else "tff")
    path = encode(tmp_path / "a.ts", "libx264", "yuv420p", flagged, crf="4", flags="+ilme+ildct")
    sampling = SamplingSpec("explicit", indices=(3,))
    pictures = run_job(str(path), DecodeRequest(sampling, SizeRule())).frames
    assert pictures is not None

    with av.open(str(path)) as container:
        known = filtered(list(container.decode(video=0)), "bwdif", "mode=send_frame")
    truth, combed = moving(6).astype(float), frames[3].to_ndarray(format="rgb24").astype(float)

    def error(picture: np.ndarray) -> float:
        return float(np.abs(picture[4:-4] - truth[4:-4]).mean())

    assert error(pictures[0]) < 0.2 * error(combed)
    assert error(pictures[0]) < error(known[3].to_ndarray(format="rgb24")) + 1


# --- HDR and wide gamut ---------------------------------------------------------------------------

TO_BT2020 = np.array(  # Recommendation ITU-R BT.2087.
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)


def pq(luminance: np.ndarray) -> np.ndarray:
    """Code values 0 to 1 of cd/m2 (SMPTE ST 2084)."""
    power = (luminance / 10000) ** (2610 / 16384)
    return ((3424 + 2413 * 32 * power) / (4096 + 2392 * 32 * power)) ** (2523 / 32)


def patch(codes: np.ndarray, transfer: int, primaries: int) -> av.VideoFrame:
    """One colour everywhere, as 16-bit R'G'B'."""
    pixels = np.broadcast_to(np.round(codes * 65535).astype(np.uint16), (16, 16, 3))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb48le")
    frame.color_trc, frame.color_primaries = transfer, primaries
    return frame


@pytest.mark.parametrize("color", [(1, 1, 1), (1, 0.1, 0.1), (0.1, 1, 0.2), (0.2, 0.1, 1)])
@pytest.mark.parametrize("luminance", [5.0, 20.0, 60.0])
def test_pq_up_to_middle_tones_is_shown_as_bright_as_it_was_mastered(
    color: tuple[float, ...], luminance: float
) -> None:
    linear = np.array(color) * luminance
    picture = drawn(patch(pq(TO_BT2020 @ linear), PQ, BT2020))
    wanted = 255 * (linear / 203) ** (1 / 2.4)
    assert np.abs(picture - wanted).max() <= 3


def test_pq_highlights_are_compressed_and_none_is_lost_below_the_peak() -> None:
    steps = [50.0, 100.0, 203.0, 400.0, 1000.0, 4000.0]
    shown = [int(drawn(patch(pq(np.full(3, s)), PQ, BT2020))[0, 0, 1]) for s in steps]
    assert shown == sorted(shown)
    assert len(set(shown[:5])) == 5
    assert shown[4] == shown[5] == 255
    assert 200 < shown[2] < 245


def hlg(scene: np.ndarray) -> np.ndarray:
    """Code values of linear light of the scene, 0 to 1 (Recommendation ITU-R BT.2100)."""
    bent = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bent)


def test_hlg_and_pq_of_one_scene_look_alike() -> None:
    for color in ((0.02, 0.02, 0.02), (0.1, 0.05, 0.02), (0.3, 0.3, 0.3)):
        scene = np.array(color)
        luminance = scene @ (0.2627, 0.6780, 0.0593)
        display = 1000 * luminance**0.2 * scene
        both = [
            drawn(patch(codes, transfer, BT2020)).astype(int)
            for codes, transfer in ((hlg(scene), HLG), (pq(display), PQ))
        ]
        assert np.abs(both[0] - both[1]).max() <= 2


def test_colours_of_bt2020_are_those_of_bt709_where_both_have_them() -> None:
    linear = np.array([0.5, 0.1, 0.2])
    picture = drawn(patch((TO_BT2020 @ linear) ** (1 / 2.4), BT709, BT2020))
    assert np.abs(picture - 255 * linear ** (1 / 2.4)).max() <= 3


def test_a_10_bit_pq_file_is_tone_mapped(tmp_path: Path) -> None:
    linear = np.array([60.0, 20.0, 40.0])
    frames = [
        patch(pq(TO_BT2020 @ linear), PQ, BT2020).reformat(
            width=64, height=64, format="yuv420p10le", dst_colorspace=BT2020
        )
        for _ in range(2)
    ]
    params = "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    path = encode(tmp_path / "a.mkv", "libx265", "yuv420p10le", frames, **{"x265-params": params})
    assert np.abs(decoded(path) - 255 * (linear / 203) ** (1 / 2.4)).mean() < 3


# --- transparent pictures -------------------------------------------------------------------------

TRANSPARENT = {
    "vp9": ("a.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "0"}),
    "vp8": ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4"}),
    "png in mov": ("a.mov", "png", "rgba", {}),
    "animated png": ("a.apng", "apng", "rgba", {}),
    "prores": ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    "ffv1": ("a.mkv", "ffv1", "yuva420p", {}),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_the_background_shows_through_transparent_video(tmp_path: Path, kind: str) -> None:
    name, codec, pixel_format, options = TRANSPARENT[kind]
    rgba = np.zeros((48, 96, 4), np.uint8)
    rgba[...] = (200, 40, 80, 255)
    rgba[:, 32:64, 3] = 128
    rgba[:, 64:] = (0, 255, 0, 0)
    frames = [
        av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixel_format)
        for _ in range(3)
    ]
    path = encode(tmp_path / name, codec, pixel_format, frames, **options)
    for background in ((0, 0, 0), (255, 255, 0)):
        picture = decoded(path, background=background).astype(int)
        for start, alpha in ((4, 1.0), (36, 128 / 255), (68, 0.0)):
            wanted = alpha * np.array([200, 40, 80]) + (1 - alpha) * np.array(background)
            assert np.abs(picture[4:44, start : start + 24] - wanted).mean() < 4


def test_hdr_over_a_background_is_tone_mapped_and_the_background_is_not(tmp_path: Path) -> None:
    linear = np.array([60.0, 20.0, 40.0])
    rgba = np.zeros((48, 96, 4), np.uint16)
    rgba[..., :3] = np.round(65535 * pq(TO_BT2020 @ linear))
    rgba[..., 3] = 65535
    rgba[:, 32:64, 3] = 128 * 257
    rgba[:, 64:] = (0, 65535, 0, 0)
    frame = av.VideoFrame.from_ndarray(rgba, format="rgba64le").reformat(
        format="yuva444p10le", dst_colorspace=BT2020
    )
    frame.color_trc, frame.color_primaries = PQ, BT2020
    options = {
        "profile": "4444",
        "color_trc": "smpte2084",
        "color_primaries": "bt2020",
        "colorspace": "bt2020nc",
    }
    path = encode(tmp_path / "a.mov", "prores_ks", "yuva444p10le", [frame], **options)
    color = 255 * (linear / 203) ** (1 / 2.4)
    for background in ((0, 0, 0), (120, 255, 0)):
        picture = decoded(path, background=background).astype(int)
        for start, alpha in ((4, 1.0), (36, 128 / 255), (68, 0.0)):
            wanted = alpha * color + (1 - alpha) * np.array(background)
            assert np.abs(picture[4:44, start : start + 24] - wanted).mean() < 4


# --- thumbnails -----------------------------------------------------------------------------------


def slopes() -> av.VideoFrame:
    """Luma that rises downwards, Cb that rises to the right, Cr that rises downwards."""
    planes = np.empty((540, 640), np.uint8)
    rows, columns = np.mgrid[:360, :640]
    planes[:360] = 80 + rows // 4
    cb, cr = planes[360:].reshape(2, 180, 320)
    cb[:], cr[:] = 100 + columns[::2, ::2] // 12, 110 + rows[::2, ::2] // 8
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    frame.colorspace = BT601
    return frame


def thumbnail(frame: av.VideoFrame, video: VideoStream = UPRIGHT) -> np.ndarray:
    height, width = (36, 64) if video.rotation % 180 == 0 else (64, 36)
    out = np.empty((height * 3 // 2, width), np.uint8)
    write_thumbnail(frame, (VideoReformatter(), VideoReformatter()), video, out)
    chroma = out[height:].reshape(2, height // 2, width // 2)
    return np.stack([out[:height], *chroma.repeat(2, axis=1).repeat(2, axis=2)]).astype(int)


@pytest.mark.parametrize("pixel_format", ["nv12", "yuv422p", "yuv444p10le", "rgb24", "bgra"])
def test_thumbnails_of_all_formats_show_the_same(pixel_format: str) -> None:
    other = slopes().reformat(format=pixel_format, src_colorspace=BT601)
    other.colorspace = BT601
    expected, shown = thumbnail(slopes()), thumbnail(other)
    assert (np.ptp(expected, axis=(1, 2)) > (90, 45, 40)).all()
    # Chroma of limited range, which spans less, is compared as it is.
    assert (np.abs(shown - expected).max(axis=(1, 2)) <= (3, 8, 8)).all()


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_thumbnails_are_as_upright_as_the_frames(rotation: int, mirrored: bool) -> None:
    width, height = (640, 360) if rotation in (0, 180) else (360, 640)
    video = replace(UPRIGHT, width=width, height=height, rotation=rotation, mirrored=mirrored)
    small = thumbnail(slopes(), video)
    frame = np.empty((*small.shape[1:], 3), np.uint8)
    write_rgb(slopes(), VideoReformatter(), video, PictureRules(), frame)
    luma = frame @ np.array([0.299, 0.587, 0.114])
    for plane, seen in zip(small, (luma, frame[..., 2] - luma, frame[..., 0] - luma), strict=True):
        assert np.corrcoef(plane.ravel(), seen.ravel())[0, 1] > 0.99
