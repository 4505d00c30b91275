"""Videos with sound are planned so that every segment fits vLLM's encoder cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from omni_reference import make_processor, render, sound, video
from packet_tables import regular_table

from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration
from vllm_mm_ext.adapters.processors.model_traits import read_traits
from vllm_mm_ext.base.shared_state import private_state
from vllm_mm_ext.config.options import NO_REDUCTION, RequestOptions
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.media.sampling import select
from vllm_mm_ext.media.types import (
    AudioStream,
    DecodeLimits,
    MediaInfo,
    SamplingSpec,
    SizeRule,
    VideoStream,
)
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.quality.videos import (
    ContextUse,
    Family,
    SamplingDefaults,
    VideoDecision,
    VideoSource,
)
from vllm_mm_ext.request.costs import FrontendCosts, PlannedVideo

SECONDS, SIDE = 20.0, 224
STREAM = VideoStream(0, "h264", SIDE, SIDE, 0, 30.0, False, 600, SECONDS, "yuv420p")
SOUND = AudioStream(1, "aac", 16_000, 1, SECONDS)
# So large that little of a segment is sound.
LARGE = 896
FIXED = SizeRule("fixed", height=LARGE, width=LARGE)


@cache
def omni() -> Any:
    processor = make_processor("qwen3_omni", Qwen3OmniMoeForConditionalGeneration)
    processor.segment_tokens = 128
    return processor


def planned_as(policy: Any, seconds: float, min_fps: float, size: SizeRule) -> PlannedVideo:
    spec = SamplingSpec(policy, fps=1.0, max_frames=256, min_fps=min_fps, multiple_of=2)
    stream = replace(STREAM, num_frames=round(30 * seconds), duration=seconds)
    info = MediaInfo("mp4", 1, seconds, stream, (replace(SOUND, duration=seconds),))
    nowhere: Any = None  # Costs follow from the probe alone.
    planned = PlannedVideo.of("", 1, nowhere, info, VideoPlan(spec, size, audio=True))
    assert planned is not None
    return planned


def costs_for(video: PlannedVideo) -> FrontendCosts:
    traits = replace(read_traits(omni()), audio_rate=16_000)
    return FrontendCosts([video], omni(), traits, DecodeLimits())


def costs_of(policy: Any) -> FrontendCosts:
    return costs_for(planned_as(policy, SECONDS, 0.1, read_traits(omni()).size_rule))


def limit() -> int:
    """Tokens of the largest segment at 2.2 frames a second."""
    return costs_of("uniform").item_tokens(0, 44, 0, NO_REDUCTION, 2.2)


def decided(
    costs: FrontendCosts, seconds: float = SECONDS, family: Family | None = None, **asked: Any
) -> VideoDecision:
    state = private_state()
    (decision,) = QualityController(QualitySettings(), state).plan(
        [VideoSource("v", seconds, round(30 * seconds), SIDE, SIDE)],
        costs,
        defaults=SamplingDefaults(1.0, 4, 256, NO_REDUCTION),
        family=family or Family(True, True, True, frame_multiple=2, max_item_tokens=limit()),
        options=RequestOptions(**asked),
        session=None,
        context=ContextUse(length=1 << 20, text=100, output=100),
    )
    state.close()
    return decision


def selected(video: PlannedVideo, decision: VideoDecision, densest: float | None) -> Any:
    """Times of the frames that are taken of a clip in which all goes on in the first seconds."""
    table = regular_table(video.stream.num_frames, 30)
    size = np.where(np.arange(len(table)) < 150, 50_000, 400).astype(np.int32)
    table = replace(table, time=np.arange(len(table)) / 30, size=size, time_base=1 / 30)
    spec = video.planned(decision, densest).sampling
    return select(replace(video.info, packets=table), spec, noise).times


def largest_of(times: Any, seconds: float) -> int:
    """Tokens of the largest segment of a video with ``FIXED`` frames at these times."""
    count = omni().video_tokens(
        *(len(times), LARGE, LARGE),
        times=list(times),
        audio_samples=round(16_000 * seconds),
        reduction=NO_REDUCTION,
    )
    return int(count.largest)


def noise(indices: Sequence[int], _: Sequence[int]) -> Any:
    """Thumbnails that differ in the first seconds alone."""
    made = np.random.default_rng(0).integers(0, 256, (len(indices), 54, 64), dtype=np.uint8)
    made[np.asarray(indices) >= 150] = 128
    return made


def largest_segment(decision: VideoDecision, costs: FrontendCosts, times: Any) -> int:
    side = int(costs.pixels(0, decision.frames, decision.frame_pixels) ** 0.5)
    frames = np.zeros((len(times), side, side, 3), np.uint8)
    clip = video(frames, times, sound(SECONDS), digest=f"clip-{side}-{len(times)}")
    made = render(omni(), "<|vision_start|><|video_pad|><|vision_end|>", {"video": [clip]})
    return int(max(place.get_num_embeds() for place in made["mm_placeholders"]["video"]))


@pytest.mark.parametrize("fps", [1.0, 4.0, 8.0])
def test_frames_or_pixels_are_lowered_where_a_window_of_sound_holds_too_many(fps: float) -> None:
    costs = costs_of("uniform")
    decision = decided(costs, fps=fps)
    times = np.linspace(0, SECONDS - 1 / 30, decision.frames)
    assert largest_segment(decision, costs, times) <= limit()
    assert {one.why for one in decision.lowered} == (set() if fps == 1.0 else {"limit"})


def test_adaptive_puts_no_more_frames_into_a_second_than_a_segment_holds() -> None:
    costs = costs_of("adaptive")
    decision = decided(costs, fps=2.0)
    plan = decision.frames, decision.frame_pixels, decision.reduction
    densest = costs.densest(0, *plan, 2.0, limit())
    assert (decision.lowered, densest) == ((), 2.0)
    # All of the frames in one place.
    times = np.minimum(np.arange(decision.frames) / densest, SECONDS)
    assert largest_segment(decision, costs, times) <= limit()
    assert costs.densest(0, *plan, 2.0, 1 << 20) == 8.0


@pytest.mark.parametrize("rate", [1, 2])
@pytest.mark.parametrize(
    ("seconds", "fps", "min_fps"),
    [(60, 1.0, 0.1), (60, 8.0, 0.1), (60, 2.1, 0.1), (10, 2.1, 0.1), (60, 2.0, 3.5), (40, 12.0, 6)],
)
def test_what_adaptive_chooses_fits_a_segment_that_holds_whole_frames_a_second(
    seconds: int, fps: float, min_fps: float, rate: int
) -> None:
    video = planned_as("adaptive", seconds, min_fps, FIXED)
    costs = costs_for(video)
    limit = largest_of(np.arange(rate * seconds) / rate, seconds)
    family = Family(False, False, True, frame_multiple=2, max_item_tokens=limit)
    decision = decided(costs, seconds, family, fps=fps)
    densest = costs.densest(0, decision.frames, 0, NO_REDUCTION, fps, limit)
    times = selected(video, decision, densest)
    assert largest_of(times, seconds) <= limit
    # Nor are there fewer than fit.
    assert len(times) == decision.frames == min(seconds * fps, seconds * rate) // 2 * 2


@pytest.mark.parametrize(("seconds", "fps"), [(2.4, 4.0), (9.9, 2.0), (60.0, 2.0)])
def test_uniform_frames_at_the_rate_asked_for_are_no_closer_than_planned(
    seconds: float, fps: float
) -> None:
    video = planned_as("uniform", seconds, 0.1, FIXED)
    costs = costs_for(video)
    decision = decided(costs, seconds, Family(False, False, True, frame_multiple=2), fps=fps)
    planned = costs.item_tokens(0, decision.frames, 0, NO_REDUCTION, fps)
    assert largest_of(selected(video, decision, None), seconds) == planned
