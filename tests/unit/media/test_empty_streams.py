"""Streams that a file declares but never fills hide neither sound nor other pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.support.transport_streams import copied
from vllm_mm_ext.errors import (
    MediaTooLargeError,
    MediaTooLongError,
    NoSuchStreamError,
    UnreadableMediaError,
)
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec
from vllm_mm_ext.testing.media import Tone, make_clip

LIMITS = DecodeLimits()
SOUND = DecodeRequest(audio="required")
VIDEO = DecodeRequest(sampling=SamplingSpec(max_frames=4), audio="optional")
TONE = [Tone(440.0, 0.0, 1e9)]
FRAGMENTS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000"}


def without_pictures(path: Path) -> str:
    """A second of sound beside a video track that stays empty, as when a camera is off."""
    codec = "libvpx" if path.suffix == ".webm" else "libx264"
    source = path.with_name("source" + path.suffix)
    make_clip(source, width=64, height=48, duration=1, codec=codec, audio=TONE)
    options = FRAGMENTS if path.suffix == ".mp4" else {}
    return str(copied(source, path, wanted=lambda kind, _: kind == "audio", options=options))


@pytest.mark.parametrize("name", ["a.webm", "a.mp4", "a.ts"])
def test_sound_beside_a_video_track_that_stays_empty_is_heard(tmp_path: Path, name: str) -> None:
    path = without_pictures(tmp_path / name)
    with av.open(path) as container:
        assert len(container.streams.video) == 1
    result = run_job(path, SOUND)
    assert result.audio is not None
    assert len(result.audio) / result.audio_rate == pytest.approx(1, abs=0.1)
    assert result.audio[4800:-4800].std() == pytest.approx(0.5**1.5, abs=0.02)
    info = probe(path, LIMITS)
    assert (info.video, len(info.audio)) == (None, 1)


@pytest.mark.parametrize("name", ["a.webm", "a.mp4", "a.ts"])
def test_a_video_without_a_frame_is_refused(tmp_path: Path, name: str) -> None:
    path = without_pictures(tmp_path / name)
    with pytest.raises(NoSuchStreamError, match="no video stream that holds a frame") as refused:
        run_job(path, VIDEO)
    assert refused.value.parameter == "video_url"
    with pytest.raises(UnreadableMediaError, match="holds no frame"):
        probe(path, LIMITS, 0)
    silent = copied(Path(path), tmp_path / f"silent-{name}", wanted=lambda *_: False)
    with pytest.raises(UnreadableMediaError):
        probe(str(silent), LIMITS)


def test_limits_on_pictures_refuse_no_sound(tmp_path: Path) -> None:
    path = str(make_clip(tmp_path / "a.mp4", width=64, height=48, duration=3, audio=TONE).path)
    limits = {"max_audio_s": 1.0, "truncate_audio": True}
    for more, error in (
        ({"max_pixels": 100}, MediaTooLargeError),
        ({"max_duration_s": 1.0}, MediaTooLongError),
    ):
        tight = DecodeLimits(**limits, **more)  # type: ignore[arg-type]
        result = run_job(path, DecodeRequest(audio="required", limits=tight))
        assert result.audio is not None
        assert len(result.audio) == result.audio_rate
        with pytest.raises(error):
            run_job(path, DecodeRequest(sampling=VIDEO.sampling, limits=tight))


def test_a_silent_video_has_no_sound_to_hear(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", width=64, height=48, duration=0.5).path
    with pytest.raises(NoSuchStreamError, match="has no audio stream"):
        run_job(str(path), SOUND)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mov"])
def test_an_empty_stream_hides_no_other(tmp_path: Path, name: str) -> None:
    path, counts = tmp_path / name, (0, 12)
    # An index that is written last leaves empty tracks of MOV out.
    options = FRAGMENTS if name == "a.mov" else {}
    with av.open(str(path), "w", options=options) as container:
        streams: list[Any] = [container.add_stream("mpeg4", rate=12) for _ in counts]
        for stream, side in zip(streams, (128, 64), strict=True):
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        streams[0].disposition, streams[1].disposition = Disposition.default, Disposition(0)
        for stream, count in zip(streams, counts, strict=True):
            for number in range(count):
                picture = np.full((stream.height, stream.width, 3), 20 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    video = probe(str(path), LIMITS).video
    assert video is not None
    assert (video.width, video.num_frames) == (64, 12)
    assert run_job(str(path), VIDEO).frames is not None
    with pytest.raises(UnreadableMediaError, match="holds no frame"):
        probe(str(path), LIMITS, 0)
