"""Finds the order in which H.264 pictures are shown where the container does not tell it.

AVI has no presentation times, and some muxers of other formats write decoding times in their place.
The slice headers tell each picture's place (ITU-T H.264, 8.2.1).
"""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.decode.packets import demux
from vllm_mm_ext.media.decode.references import References

# A stream whose first so many pictures are shown as they are decoded has no others: encoders that
# use B pictures use them where little moves.
_FEW = 100
# Longer streams are shown as they are decoded: headers are read at some 40 us each.
_MOST = 500_000


def shown_order(path: str, max_pixels: int, stream: int) -> npt.NDArray[np.int64] | None:
    """Numbers of the packets of an H.264 stream in the order in which they are shown.

    Args:
        path: The file.
        max_pixels: See ``open_container``.
        stream: Index of the stream.

    Returns:
        int64 ``[n]``, counted among the packets that hold data; None where packets are shown as
        they are decoded, or where their headers are not understood.
    """
    period: list[int] = []  # the IDR picture before each
    place: list[int] = []
    try:
        with open_container(path, max_pixels=max_pixels) as container:
            source = container.streams[stream]
            references = References(source.codec_context.extradata or b"")
            for packet in demux(container, source):
                if not packet.size:
                    continue
                if packet.has_sidedata("new_extradata"):
                    references.learn(bytes(packet.get_sidedata("new_extradata")))
                picture = references.read(memoryview(packet), wanted=True)
                if picture is None or not picture.slices:
                    return None
                number = len(place)
                period.append(number if picture.slices[0].is_idr else period[-1] if period else -1)
                place.append(picture.order)
                if number == _FEW and _sorted(period, place) is None:
                    return None
                if number > _MOST:
                    return None
    except av.FFmpegError:
        pass  # A file that was cut short has its first part.
    return _sorted(period, place)


def _sorted(period: list[int], place: list[int]) -> npt.NDArray[np.int64] | None:
    order = np.lexsort((place, period)).astype(np.int64)
    return None if bool((np.diff(order) == 1).all()) else order
