"""The size of a result is known before it is made: never less, and not many times as much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_mm_ext.media.audio.audio_track import MAX_SAMPLE_RATE
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.output_bytes import audio_bytes, claimed_audio_bytes, frame_bytes
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import Tone, make_clip

SMALL = SizeRule(kind="fixed", height=28, width=28)


@pytest.mark.parametrize("policy", ["uniform", "adaptive", "keyframe"])
@pytest.mark.parametrize("fps", [0.3, 1.0, 3.7, 60.0])
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_a_clip_gets_room_for_the_frames_that_are_taken_of_it(
    tmp_path: Path, policy: str, fps: float, multiple_of: int
) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=3).path)
    spec = SamplingSpec(policy, fps=fps, max_frames=32, multiple_of=multiple_of)  # type: ignore[arg-type]
    request = DecodeRequest(sampling=spec, size=SMALL)
    info = replace(probe(path, request.limits), packets=None)
    frames = run_job(path, request).frames
    assert frames is not None
    assert frames.nbytes <= frame_bytes(info, request) <= 1.5 * frames.nbytes


def test_no_more_room_is_asked_for_than_a_result_may_take(tmp_path: Path) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=1).path)
    limits = DecodeLimits(max_output_bytes=1000)
    request = DecodeRequest(sampling=SamplingSpec(), size=SMALL, limits=limits)
    assert frame_bytes(probe(path, limits), request) == 1000


@pytest.mark.parametrize("claimed", [0.0, 0.5])
def test_sound_gets_room_up_to_the_picture_or_the_limit_whatever_is_claimed(
    tmp_path: Path, claimed: float
) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=2, audio=[Tone(440, 0, 2)]).path)
    info = probe(path, DecodeLimits())
    stream = replace(info.audio[0], duration=claimed, estimated=True, sample_rate=48_000)
    for request in (
        DecodeRequest(sampling=SamplingSpec(), size=SMALL, audio="optional"),
        DecodeRequest(audio="required", limits=DecodeLimits(max_audio_s=3.0)),
    ):
        audio = run_job(path, request).audio
        assert audio is not None
        assert claimed_audio_bytes(info, stream, request) <= audio_bytes(info, stream, request)
        assert audio.nbytes <= audio_bytes(info, stream, request) <= 3 * 48_000 * 4


def test_an_absurd_rate_takes_no_room_that_no_sound_can_fill(tmp_path: Path) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=1, audio=[Tone(440, 0, 1)]).path)
    info, request = probe(path, DecodeLimits()), DecodeRequest(audio="required")
    stream = replace(info.audio[0], duration=1.0, estimated=False, sample_rate=1 << 31)
    assert audio_bytes(info, stream, request) == MAX_SAMPLE_RATE * 4
    assert audio_bytes(info, stream, request, 16_000) == 16_000 * 4
