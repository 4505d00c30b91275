"""Pictures and camera frames: checked by their content, bounded, upright, whole."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vllm_mm_ext.errors import (
    MediaError,
    MediaTooLargeError,
    UnreadableMediaError,
    UnsupportedFormatError,
)
from vllm_mm_ext.live.client_events import VideoAppend
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.watching import Sight, Watcher, read_image
from vllm_mm_ext.media.types import SizeRule

MAX_PIXELS = 1_000_000
FORMATS = ("JPEG", "PNG", "WEBP")


def family(rule: SizeRule) -> FamilyTraits:
    return FamilyTraits(
        hears=True,
        sees=True,
        images=True,
        audio_rate=16_000,
        unit_s=2.0,
        frame_multiple=2,
        fps=1.0,
        size_rule=rule,
        turn_end=False,
    )


def see(image: bytes, rule: SizeRule | None = None) -> Sight:
    return Watcher(family(rule or SizeRule()), MAX_PIXELS).see(VideoAppend(None, image, None))


def pixels_of(image: bytes) -> npt.NDArray[np.uint8]:
    """Of a picture of an item."""
    return np.asarray(read_image(image, MAX_PIXELS).image)


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """Colours that tell the corners from each other."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * columns / width, 255 * rows / height
    return Image.fromarray(np.stack([red, green, 0 * red + 40], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


READERS: list[Callable[[bytes], npt.NDArray[np.uint8]]] = [
    lambda image: see(image).pixels,
    pixels_of,
]


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("read", READERS)
def test_a_file_of_each_format_is_read_as_it_is(
    image_format: str, read: Callable[[bytes], npt.NDArray[np.uint8]]
) -> None:
    image = picture()
    pixels = read(encoded(image, image_format))
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), np.asarray(image).astype(int), atol=20)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused_by_their_content(
    image_format: str, read: Callable[[bytes], npt.NDArray[np.uint8]]
) -> None:
    with pytest.raises(UnsupportedFormatError, match="not a JPEG, PNG or WebP"):
        read(encoded(picture(), image_format))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("image", [b"", b"\x00", b"RIFF0000WEBP", b"\xff\xd8\xff", b"\x89PNG\r\n"])
def test_bytes_that_are_no_image_are_an_error(
    image: bytes, read: Callable[[bytes], npt.NDArray[np.uint8]]
) -> None:
    with pytest.raises(UnreadableMediaError):
        read(image)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_that_is_cut_short_is_an_error_wherever_it_is_cut(
    image_format: str, read: Callable[[bytes], npt.NDArray[np.uint8]]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), image_format)
    for tenths in range(10):
        with pytest.raises(UnreadableMediaError):
            read(whole[: len(whole) * tenths // 10])


@pytest.mark.parametrize("image_format", FORMATS)
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_bytes_are_an_image_or_a_clear_error(
    image_format: str, data: st.DataObject
) -> None:
    image = bytearray(encoded(picture(), image_format))
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    for read in READERS:
        try:
            pixels = read(bytes(image))
        except MediaError as error:
            assert error.parameter == "image"  # noqa: PT017
        else:
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert pixels.size <= 3 * MAX_PIXELS


def test_the_bound_on_pixels_is_checked_before_anything_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    image = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    image += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 8) + b"IDAT" + bytes(8)
    for read in READERS:
        with pytest.raises(MediaTooLargeError, match="pixels"):
            read(image)
    too_large = encoded(Image.new("RGB", (1001, 1000)), "PNG")
    for read in READERS:
        with pytest.raises(MediaTooLargeError, match=r"1001x1000 pixels, more than .* 1000000"):
            read(too_large)
    read_image(too_large, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_shown_as_it_was_taken(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(picture(), "JPEG", exif=exif, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(image))))
    for read in READERS:
        np.testing.assert_array_equal(read(image), expected)
    rule = SizeRule(kind="fixed", height=16, width=24)
    assert see(image, rule).pixels.shape == (16, 24, 3)


def test_damaged_metadata_do_not_hide_a_picture() -> None:
    image = encoded(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + bytes(9))
    assert read_image(image, MAX_PIXELS).image.size == (96, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_colours_of_all_kinds_become_rgb(mode: str) -> None:
    image = picture().convert("L" if mode == "I;16" else mode)
    image = image.convert(mode)
    pixels = pixels_of(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (64, 96, 3)


def test_of_a_file_with_several_pictures_the_first_is_shown() -> None:
    first, second = picture(), Image.new("RGB", (96, 64), "blue")
    for image_format in ("MPO", "PNG", "WEBP"):
        several = encoded(first, image_format, save_all=True, append_images=[second])
        pixels = pixels_of(several)
        np.testing.assert_allclose(pixels.astype(int), np.asarray(first).astype(int), atol=20)


def test_what_is_transparent_is_white() -> None:
    clear = encoded(Image.new("RGBA", (8, 8), (200, 0, 0, 0)), "PNG")
    for read in READERS:
        np.testing.assert_array_equal(read(clear), np.full((8, 8, 3), 255))
    index = Image.new("P", (8, 8), 3)
    index.putpalette([10, 20, 30] * 256)
    np.testing.assert_array_equal(pixels_of(encoded(index, "PNG", transparency=3)), 255)


@pytest.mark.parametrize("image_format", FORMATS)
def test_frames_have_the_size_that_the_model_takes(image_format: str) -> None:
    rule = SizeRule(kind="qwen_vl", factor=28, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 64)
    image = picture(640, 480)
    sight = see(encoded(image, image_format, quality=90), rule)
    assert sight.pixels.shape == (168, 252, 3) or sight.pixels.size <= 28 * 28 * 64 * 3
    height, width = sight.pixels.shape[:2]
    expected = image.resize((width, height), Image.Resampling.BICUBIC)
    difference = np.abs(sight.pixels.astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 3
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(sight.thumbnail[..., 0] - grey).max() <= 6


def test_a_shape_that_the_model_does_not_take_is_refused() -> None:
    rule = SizeRule(kind="qwen_vl", min_pixels=3136, max_pixels=12_845_056)
    with pytest.raises(MediaError, match="a frame of 3000x2 pixels"):
        see(encoded(Image.new("RGB", (3000, 2)), "PNG"), rule)


def test_frames_of_what_stands_still_share_their_pixels() -> None:
    watcher = Watcher(family(SizeRule(kind="fixed", height=56, width=56)), MAX_PIXELS)
    random = np.random.default_rng(0)
    level = np.asarray(picture(640, 480)).astype(float)

    def shown(level: npt.NDArray[np.float64], quality: int) -> Sight:
        noisy = np.clip(level + random.normal(0, 6, level.shape), 0, 255).astype(np.uint8)
        image = encoded(Image.fromarray(noisy), "JPEG", quality=quality)
        return watcher.see(VideoAppend(None, image, None))

    first = shown(level, 85)
    assert all(shown(level, quality).pixels is first.pixels for quality in (60, 70, 80, 90))
    level[100:140, 200:240] += 60
    second = shown(level, 85)
    assert second.pixels is not first.pixels
    assert shown(level, 85).pixels is second.pixels


def test_what_is_as_bright_as_what_it_moves_across_is_seen_to_move() -> None:
    watcher = Watcher(family(SizeRule()), MAX_PIXELS)
    seen = []
    for left in range(0, 200, 20):
        image = Image.new("RGB", (224, 224), (130, 130, 130))
        image.paste((200, 106, 70), (left, 100, left + 24, 124))
        assert len(set(image.convert("L").getdata())) == 1
        seen.append(watcher.see(VideoAppend(None, encoded(image, "PNG"), None)))
    assert len({id(sight.pixels) for sight in seen}) == len(seen)


def test_what_changes_slowly_is_seen_anew_in_time() -> None:
    watcher = Watcher(family(SizeRule()), MAX_PIXELS)
    seen = [
        watcher.see(VideoAppend(None, encoded(Image.new("L", (64, 64), level), "PNG"), None))
        for level in range(100, 140)
    ]
    assert len({id(sight.pixels) for sight in seen}) == 8
    for level, sight in zip(range(100, 140), seen, strict=True):
        assert abs(int(sight.pixels[0, 0, 0]) - level) <= 4


def test_a_picture_keeps_nothing_else_of_its_file() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 1000
    for form in FORMATS:
        found = read_image(encoded(picture(), form, exif=exif), MAX_PIXELS)
        assert type(found.image) is Image.Image
        assert (found.image.mode, found.image.info) == ("RGB", {})
        assert found.nbytes == 4 * 96 * 64


def test_equal_pictures_have_equal_digests() -> None:
    first = encoded(picture(), "PNG")
    assert read_image(first, 0).digest == read_image(first, 0).digest
    assert read_image(first, 0).digest != read_image(encoded(picture(97), "PNG"), 0).digest


def test_the_time_of_frames_does_not_go_back() -> None:
    watcher = Watcher(family(SizeRule()), MAX_PIXELS)
    image = encoded(picture(), "PNG")
    assert watcher.see(VideoAppend(None, image, 5.0)).time_s == 5.0
    assert watcher.see(VideoAppend(None, image, None)).time_s is None
    with pytest.raises(MediaError, match=r"4\.5 is before the last frame's, 5\.0"):
        watcher.see(VideoAppend(None, image, 4.5))
    with pytest.raises(MediaError, match="JPEG"):
        watcher.see(VideoAppend(None, b"?", 9.0))
    assert watcher.see(VideoAppend(None, image, 5.0)).time_s == 5.0


def test_a_frame_with_a_wrong_time_does_not_stop_the_camera() -> None:
    watcher = Watcher(family(SizeRule()), MAX_PIXELS)
    image = encoded(picture(), "PNG")
    times = (1.0, 2.0, 3000.0, 3.0, 4.0)
    assert [watcher.see(VideoAppend(None, image, time_s)).time_s for time_s in times] == [*times]
    with pytest.raises(MediaError, match=r"3\.5 is before the last frame's, 4\.0"):
        watcher.see(VideoAppend(None, image, 3.5))


def test_after_a_clear_the_time_of_frames_may_begin_anew() -> None:
    watcher = Watcher(family(SizeRule()), MAX_PIXELS)
    image = encoded(picture(), "PNG")
    watcher.see(VideoAppend(None, image, 20.0))
    watcher.clear()
    assert watcher.see(VideoAppend(None, image, 0.0)).time_s == 0.0
