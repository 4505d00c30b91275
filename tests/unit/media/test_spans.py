"""A span of a video is delivered as a clip by itself, with exactly the file's frames and sound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_mm_ext.errors import MediaError, MediaTooLongError
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.output_bytes import audio_seconds
from vllm_mm_ext.media.sampling.basic import select_keyframe
from vllm_mm_ext.media.span import first_row, info_of
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.costs import FrontendCosts, PlannedVideo
from vllm_mm_ext.testing.media import Tone, make_clip, read_stamp

SECONDS = 12.0
FORMATS = ("mp4", "mkv", "ts")
LIMITS = DecodeLimits()
SIZE = SizeRule("fixed", height=90, width=160)
# Consecutive windows of 5 s that overlap by 1 s, and spans that begin between two frames.
SPANS = ((0.0, 5.0), (4.0, 9.0), (8.0, 12.0), (2.017, 3.51), (11.3, 40.0))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("spans")
    made = {}
    sweep = [Tone(200.0 + 60 * k, 0.4 * k, 0.4 * k + 0.3) for k in range(30)]
    for name in FORMATS:
        made[name] = folder / f"clip.{name}"
        make_clip(
            made[name],
            fps=25,
            duration=SECONDS,
            gop=100,
            bframes=2,
            stamp=True,
            audio=sweep,
        )
    return made


def wanting(policy: str, span: tuple[float, float] | None, **more: object) -> DecodeRequest:
    spec = SamplingSpec(policy=policy, fps=4.0, max_frames=64, span=span)  # type: ignore[arg-type]
    return replace(DecodeRequest(spec, size=SIZE, audio="optional"), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "policy"),
    [("mp4", "uniform"), ("mp4", "keyframe"), ("mkv", "adaptive"), ("ts", "adaptive")],
)
def test_frames_of_a_span_are_those_of_the_file_at_their_times(
    clips: dict[str, Path], name: str, policy: str
) -> None:
    path = str(clips[name])
    everything = SamplingSpec("explicit", indices=tuple(range(300)), max_frames=300)
    whole = run_job(path, DecodeRequest(everything, size=SIZE))
    assert whole.frames is not None
    assert whole.info.packets is not None
    for span in SPANS:
        found = run_job(path, wanting(policy, span))
        assert found.selection is not None
        assert found.frames is not None
        assert found.info.video is not None
        end = min(span[1], SECONDS)
        assert found.info.video.duration == pytest.approx(end - span[0], abs=1e-6)
        assert found.info.duration == found.info.video.duration
        first = np.searchsorted(whole.info.packets.time, span[0] + 1e-6, side="right") - 1
        rows = first + found.selection.indices
        times = np.maximum(whole.info.packets.time[rows] - span[0], 0.0)
        np.testing.assert_allclose(found.selection.times, times, atol=1e-8)
        assert times[-1] < end - span[0]
        np.testing.assert_array_equal(found.frames, whole.frames[rows])


def test_a_uniform_span_shows_what_is_on_screen_at_its_own_moments(clips: dict[str, Path]) -> None:
    found = run_job(str(clips["mp4"]), wanting("uniform", (2.017, 5.017), size=SizeRule()))
    assert found.frames is not None
    assert [read_stamp(frame) for frame in found.frames] == [
        int((2.017 + k / 4) * 25 + 1e-6) for k in range(12)
    ]
    assert found.selection is not None
    assert found.selection.times[0] == 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_sound_of_a_span_is_that_of_the_whole_track(clips: dict[str, Path], name: str) -> None:
    path = str(clips[name])
    whole = run_job(path, wanting("uniform", None))
    assert whole.audio is not None
    rate = whole.audio_rate
    # Matroska counts in milliseconds; the clocks of the others show each sample.
    shift = rate // 1000 if name == "mkv" else 1
    for span in SPANS:
        found = run_job(path, wanting("uniform", span))
        assert found.audio is not None
        begin, count = round(span[0] * rate), len(found.audio)
        end = min(SECONDS, span[1])
        assert count == pytest.approx((end - span[0]) * rate, abs=0.03 * rate)
        errors = [
            np.abs(found.audio[shift : count - shift] - part)
            for k in range(-shift, shift + 1)
            for part in (whole.audio[max(0, begin + shift + k) :][: count - 2 * shift],)
            if len(part) == count - 2 * shift
        ]
        # AAC fills bands with noise of its own making: it depends on all that was decoded before.
        off = min((error > 1e-3).mean() for error in errors)
        assert off < 0.02, (span, off)
        assert min(error.max() for error in errors) < 0.05


@pytest.mark.parametrize("span", [(12.5, 20.0), (3.0, 3.0), (-1.0, 2.0), (0.0, float("nan"))])
def test_a_span_outside_the_clip_is_refused(
    clips: dict[str, Path], span: tuple[float, float]
) -> None:
    with pytest.raises(MediaError, match="span"):
        run_job(str(clips["mp4"]), wanting("uniform", span))


def test_without_its_packet_table_a_span_has_about_as_many_frames(clips: dict[str, Path]) -> None:
    info = probe(str(clips["mkv"]), LIMITS)
    spec = SamplingSpec(span=(2.017, 9.0))
    exact, estimate = info_of(info, spec), info_of(replace(info, packets=None), spec)
    assert exact.video is not None
    assert estimate.video is not None
    assert estimate.video.duration == exact.video.duration
    assert 0 <= estimate.video.num_frames - exact.video.num_frames <= 1
    assert info.packets is not None
    assert first_row(info.packets, spec) == 50


def test_a_plan_with_a_span_costs_what_the_span_costs(clips: dict[str, Path]) -> None:
    info = replace(probe(str(clips["ts"]), LIMITS), packets=None)
    plans = [VideoPlan(SamplingSpec(span=span), SIZE, audio=True) for span in (None, (4.0, 9.0))]
    ref: Any = None  # Costs follow from the probe alone.
    videos = [PlannedVideo.of("", 1, ref, info, plan) for plan in plans]
    assert videos[1] is not None
    assert videos[1].stream.duration == pytest.approx(5.0)
    known = [video for video in videos if video is not None]
    costs = FrontendCosts(known, None, ModelTraits(audio_rate=16_000, hears_video=True), LIMITS)
    assert [costs.frames(index, 2.0, 1, 100) for index in (0, 1)] == [24, 10]
    heard = info.audio[0]
    assert audio_seconds(videos[1].info, heard, LIMITS, with_frames=True) == pytest.approx(5.0)
    long = replace(LIMITS, max_audio_s=6.0)
    # A limit on sound that the file is past holds for the span.
    request = wanting("uniform", (4.0, 9.0), audio="required", limits=long)
    assert run_job(str(clips["mp4"]), request).audio_note == ""
    with pytest.raises(MediaTooLongError):
        run_job(str(clips["mp4"]), replace(request, sampling=SamplingSpec()))


@pytest.mark.parametrize("gop", [1, 7, 1000])
@pytest.mark.parametrize("span", [None, (0.4, 2.6)])
def test_a_plan_counts_the_keyframes_that_are_taken(
    tmp_path: Path, gop: int, span: tuple[float, float] | None
) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=4, fps=10, gop=gop).path)
    known = probe(path, LIMITS)
    info = replace(known, packets=None)
    ref: Any = None  # Costs follow from the probe alone.
    for least, most in ((1, 32), (4, 8), (9, 100)):
        spec = SamplingSpec(
            "keyframe", fps=1.0, min_frames=least, max_frames=most, multiple_of=2, span=span
        )
        video = PlannedVideo.of("", 1, ref, info, VideoPlan(spec, SIZE, audio=False))
        assert video is not None
        costs = FrontendCosts([video], None, ModelTraits(), LIMITS)
        taken = len(select_keyframe(info_of(known, spec), spec).indices)
        # Where the keyframes of a span lie is not known before its decode.
        planned = costs.frames(0, 1.0, least, most)
        assert planned == taken or (span and planned > taken)
