"""The header that says what was done stays small whatever a request holds."""

import json

import pytest

from vllm_mm_ext.request.trace import RequestTrace, VideoTrace


def trace_of(videos: int, frames: int) -> RequestTrace:
    trace = RequestTrace()
    for _ in range(videos):
        times = [i * 100.123 for i in range(frames)]
        trace.videos.append(VideoTrace("adaptive", frames, 1080, 1920, times, False, 12345.67))
        trace.audios.append({"seconds": 12345.67, "cached": False})
    return trace


@pytest.mark.parametrize("videos", [1, 4, 16, 500])
@pytest.mark.parametrize("frames", [1, 16, 32, 64, 256, 4096])
def test_the_summary_stays_below_usual_header_limits(videos: int, frames: int) -> None:
    assert len(trace_of(videos, frames).summary()) < 5000


def test_frame_times_of_a_usual_request_are_listed() -> None:
    summary = json.loads(trace_of(2, 32).summary())
    assert [len(video["times"]) for video in summary["videos"]] == [32, 32]
