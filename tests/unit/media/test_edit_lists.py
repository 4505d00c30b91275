"""Of a file with several edits, every picture is found that a decode from the start shows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.support.mp4_boxes import with_edits
from vllm_mm_ext.media.decode.decoders import read_plan
from vllm_mm_ext.media.decode.decoders.kept_reader import KeptReader
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, MediaInfo, SamplingSpec
from vllm_mm_ext.testing.media import make_clip, read_stamp

LIMITS = DecodeLimits()
FPS = 25
# Seconds that are shown, and the second from which on. The pictures begin at 0.08 s: B pictures
# are decoded before.
EDITS = {
    "in a row": [(1, 0.08), (1, 1.08)],
    "left out": [(1, 0.08), (1, 2.48)],
    "within groups": [(0.6, 0.48), (1, 2.28)],
    "backwards": [(1, 2.48), (1, 0.48)],
    "twice": [(1, 0.08), (1, 0.08)],
    "three": [(0.6, 0.28), (0.6, 1.28), (0.6, 2.28)],
}


@pytest.fixture(params=EDITS)
def film(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    clip = make_clip(tmp_path / "a.mp4", fps=FPS, duration=4, gop=25, bframes=2, stamp=True).path
    return with_edits(clip, tmp_path / "film.mp4", EDITS[request.param])


def shown(path: Path) -> list[int]:
    """The numbers of the pictures that FFmpeg shows, in their order."""
    with av.open(str(path)) as container:
        return [read_stamp(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def found(path: Path, info: MediaInfo, rows: list[int]) -> list[int]:
    assert info.video is not None
    out = np.zeros((len(rows), info.video.height, info.video.width, 3), np.uint8)
    decoder = PyAVDecoder(LIMITS.max_pixels)
    done = decoder.decode(str(path), info, np.array(rows, np.int64), None, out, 2)
    return [read_stamp(out[number]) for number in done]


@pytest.mark.parametrize("far", [False, True])
def test_every_picture_is_found(film: Path, monkeypatch: pytest.MonkeyPatch, far: bool) -> None:
    if far:
        monkeypatch.setattr(read_plan, "SEEK_OVER_PACKETS", 3)
    stamps, info = shown(film), probe(str(film), LIMITS)
    assert info.video is not None
    assert info.video.num_frames == len(stamps)
    assert found(film, info, list(range(len(stamps)))) == stamps
    for row in range(0, len(stamps), 3):
        assert found(film, info, [row]) == [stamps[row]]
    assert found(film, info, [2, len(stamps) - 5]) == [stamps[2], stamps[-5]]


def test_a_span_of_the_last_edit_is_found(film: Path) -> None:
    stamps, end = shown(film), probe(str(film), LIMITS).duration
    spec = SamplingSpec("uniform", fps=FPS, max_frames=8, span=(end - 0.4, end))
    result = run_job(str(film), DecodeRequest(spec, limits=LIMITS))
    assert result.selection is not None
    assert result.frames is not None
    of_span = stamps[-10:]
    assert [read_stamp(frame) for frame in result.frames] == [
        of_span[row] for row in result.selection.indices
    ]
    assert len(result.frames) == 8


def test_spans_of_a_file_that_stays_open_are_found(film: Path) -> None:
    stamps, info = shown(film), probe(str(film), LIMITS)
    assert info.packets is not None
    last = len(stamps) - 1
    with closing(KeptReader(str(film), 0, info.packets, LIMITS.max_pixels, 1)) as reader:
        for rows in ([3, 5], [14, 16], [20, 27], [last - 8, last], [6], [last]):
            reader.begin((rows[0] / FPS, (rows[-1] + 1) / FPS), 0)
            read: dict[int, int] = {}

            def emit(row: int, frame: av.VideoFrame, _: Any, read: dict[int, int] = read) -> None:
                read[row] = read_stamp(frame.to_ndarray(format="rgb24"))

            assert reader.read(np.array(rows), emit, set()) == set(rows)
            assert read == {row: stamps[row] for row in rows}
