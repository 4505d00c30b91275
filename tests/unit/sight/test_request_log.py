"""The log of requests is bounded, tells what a model saw, and forgets what was taken down."""

from __future__ import annotations

import base64
import json
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from vllm_mm_ext.long_video.asking import Cost, Window
from vllm_mm_ext.long_video.looking import SeenWindow
from vllm_mm_ext.long_video.notes import Entry
from vllm_mm_ext.long_video.running import Outcome
from vllm_mm_ext.request.long_report import LongVideoReport
from vllm_mm_ext.request.media_items import (
    AudioReport,
    ImageItem,
    MediaItem,
    PlanReport,
    VideoReport,
)
from vllm_mm_ext.request.stage_times import StageTime
from vllm_mm_ext.request.trace import PromptItem, RequestTrace
from vllm_mm_ext.sight.request_log import Arrival, RequestLog, record_of, shown_url, summary_of
from vllm_mm_ext.sight.seen_media import unknown_digest

DIGEST = "ab" * 32
LOWERED = ({"what": "frames", "wanted": "64", "given": "32", "why": "load tier 1"},)


def pictures(*files: bytes) -> Future[list[bytes]]:
    made: Future[list[bytes]] = Future()
    made.set_result(list(files))
    return made


def trace_of(frames: int = 3) -> RequestTrace:
    video = MediaItem(
        "video",
        "https://user:pass@host/a/clip.mp4?token=secret",
        decision=PlanReport(1, LOWERED),
        report=VideoReport(
            "uniform", frames, 224, 398, [0.5 * i for i in range(frames)], False, 2.0
        ),
        digest=DIGEST,
        pictures=pictures(b"jpeg1", b"jpeg2"),
    )
    audio = MediaItem("audio", "data:audio/wav;base64,UklGR", report=AudioReport(1.5, True))
    return RequestTrace(
        media=[video, audio],
        images=[ImageItem("http://host/p.png", "cd" * 32, 640, 480)],
        tokens={"video": 100, "text": 20},
        items=[
            PromptItem("video", 0, 50, True, 50, "h1"),
            PromptItem("video", 50, 100, False, 50, "h2"),
        ],
        cached_tokens=60,
        timeline=[
            StageTime("fetch", 100.0, 0.25, "video", 0),
            StageTime("fetch", 100.5, 0.25, "audio", 1),
            StageTime("queue", 101.0, 0.5),
        ],
    )


def record(number: int = 1, frames: int = 3) -> dict[str, Any]:
    arrival = Arrival(f"0-{number}", "/v1/chat/completions", 100.0)
    return record_of(arrival, trace_of(frames), 2.0, 200)


def kept(log: RequestLog, name: str) -> dict[str, Any]:
    found = log.record(name)
    assert found is not None
    return found


def test_a_record_tells_what_the_model_saw_and_what_was_lowered_and_why() -> None:
    video, audio, image = record()["media"]
    assert video["times"] == [0.0, 0.5, 1.0]
    assert video["lowered"] == [dict(LOWERED[0])]
    assert [base64.b64decode(one) for one in video["pictures"]] == [b"jpeg1", b"jpeg2"]
    assert audio["decoded_cache"] is True
    assert image["size"] == [480, 640]
    assert record()["items"] == {"video": {"items": 2, "processor": 1, "prefix": 1}}
    json.dumps(record())


def test_the_row_of_a_request_spans_each_stage_from_its_first_to_its_last_item() -> None:
    row = summary_of(record())
    assert row["stages"] == {"fetch": [0.0, 0.75], "queue": [1.0, 1.5]}
    assert row["lowered"]


def test_no_password_and_no_token_of_a_url_is_shown() -> None:
    assert record()["media"][0]["url"] == "https://host/a/clip.mp4"
    assert shown_url("data:video/mp4;base64,AAAA") == "data:video/mp4;base64,..."
    assert len(shown_url("http://host/" + "a" * 5000)) < 500


def test_the_log_keeps_the_latest_requests_within_its_bounds() -> None:
    log = RequestLog(3)
    for number in range(10):
        log.add(record(number))
    assert [row["id"] for row in log.summaries()] == ["0-9", "0-8", "0-7"]
    assert kept(log, "0-9")["id"] == "0-9"
    assert log.record("0-6") is None
    size = len(json.dumps(record(), separators=(",", ":")))
    small = RequestLog(100, max_bytes=3 * size)
    for number in range(50):
        small.add(record(number))
    assert 1 <= len(small) <= 3
    assert small.num_bytes <= 3 * size


def test_a_record_larger_than_the_log_is_not_kept() -> None:
    log = RequestLog(3, max_bytes=100)
    log.add(record())
    assert not len(log)
    assert not log.num_bytes


def test_what_was_taken_down_leaves_no_picture_time_or_url() -> None:
    log = RequestLog(10)
    log.add(record(1))
    log.add(record(2))
    log.forget([DIGEST])
    for name in ("0-1", "0-2"):
        left = kept(log, name)
        assert left["media"][0] == {"modality": "video", "taken_down": True}
        assert left["media"][1]["modality"] == "audio"
        assert left["timeline"]
        assert "clip.mp4" not in json.dumps(left)
    assert log.summaries()[0]["media"][0]["name"] == ""
    bodies = sum(len(json.dumps(kept(log, name), separators=(",", ":"))) for name in ("0-1", "0-2"))
    assert log.num_bytes == bodies


def refused(url: str, **known: Any) -> dict[str, Any]:
    """The record of a request that ended before its medium was delivered."""
    trace = RequestTrace(media=[MediaItem("video", url, **known)])
    return record_of(Arrival("0-9", "/v1/chat/completions", 100.0), trace, 1.0, 410)


def test_media_that_were_not_delivered_are_forgotten_too() -> None:
    url = "http://host/clip.mp4?token=secret"
    planned: Any = SimpleNamespace(digest=DIGEST)  # A MediaRef that is resolved.
    for one in (refused(url), refused(url, content=planned)):
        log = RequestLog(10)
        log.add(one)
        log.add(refused("data:video/mp4;base64,AAAA") | {"id": "0-10"})
        log.forget([DIGEST], [url, "data:video/mp4;base64,BBBB"])
        assert kept(log, "0-9")["media"] == [{"modality": "video", "taken_down": True}]
        assert "url" in kept(log, "0-10")["media"][0]


def test_notes_about_videos_that_the_model_saw_in_parts_go_with_the_videos() -> None:
    windows = tuple(
        SeenWindow(Window(video, 0, 0.0, 30.0), (Entry(video, 1.0, "a red door", 0),))
        for video in (0, 1, 80)
    )
    report = LongVideoReport("map_reduce", shows_cache_hits=False)
    report.outcome = Outcome("map_reduce", (), windows, (), is_thinned=False, cost=Cost())
    url = "https://host/long.mp4?token=secret"
    held = {url: DIGEST, "https://host/live.ts": ""} | {
        f"file:///{n}": "ef" * 32 for n in range(90)
    }
    log = RequestLog(10)
    log.add(
        record_of(
            Arrival("0-1", "/v1/chat/completions", 100.0),
            RequestTrace(held=held, long_video=report),
            2.0,
            200,
        )
    )
    made = kept(log, "0-1")
    assert made["media"][0] == {
        "modality": "video",
        "url": "https://host/long.mp4",
        "digest": DIGEST,
    }
    assert len(made["media"]) == 64
    # Of each video whose notes are kept, the record knows which file it was.
    assert [window["video"] for window in made["windows"]] == [0, 1]
    log.forget([DIGEST], ["https://host/live.ts"])
    left = json.dumps(kept(log, "0-1"))
    assert "red door" not in left
    assert "host" not in left


def test_a_video_that_was_looked_at_and_delivered_is_listed_once() -> None:
    trace = trace_of()
    trace.held = {trace.media[0].url: DIGEST}
    made = record_of(Arrival("0-1", "/v1/chat/completions", 100.0), trace, 2.0, 200)
    assert [medium["modality"] for medium in made["media"]] == ["video", "audio", "image"]


def test_half_a_surrogate_pair_is_shown_as_what_can_be_sent() -> None:
    assert shown_url("http://a/\ud800") == "http://a/?"
    assert unknown_digest("http://a/\ud800") != unknown_digest("http://a/\udbff")


def test_frames_listed_are_bounded() -> None:
    assert len(record(frames=4000)["media"][0]["times"]) == 512
