"""H.264 pictures are shown in their order where a container tells when they are decoded alone."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.decode.shown_order import shown_order
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import make_clip, read_stamp

LIMITS = DecodeLimits()


def without_presentation_times(path: Path, clip: Path) -> Path:
    """The same packets with their decoding times as presentation times."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts = packet.dts
                packet.stream = stream
                writer.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv", "ts"])
@pytest.mark.parametrize("open_gop", [False, True], ids=["closed", "open"])
def test_pictures_are_shown_in_their_order_and_at_even_times(
    tmp_path: Path, suffix: str, open_gop: bool
) -> None:
    # AVI has no presentation times anyway.
    path = make_clip(
        tmp_path / ("a.avi" if suffix == "avi" else "a.ts"),
        duration=2,
        fps=25,
        gop=15,
        bframes=3,
        open_gop=open_gop,
        stamp=True,
    ).path
    if suffix != "avi":
        path = without_presentation_times(tmp_path / f"b.{suffix}", path)
    info = probe(str(path), LIMITS)
    assert info.packets is not None
    np.testing.assert_allclose(info.packets.time, np.arange(50) / 25, atol=1e-3)
    for rows in (range(50), (31,), (7, 29, 30, 48)):
        sampling = SamplingSpec("explicit", indices=tuple(rows), max_frames=50)
        frames = run_job(str(path), DecodeRequest(sampling, SizeRule(), limits=LIMITS)).frames
        assert frames is not None
        assert [read_stamp(frame) for frame in frames] == list(rows)


def test_only_pictures_that_are_reordered_have_another_order(tmp_path: Path) -> None:
    plain = make_clip(tmp_path / "a.avi", duration=1, fps=25).path
    assert shown_order(str(plain), LIMITS.max_pixels, 0) is None
    other = make_clip(tmp_path / "b.avi", duration=1, fps=25, codec="mpeg4").path
    assert shown_order(str(other), LIMITS.max_pixels, 0) is None
