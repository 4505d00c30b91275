"""Of several streams of a kind, the one that players choose is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeRequest, SamplingSpec

RATE = 16_000
FRAMES = 12


def write(path: Path, pictures: list[tuple[int, int]], sounds: list[float]) -> None:
    """A file of streams in this order; the last of each kind is marked as the default.

    Args:
        path: The file.
        pictures: Number of frames and width of each stream of video.
        sounds: Amplitude of each stream of sound.
    """
    with av.open(str(path), "w") as container:
        streams: list[Any] = []
        for _, width in pictures:
            stream = container.add_stream("mpeg4", rate=12)
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
            streams.append(stream)
        for _ in sounds:
            streams.append(container.add_stream("pcm_s16le", rate=RATE, layout="mono"))
        for stream in streams:
            stream.disposition = Disposition(0)
        if pictures:
            streams[len(pictures) - 1].disposition = Disposition.default
        if sounds:
            streams[-1].disposition = Disposition.default
        for stream, (count, width) in zip(streams, pictures, strict=False):
            for number in range(count):
                shade = np.full((48, width, 3), 10 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
            container.mux(stream.encode())
        for stream, amplitude in zip(streams[len(pictures) :], sounds, strict=True):
            wave = (np.sin(np.arange(RATE) * 0.1) * amplitude * 30_000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
            frame.sample_rate = RATE
            container.mux(stream.encode(frame))
            container.mux(stream.encode())


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_the_default_stream_is_the_one_that_counts(tmp_path: Path, decoder: Any) -> None:
    path = tmp_path / "both.mkv"
    write(path, [(1, 96), (FRAMES, 64)], [0.0, 0.5])
    request = DecodeRequest(
        sampling=SamplingSpec(policy="uniform", fps=60, max_frames=64),
        audio="required",
        decoder=decoder,
    )
    done = run_job(str(path), request)
    assert done.frames is not None
    assert done.frames.shape == (FRAMES, 48, 64, 3)
    assert done.audio is not None
    assert float(np.abs(done.audio).max()) > 0.3


def test_the_larger_picture_is_shown_where_none_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "none.mkv"
    write(path, [(1, 32), (FRAMES, 64), (1, 32)], [])
    with av.open(str(path)) as container:
        from vllm_mm_ext.media.decode.streams import video_streams

        streams = container.streams.video
        assert video_streams(container)[0] is streams[2], "the default, whatever its size"
        streams[2].disposition = Disposition(0)
        assert video_streams(container)[0] is streams[1]
