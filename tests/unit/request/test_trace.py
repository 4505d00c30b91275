"""The header that says what was done stays small whatever a request holds."""

import json

import pytest

from vllm_mm_ext.request.media_items import AudioReport, MediaItem, VideoReport
from vllm_mm_ext.request.trace import RequestTrace


def trace_of(videos: int, frames: int) -> RequestTrace:
    trace = RequestTrace(shows_cache_hits=True)
    times = [i * 100.123 for i in range(frames)]
    for _ in range(videos):
        video = VideoReport("adaptive", frames, 1080, 1920, times, False, 12345.67)
        trace.media.append(MediaItem("video", "file:///v", report=video))
        trace.media.append(MediaItem("audio", "file:///a", report=AudioReport(12345.67, False)))
    return trace


@pytest.mark.parametrize("videos", [1, 4, 16, 500])
@pytest.mark.parametrize("frames", [1, 16, 32, 64, 256, 4096])
def test_the_summary_stays_below_usual_header_limits(videos: int, frames: int) -> None:
    assert len(trace_of(videos, frames).summary()) < 5000


def test_frame_times_of_a_usual_request_are_listed() -> None:
    summary = json.loads(trace_of(2, 32).summary())
    assert [len(video["times"]) for video in summary["videos"]] == [32, 32]
