"""Counted before decoding and counted in the prompt: the same, for every family and reduction."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omni_reference import make_processor, render, sound
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.payload import SampledFrames

FAMILIES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_omni": "Qwen3OmniMoeForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
VIDEO = {
    "qwen2_5_omni": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "llava_onevision": "<video>",
    "internvl": "<video>",
}
RATE = 16_000


@cache
def processor(family: str) -> Any:
    module = importlib.import_module(f"vllm_mm_ext.adapters.models.{family}")
    return make_processor(family, getattr(module, FAMILIES[family]))


reductions = st.builds(
    lambda pool, temporal, static, keep: Reduction(
        pool=pool, temporal=temporal, static=static, keep=1.0 if static == "none" else keep
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["none", "merge", "prune"]),
    st.sampled_from([0.1, 0.5, 0.77]),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    frames=st.integers(1, 17),
    height=st.integers(2, 5),
    width=st.integers(2, 5),
    fps=st.sampled_from([0.2, 1.0, 2.0, 3.7]),
    seconds=st.sampled_from([0.0, 0.3, 4.0, 11.3]),
    reduction=reductions,
    target=st.sampled_from([0, 16, 40, 300]),
    seed=st.integers(0, 3),
)
def test_predicted_tokens_are_those_of_the_prompt(
    family, frames, height, width, fps, seconds, reduction, target, seed
):
    ours = processor(family)
    ours.segment_tokens = target
    hears = bool(getattr(ours, "hears_video", False))
    rng = np.random.default_rng(seed)
    size = (56 * height, 56 * width)
    # A still background with some change, so that there is something to tell tokens apart by.
    pixels = np.repeat(rng.integers(0, 255, (1, *size, 3), dtype=np.uint8), frames, axis=0)
    pixels[frames // 2 :, : size[0] // 2] ^= 64
    times = tuple(i / fps for i in range(frames))
    track = sound(seconds) if seconds and hears else None
    clip = SampledFrames(
        pixels, digest="clip", times=times, audio=track, reduction=reduction, pinned=False
    )
    metadata = {
        "total_num_frames": frames,
        "fps": fps,
        "duration": frames / fps,
        "video_backend": "mm_ext",
        "frames_indices": list(range(frames)),
        "do_sample_frames": False,
    }
    mark = VIDEO.get(family, "<|vision_start|><|video_pad|><|vision_end|>")
    item = MediaWithBytes((clip, metadata), b"clip")
    result = render(ours, f"see {mark} now", {"video": [item]})
    empty = len(ours.info.get_tokenizer().encode(f"see {mark} now", add_special_tokens=False))

    layout = ours.layout(ours.shape_of(clip, metadata), {})
    count = ours.video_tokens(
        frames,
        *layout.size,
        times=times,
        audio_samples=0 if track is None else len(track),
        reduction=reduction,
    )
    places = result["mm_placeholders"]
    embeddings = {kind: sum(p.get_num_embeds() for p in ranges) for kind, ranges in places.items()}
    assert embeddings["video"] == count.visual
    assert embeddings.get("audio", 0) == count.audio
    assert len(result["prompt_token_ids"]) == empty - 1 + count.total


@pytest.mark.parametrize("family", FAMILIES)
def test_different_reductions_never_share_an_item(family):
    ours = processor(family)
    ours.segment_tokens = 40
    pixels = np.random.default_rng(0).integers(0, 255, (8, 112, 112, 3), dtype=np.uint8)
    mark = VIDEO.get(family, "<|vision_start|><|video_pad|><|vision_end|>")
    seen: set[str] = set()
    for reduction in (
        Reduction(),
        Reduction(pool=2),
        Reduction(temporal=2),
        Reduction(static="merge", keep=0.5),
        Reduction(static="prune", keep=0.5),
        Reduction(static="prune", keep=0.4),
    ):
        clip = SampledFrames(pixels, digest="same", times=tuple(range(8)), reduction=reduction)
        metadata = {
            "total_num_frames": 8,
            "fps": 1.0,
            "duration": 8.0,
            "video_backend": "mm_ext",
            "frames_indices": list(range(8)),
            "do_sample_frames": False,
        }
        item = MediaWithBytes((clip, metadata), b"same")
        hashes = set(render(ours, mark, {"video": [item]})["mm_hashes"]["video"])
        assert not hashes & seen
        seen |= hashes
