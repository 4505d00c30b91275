"""Reads the pictures and camera frames that clients send: checked, bounded, decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from PIL import Image, UnidentifiedImageError

from vllm_mm_ext.errors import (
    MediaError,
    MediaTooLargeError,
    UnreadableMediaError,
    UnsupportedFormatError,
)
from vllm_mm_ext.live.client_events import VideoAppend
from vllm_mm_ext.live.family import MAX_STRETCH_S, FamilyTraits
from vllm_mm_ext.live.prompt import Picture
from vllm_mm_ext.live.session_clock import JUMP_S
from vllm_mm_ext.live.thumbnails import NOISE, Thumbnail, change, thumbnail_of
from vllm_mm_ext.media.sizing import target_size

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
# What undoes each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """A camera frame as it came, not yet on the session's clock.

    Attributes:
        pixels: uint8 RGB ``[height, width, 3]`` at the size that the model takes.
        thumbnail: By which frames are compared.
        time_s: When it was taken, on the client's clock; None: when it arrived.
    """

    pixels: Pixels
    thumbnail: Thumbnail
    time_s: float | None


class Watcher:
    """Reads the camera frames of one session. For one thread at a time.

    Args:
        family: What the model takes.
        max_pixels: Pixels of an image file at most (``VLLM_MAX_IMAGE_PIXELS``), 0 for no bound.
    """

    def __init__(self, family: FamilyTraits, max_pixels: int) -> None:
        self._rule = family.size_rule
        # Some families give all frames of a video a number of pixels together.
        self._most_frames = ceil(MAX_STRETCH_S / family.unit_s) * family.unit_frames
        self._max_pixels = max_pixels
        self._last_time_s: float | None = None
        self._last: Sight | None = None

    def see(self, event: VideoAppend) -> Sight:
        """Read a frame.

        Args:
            event: The client's.

        Raises:
            MediaError: Not a JPEG, PNG or WebP file, damaged, cut short, too large, or of a shape
                that the model does not take; or the time is a little before the last frame's.
        """
        time_s, last_time_s = event.time_s, self._last_time_s
        # After a longer step back the client's clock goes on from there: a single wrong time must
        # not make all later ones wrong.
        if time_s is not None and last_time_s is not None and 0 < last_time_s - time_s <= JUMP_S:
            raise MediaError(
                f"The frame's time {time_s} is before the last frame's, {last_time_s}.",
                parameter="time_s",
                value=time_s,
            )
        with _opened(event.image, self._max_pixels) as image:
            sideways = _orientation(image) in _SIDEWAYS
            width, height = image.size[::-1] if sideways else image.size
            height, width = self._size(width, height)
            size = (height, width) if sideways else (width, height)
            # A JPEG file can be decoded at 1/2, 1/4 or 1/8 of its size, for much less.
            image.draft("RGB", size)
            seen = _upright_rgb(image)
            thumbnail = thumbnail_of(seen)
            last = self._last
            if (
                last is None
                or last.pixels.shape != (height, width, 3)
                or (change(last.thumbnail, thumbnail) > NOISE)
            ):
                if seen.size != (width, height):
                    seen = seen.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
                last = Sight(_pixels(seen), thumbnail, None)
        if time_s is not None:
            self._last_time_s = time_s
        # Resizing takes most of the time, so frames of what stands still share their pixels.
        self._last = last
        return replace(last, time_s=time_s)

    def clear(self) -> None:
        """Let the client's clock begin anew."""
        self._last_time_s = None

    def _size(self, width: int, height: int) -> tuple[int, int]:
        try:
            return target_size(self._rule, width=width, height=height, num_frames=self._most_frames)
        except MediaError:
            raise MediaError(
                f"The model does not take a frame of {width}x{height} pixels.", parameter="image"
            ) from None


def read_image(image: bytes, max_pixels: int) -> Picture:
    """Read a picture of an item, in its own size.

    Args:
        image: The bytes of the file.
        max_pixels: As of ``Watcher``.

    Raises:
        MediaError: Not a JPEG, PNG or WebP file, damaged, cut short, or too large.
    """
    with _opened(image, max_pixels) as opened:
        shown = _upright_rgb(opened)
        # Without what else its file holds.
        plain = Image.new("RGB", shown.size)
        plain.paste(shown)
    return Picture(plain, blake3(image).hexdigest())


def _pixels(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    pixels.setflags(write=False)
    return pixels


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """A file that was checked but for what only decoding tells."""
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if 0 < max_pixels < width * height:
                raise MediaTooLargeError(
                    f"The image has {width}x{height} pixels, more than the limit of {max_pixels} "
                    "(VLLM_MAX_IMAGE_PIXELS, mm_ext.live.session_mb).",
                    parameter="image",
                )
            yield image
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise UnsupportedFormatError(
            "The image is not a JPEG, PNG or WebP file.", parameter="image"
        ) from None
    except Image.DecompressionBombError:
        raise MediaTooLargeError(
            f"The image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels.",
            parameter="image",
        ) from None
    except Exception:
        # Pillow raises errors of many classes on files that are damaged.
        raise UnreadableMediaError(
            "The image is damaged or cut short.", parameter="image"
        ) from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged metadata say nothing about the picture.
        return 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Decode; as it was taken, on white where it is transparent."""
    turn = _UPRIGHT.get(_orientation(image))
    image.load()
    shown = image if turn is None else image.transpose(turn)
    if shown.has_transparency_data:
        shown = shown.convert("RGBA")
        ground = Image.new("RGB", shown.size, "white")
        ground.paste(shown, mask=shown.getchannel("A"))
        return ground
    return shown if shown.mode == "RGB" else shown.convert("RGB")
