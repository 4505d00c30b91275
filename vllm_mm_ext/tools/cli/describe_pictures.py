"""Small pictures of the windows of a video, for the page of ``vllm-mm describe``."""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, PacketTable, SamplingSpec, SizeRule
from vllm_mm_ext.tools.cli.describe_request import DescribeError, Source
from vllm_mm_ext.tools.cli.description import NotedWindow

# What all pictures of a page may take as JPEG: the largest size at which they do is used.
MAX_BYTES = 3 << 20
_EDGES = (320, 240, 160, 96)
_QUALITY = 72
# A page of more windows has pictures of some.
_MOST = 600
# A video that is fetched for its pictures.
_MAX_FETCHED_BYTES = 4 << 30
_FETCH_TIMEOUT_S = 60.0
_LIMITS = DecodeLimits(max_frames=_MOST, max_duration_s=0)

Frame = npt.NDArray[np.uint8]


def window_pictures(source: Source, windows: Sequence[NotedWindow]) -> Mapping[int, str]:
    """A picture out of each window, by the window's number, as data URIs.

    A window whose picture does not decode has none.

    Args:
        source: The video; fetched to a temporary file where it does not lie here.
        windows: What pictures are wanted of. Of very many windows every second, third... gets one.

    Raises:
        DescribeError: The video cannot be fetched, or no picture of it decoded; says why.
    """
    stride = -(-len(windows) // _MOST)
    chosen = windows[:: max(1, stride)]
    try:
        with _local(source) as path:
            found = _decoded(str(path), chosen)
    except (OSError, MediaError) as error:
        raise DescribeError(f"no pictures of {source.name}: {error}") from error
    pictures = _fitted(list(found.values()))
    return {
        number: f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        for number, picture in zip(found, pictures, strict=True)
    }


def _decoded(path: str, windows: Sequence[NotedWindow]) -> dict[int, Frame]:
    """Pictures by the number of the window."""
    info = run_job(path, DecodeRequest(probe_only=True, limits=_LIMITS)).info
    if info.packets is None or not len(info.packets):
        raise MediaError("the file has no video stream")
    wanted = {window.number: _index(info.packets, window) for window in windows}
    indices = tuple(sorted(set(wanted.values())))
    done = run_job(
        path,
        DecodeRequest(
            sampling=SamplingSpec(policy="explicit", indices=indices, max_frames=_MOST),
            size=SizeRule(kind="max_edge", max_edge=_EDGES[0]),
            info=info,
            limits=_LIMITS,
        ),
    )
    assert done.frames is not None
    assert done.selection is not None
    frames = dict(zip(done.selection.indices.tolist(), done.frames, strict=True))
    return {number: frames[index] for number, index in wanted.items() if index in frames}


def _index(packets: PacketTable, window: NotedWindow) -> int:
    """The frame to show: the keyframe next to the window's middle, as it takes one picture to
    decode; where the window has none, the frame there."""
    middle = (window.start + window.end) / 2
    inside = np.flatnonzero(
        packets.is_key & (packets.time >= window.start) & (packets.time < window.end)
    )
    rows = inside if len(inside) else np.arange(len(packets))
    return int(rows[np.abs(packets.time[rows] - middle).argmin()])


def _fitted(frames: Sequence[Frame]) -> list[bytes]:
    """The pictures as JPEG, as large as all of them fit."""
    images = [Image.fromarray(frame) for frame in frames]
    encoded: list[bytes] = []
    for edge in _EDGES:
        encoded = [_jpeg(image, edge) for image in images]
        if sum(map(len, encoded)) <= MAX_BYTES:
            break
    return encoded


def _jpeg(image: Image.Image, edge: int) -> bytes:
    small = image.copy()
    small.thumbnail((edge, edge))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()


@contextmanager
def _local(source: Source) -> Iterator[Path]:
    """The video as a local file, for the time of the block."""
    if source.path is not None:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="vllm-mm-describe-") as directory:
        path = Path(directory) / "video"
        with urllib.request.urlopen(source.url, timeout=_FETCH_TIMEOUT_S) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            if size > min(_MAX_FETCHED_BYTES, shutil.disk_usage(directory).free // 2):
                raise OSError(f"it has {size / (1 << 30):.1f} GiB, too many to fetch for pictures")
            with path.open("wb") as written:
                while chunk := answer.read(1 << 20):
                    written.write(chunk)
                    if written.tell() > _MAX_FETCHED_BYTES:
                        raise OSError(f"it has more than {_MAX_FETCHED_BYTES >> 30} GiB")
        yield path
