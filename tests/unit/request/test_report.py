"""The report of a request: order, counts without double counting, and where things came from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.request import report
from vllm_mm_ext.request.media_items import AudioReport, MediaItem, PlanReport, VideoReport
from vllm_mm_ext.request.trace import RequestTrace

UNPLANNED = PlanReport()


def video(frames: int = 2, decision: PlanReport = UNPLANNED, cached: bool = False) -> MediaItem:
    times = [float(k) for k in range(frames)]
    reduction = Reduction(pool=2)
    made = VideoReport("uniform", frames, 28, 56, times, cached, None, 9.5, reduction)
    return MediaItem("video", "file:///v", decision=decision, report=made)


def audio(cached: bool = False) -> MediaItem:
    return MediaItem("audio", "file:///a", report=AudioReport(1.5, cached))


def test_only_what_was_delivered_is_reported() -> None:
    trace = RequestTrace(media=[video(1), MediaItem("video", "file:///failed"), audio(), video(3)])
    made = report.block(trace)
    assert [entry["frames"] for entry in made["videos"]] == [1, 3]
    assert [entry["seconds"] for entry in made["audios"]] == [1.5]


def test_a_plan_is_reported_with_its_video() -> None:
    lowered = {"what": "frames", "wanted": "64", "given": "32", "why": "context"}
    trace = RequestTrace(media=[video(decision=PlanReport(1, (lowered,))), video()])
    first, second = report.block(trace)["videos"]
    assert (first["level"], first["lowered"]) == (1, [lowered])
    assert (second["level"], second["lowered"]) == (0, [])
    assert (first["size"], first["source_s"], first["reduction"]["pool"]) == ([28, 56], 9.5, 2)


def test_sound_that_is_not_there_as_a_whole_has_a_note() -> None:
    whole, part = video(), video()
    assert isinstance(part.report, VideoReport)
    part.report = replace(part.report, audio_s=600.0, audio_note="cut")
    first, second = report.block(RequestTrace(media=[whole, part]))["videos"]
    assert "audio_note" not in first
    assert (second["audio_s"], second["audio_note"]) == (600.0, "cut")


@pytest.mark.parametrize("cached", [False, True])
def test_cache_hits_are_told_only_where_the_operator_says_so(cached: bool) -> None:
    told = []
    for shown in (False, True):
        trace = RequestTrace(media=[video(cached=cached), audio(cached)], shows_cache_hits=shown)
        trace.preprocessed = {"video": [cached]}
        trace.cached_tokens = 9 * cached
        trace.set_items({"video": [(3, 8, 5)]})
        told.append((json.dumps(report.block(trace)), trace.summary()))
    hidden, shown_ = told
    for text in hidden:
        assert "cache" not in text
    assert str(cached).lower() in shown_[0]
    assert f'"cached":{str(cached).lower()}' in shown_[1]


def test_hits_and_misses_look_the_same_where_they_are_not_told() -> None:
    looks = set()
    for cached in (False, True):
        trace = RequestTrace(media=[video(cached=cached), audio(cached)])
        trace.preprocessed = {"video": [cached]}
        trace.cached_tokens = 9 * cached
        trace.set_items({"video": [(3, 8, 5)]})
        trace.add_stages({"fetch": 0.5, "video": 0.5})
        trace.add_work({} if cached else {"decode": 0.5})
        headers = (trace.summary(), trace.server_timing())
        looks.add((json.dumps(report.block(trace)), *headers))
    assert len(looks) == 1


@given(
    embeddings=st.dictionaries(st.sampled_from(["video", "audio", "image"]), st.integers(0, 500)),
    text=st.integers(0, 100),
)
def test_tokens_add_up_to_the_prompt(embeddings: dict[str, int], text: int) -> None:
    trace = RequestTrace()
    trace.set_tokens(embeddings, sum(embeddings.values()) + text)
    tokens = report.block(trace)["tokens"]
    assert sum(tokens.values()) == sum(embeddings.values()) + text
    assert tokens["audio"] == embeddings.get("audio", 0)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12), st.integers(0, 120))
def test_an_item_counts_as_prefix_only_when_all_of_it_was_cached(
    items: list[tuple[int, bool]], cached: int
) -> None:
    trace = RequestTrace(cached_tokens=cached, shows_cache_hits=True)
    trace.preprocessed = {"video": [hit for _, hit in items]}
    spans, start = [], 3
    for length, _ in items:
        spans.append((start, start + length, length))
        start += length + 1
    trace.set_items({"video": spans})
    counts = report.block(trace)["cache"].get("video", {"items": 0, "processor": 0, "prefix": 0})
    assert counts["items"] == len(items)
    assert counts["processor"] == sum(hit for _, hit in items)
    assert counts["prefix"] == sum(end <= cached for _, end, _ in spans)


def test_the_report_is_plain_json() -> None:
    trace = RequestTrace(media=[video(), audio(True)], shows_cache_hits=True)
    trace.add_stages({"fetch": 0.0123456})
    trace.add_work({"decode": 0.5})
    made = report.block(trace)
    assert json.loads(json.dumps(made)) == made
    assert made["stages_ms"] == {"decode": 500.0, "fetch": 12.35}
    assert made["cache"]["prompt_tokens"] is None


_MODALITIES = st.sampled_from(["video", "audio", "image"])


@example(
    [("video", 1, 0), ("video", 1, 7), ("video", 50, 9), ("video", 50, 9), ("audio", 1, 0)], 5, 134
)
@given(
    st.lists(st.tuples(_MODALITIES, st.integers(1, 50), st.integers(0, 9)), max_size=8),
    st.integers(0, 9),
    st.integers(0, 600),
)
def test_cached_tokens_by_modality_add_up_to_the_cached_prefix(
    items: list[tuple[str, int, int]], sound: int, cached: int
) -> None:
    spans: dict[str, list[tuple[int, int, int]]] = {}
    start = 3
    for modality, embeddings, markers in items:
        length = embeddings + markers
        spans.setdefault(modality, []).append((start, start + length, embeddings))
        start += length + 1
    embeddings_of = {m: sum(span[2] for span in found) for m, found in spans.items()}
    if (heard := min(sound, embeddings_of.get("video", 0))) > 0:
        embeddings_of["video"] -= heard
        embeddings_of["audio"] = embeddings_of.get("audio", 0) + heard
    cached = min(cached, start)
    trace = RequestTrace(cached_tokens=cached)
    trace.set_items(spans)
    trace.set_tokens(embeddings_of, start)
    found = trace.cached_by_modality()
    assert found.keys() == trace.tokens.keys()
    assert all(0 <= count <= trace.tokens[modality] for modality, count in found.items())
    assert sum(found.values()) == cached
