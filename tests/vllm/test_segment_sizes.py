"""Videos with sound are planned so that every segment fits vLLM's encoder cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from omni_reference import make_processor, render, sound, video

from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration
from vllm_mm_ext.adapters.processors.model_traits import read_traits
from vllm_mm_ext.base.shared_state import private_state
from vllm_mm_ext.config.options import NO_REDUCTION, RequestOptions
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.media.types import AudioStream, DecodeLimits, MediaInfo, SamplingSpec, VideoStream
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
INFO = MediaInfo("mp4", 1, SECONDS, STREAM, (SOUND,))


@cache
def omni() -> Any:
    processor = make_processor("qwen3_omni", Qwen3OmniMoeForConditionalGeneration)
    processor.segment_tokens = 128
    return processor


def costs_of(policy: Any) -> FrontendCosts:
    traits = replace(read_traits(omni()), audio_rate=16_000)
    spec = SamplingSpec(policy, fps=1.0, max_frames=256, multiple_of=2)
    plan = VideoPlan(spec, traits.size_rule, audio=True)
    nowhere: Any = None  # Costs follow from the probe alone.
    planned = PlannedVideo.of("", 1, nowhere, INFO, plan)
    assert planned is not None
    return FrontendCosts([planned], omni(), traits, DecodeLimits())


def limit() -> int:
    """Tokens of the largest segment at 2.2 frames a second."""
    return costs_of("uniform").item_tokens(0, 44, 0, NO_REDUCTION)


def decided(costs: FrontendCosts, **asked: Any) -> VideoDecision:
    state = private_state()
    (decision,) = QualityController(QualitySettings(), state).plan(
        [VideoSource("v", SECONDS, 600, SIDE, SIDE)],
        costs,
        defaults=SamplingDefaults(1.0, 4, 256, NO_REDUCTION),
        family=Family(True, True, True, frame_multiple=2, max_item_tokens=limit()),
        options=RequestOptions(**asked),
        session=None,
        context=ContextUse(length=1 << 20, text=100, output=100),
    )
    state.close()
    return decision


def largest_segment(decision: VideoDecision, costs: FrontendCosts, times: Any) -> int:
    side = int(costs.pixels(0, decision.frames, decision.frame_pixels) ** 0.5)
    frames = np.zeros((len(times), side, side, 3), np.uint8)
    clip = video(frames, times, sound(SECONDS), digest=f"clip-{side}-{len(times)}")
    made = render(omni(), "<|vision_start|><|video_pad|><|vision_end|>", {"video": [clip]})
    return max(place.get_num_embeds() for place in made["mm_placeholders"]["video"])


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
    densest = costs.densest(0, *plan, limit())
    assert (decision.lowered, densest) == ((), 2.0)
    # All of the frames in one place.
    times = np.minimum(np.arange(decision.frames) / densest, SECONDS)
    assert largest_segment(decision, costs, times) <= limit()
    assert costs.densest(0, *plan, 1 << 20) == 8.0
