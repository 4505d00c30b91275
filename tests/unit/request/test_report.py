"""The report of a request: order, counts without double counting, and where things came from."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.request import report
from vllm_mm_ext.request.trace import PlanTrace, RequestTrace, VideoTrace


def video(url: str, frames: int = 2) -> VideoTrace:
    times = [float(k) for k in range(frames)]
    reduction = Reduction(pool=2)
    return VideoTrace("uniform", frames, 28, 56, times, False, None, url, 9.5, reduction)


def test_videos_are_in_the_order_of_the_messages_however_they_finished() -> None:
    trace = RequestTrace(order=["a", "b", "a", "c"])
    trace.videos = [video("c"), video("a", 1), video("x"), video("a", 3), video("b")]
    frames = [entry["frames"] for entry in report.block(trace)["videos"]]
    assert frames[:2] == [1, 3], "both uses of the first URL, then the others"
    assert len(frames) == 5


def test_a_plan_is_reported_with_its_video() -> None:
    lowered = {"what": "frames", "wanted": "64", "given": "32", "why": "context"}
    trace = RequestTrace(plans={"a": PlanTrace(1, (lowered,))}, videos=[video("a"), video("b")])
    first, second = report.block(trace)["videos"]
    assert (first["level"], first["lowered"]) == (1, [lowered])
    assert (second["level"], second["lowered"]) == (0, [])
    assert (first["size"], first["source_s"], first["reduction"]["pool"]) == ([28, 56], 9.5, 2)


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
    trace = RequestTrace(preprocessed={"video": [hit for _, hit in items]}, cached_tokens=cached)
    spans, start = [], 3
    for length, _ in items:
        spans.append((start, start + length))
        start += length + 1
    trace.set_items({"video": spans})
    counts = report.block(trace)["cache"].get("video", {"items": 0, "processor": 0, "prefix": 0})
    assert counts["items"] == len(items)
    assert counts["processor"] == sum(hit for _, hit in items)
    assert counts["prefix"] == sum(end <= cached for _, end in spans)


def test_the_report_is_plain_json() -> None:
    trace = RequestTrace(order=["a"], videos=[video("a")], stages={"fetch": 0.0123456})
    trace.audios.append({"seconds": 1.5, "cached": True})
    made = report.block(trace)
    assert json.loads(json.dumps(made)) == made
    assert made["stages_ms"] == {"fetch": 12.35}
    assert made["cache"]["prompt_tokens"] is None
