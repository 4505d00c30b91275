"""What a heard video's sound takes in memory, and that the decoded cache counts it."""

from __future__ import annotations

import numpy as np
import pytest
from omni_reference import make_processor, pixels, render, sound, video
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext.adapters.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration as Qwen25
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration as Qwen3
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.frontend import VideoResult
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.media.types import FrameSelection, MediaInfo

FAMILIES = {
    "qwen2_5_omni": (Qwen25, "<|vision_bos|><|VIDEO|><|vision_eos|>"),
    "qwen3_omni": (Qwen3, "<|vision_start|><|video_pad|><|vision_end|>"),
}
REDUCTIONS = (NO_REDUCTION, Reduction(pool=2), Reduction(temporal=2))


def held(frames: SampledFrames) -> dict[int, int]:
    """Bytes of the log-mel storage that frames keep, by its address."""
    pieces = [
        segment.track.mel
        for recipe in frames.memo["splits"].values()
        for segment in recipe.segments
        if segment.track is not None
    ]
    assert pieces
    storages = [mel.untyped_storage() for mel in (frames.memo["mel"], *pieces)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("seconds", [3.0, 4.3217])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_reductions_of_a_video_share_one_spectrogram_which_the_cache_counts(
    family: str, seconds: float
) -> None:
    model, prompt = FAMILIES[family]
    processor = make_processor(family, model)
    item = video(pixels(8), times=np.arange(8) * 0.5, track=sound(seconds))
    base: SampledFrames = item.media[0]
    mel: dict[int, int] = {}
    for reduction in REDUCTIONS:
        frames = base.reduced(reduction)
        assert frames.digest is not None
        delivered = MediaWithBytes((frames, item.media[1]), frames.digest.encode())
        render(processor, prompt, {"video": [delivered]})
        mel |= held(frames)
    assert len(mel) == 1

    assert base.audio is not None
    info = MediaInfo("mp4", 1, seconds, None, ())
    selection = FrameSelection("uniform", np.arange(8), np.linspace(0.0, 3.5, 8))
    result = VideoResult(base, info, selection, stages={}, cached=False)
    counted = result.nbytes - base.nbytes - base.audio.nbytes
    assert 0 < sum(mel.values()) <= counted
    assert counted <= 1.1 * sum(mel.values())
