"""A clip and its longer version: the same leading frames, down to the pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import clips

from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.sampling import select, windows
from vllm_mm_ext.media.sampling.timeline import asked_count, is_unbound, shown_at
from vllm_mm_ext.media.types import (
    DecodeRequest,
    DecodeResult,
    MediaInfo,
    PolicyName,
    SamplingSpec,
    SizeRule,
    VideoStream,
)
from vllm_mm_ext.testing.media import Event, make_clip

LONG_S, SHORT_S = 27.0, 19.3
SIZE = SizeRule("fixed", height=56, width=84)
CLIPS = {
    "GOP 30": {"gop": 30, "scene": "talking_head"},
    "GOP 250": {"gop": 250, "scene": "noise"},
    "B frames": {"gop": 30, "bframes": 2, "scene": "pan"},
    "B frames, GOP 250": {"gop": 250, "bframes": 3, "scene": "shapes"},
    "open GOP": {"gop": 40, "bframes": 2, "open_gop": True, "scene": "cuts"},
    "VFR": {"gop": 30, "vfr": True, "scene": "flicker"},
    "VFR, GOP 250, B frames": {"gop": 250, "vfr": True, "bframes": 2, "scene": "fade"},
    "static": {"gop": 60, "scene": "static"},
}


def copy_start(source: Path, target: Path, seconds: float) -> None:
    """Copy the packets in front of the first one shown after ``seconds``; nothing is encoded."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as part:
        stream = whole.streams.video[0]
        copied = part.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.pts is None or packet.pts * packet.time_base > seconds:
                assert not packet.is_keyframe, "the cut is meant to be inside a GOP"
                break
            packet.stream = copied
            part.mux(packet)


@pytest.fixture(scope="module", params=list(CLIPS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A clip, and the same packets cut short inside a GOP."""
    folder = tmp_path_factory.mktemp("pair")
    events = [Event("flash", 3.3, 3.6), Event("insert", 12.4, 12.8), Event("object", 21.2, 21.7)]
    long, short = folder / "long.mp4", folder / "short.mp4"
    options = {"width": 160, "height": 90, "fps": 25, "events": events, **CLIPS[request.param]}
    make_clip(long, duration=LONG_S, **options)
    copy_start(long, short, SHORT_S)
    return [short, long]


def sampled(path: Path, policy: PolicyName, fps: float = 1.0) -> DecodeResult:
    spec = SamplingSpec(policy, fps=fps, max_frames=96, multiple_of=2)
    return run_job(str(path), DecodeRequest(sampling=spec, size=SIZE, threads=2))


def assert_same_start(
    short: DecodeResult, long: DecodeResult, end: float, waiting: int = 0
) -> None:
    """Frames shown before ``end`` seconds are the same in both.

    ``waiting``: frames that the short clip may lack because they are not a whole pair yet.
    """
    assert short.selection is not None
    assert long.selection is not None
    assert short.frames is not None
    assert long.frames is not None
    shared = int((short.selection.times < end).sum())
    assert shared >= 2
    assert short.selection.times[:shared].tolist() == long.selection.times[:shared].tolist()
    assert len(short.selection.times) - shared <= 8
    assert 0 <= int((long.selection.times < end).sum()) - shared <= waiting
    assert np.array_equal(short.frames[:shared], long.frames[:shared])


@pytest.mark.parametrize("fps", [1.0, 2.5])
def test_uniform_gives_an_extended_clip_the_same_leading_frames(
    pair: list[Path], fps: float
) -> None:
    short, long = (sampled(path, "uniform", fps) for path in pair)
    # B frames may be missing just before the cut.
    assert_same_start(short, long, SHORT_S - 0.5, waiting=1)
    assert short.selection is not None
    assert long.selection is not None
    assert short.selection.step == long.selection.step == pytest.approx(1 / fps)


def kept_until(asked: int, fps: float, multiple_of: int) -> float:
    """Seconds of a clip in which ``adaptive`` frames stay if the clip is extended."""
    seconds, frames = windows.length(fps, multiple_of)
    later = windows.handed_on(fps, multiple_of) / fps
    return seconds * windows.full_windows(asked, frames, multiple_of) - later - 1e-6


@pytest.mark.parametrize("fps", [1.0, 0.75])
def test_adaptive_gives_an_extended_clip_the_same_leading_windows(
    pair: list[Path], fps: float
) -> None:
    short, long = (sampled(path, "adaptive", fps) for path in pair)
    assert_same_start(short, long, kept_until(int(SHORT_S * fps), fps, multiple_of=2))


def test_keyframe_gives_an_extended_clip_the_same_leading_frames(tmp_path: Path) -> None:
    long, short = tmp_path / "long.mp4", tmp_path / "short.mp4"
    make_clip(long, width=160, height=90, fps=25, duration=LONG_S, gop=30)
    copy_start(long, short, SHORT_S)
    first, second = sampled(short, "keyframe"), sampled(long, "keyframe")
    assert first.selection is not None
    # An odd last keyframe goes to the pair that the longer clip completes.
    assert len(first.selection.times) == 16
    assert_same_start(first, second, SHORT_S - 0.5, waiting=1)


def shortened(info: MediaInfo, count: int) -> MediaInfo:
    """The first ``count`` frames of a clip whose packets are in presentation order."""
    assert info.packets is not None
    assert info.video is not None
    table = windows.rows(info.packets, 0, count)
    gap = info.video.duration - float(info.packets.time[-1])
    duration = float(table.time[-1]) + gap
    stream = VideoStream(
        **{**vars(info.video), "num_frames": count, "duration": duration},
    )
    return MediaInfo("mp4", 1, duration, stream, (), table)


def noise(indices: Sequence[int], _likely: Sequence[int]) -> npt.NDArray[np.uint8]:
    pictures = [np.random.default_rng(i).integers(0, 256, (9, 16), np.uint8) for i in indices]
    return np.stack(pictures)


@settings(max_examples=80)
@given(
    info=clips(),
    part=st.floats(0.3, 1.0),
    policy=st.sampled_from(["uniform", "adaptive"]),
    fps=st.sampled_from([0.3, 1.0, 2.0, 7.0]),
    multiple_of=st.sampled_from([1, 2, 4]),
)
def test_what_follows_a_full_window_does_not_change_its_frames(
    info: MediaInfo, part: float, policy: PolicyName, fps: float, multiple_of: int
) -> None:
    spec = SamplingSpec(
        policy, fps=fps, max_frames=2000, min_frames=0, max_fps=30.0, multiple_of=multiple_of
    )
    assert info.packets is not None
    short = shortened(info, max(1, round(part * len(info.packets))))
    if not (is_unbound(short, spec) and is_unbound(info, spec)):
        return
    few, many = (select(clip, spec, noise).times.tolist() for clip in (short, info))
    if policy == "uniform":
        assert short.packets is not None
        moments = np.arange(asked_count(short, spec)) / fps
        if len(np.unique(shown_at(short.packets.time, moments))) < multiple_of:
            # Bursts: too few different frames for a whole multiple, so they are spread instead.
            return
        # The end of the last frame of all is known only once another follows.
        assert few[:-1] == many[: len(few) - 1]
        return
    end = kept_until(asked_count(short, spec), fps, multiple_of)
    few, many = ([time for time in times if time < end] for times in (few, many))
    # Where frames come in bursts, a last one that is not a whole multiple waits for the others.
    shared = min(len(few), len(many))
    assert abs(len(few) - len(many)) < multiple_of
    assert few[:shared] == many[:shared]


@given(
    fps=st.floats(0.01, 60.0, allow_nan=False),
    multiple_of=st.integers(1, 8),
)
def test_windows_are_the_shortest_of_eight_seconds_and_frames_with_whole_multiples(
    fps: float, multiple_of: int
) -> None:
    seconds, frames = windows.length(fps, multiple_of)
    assert frames % multiple_of == 0
    assert seconds == pytest.approx(frames / fps)
    assert seconds >= 8.0 - 1e-6
    assert frames >= 8
    assert (frames - multiple_of) / fps < 8.0 or frames - multiple_of < 8
