"""Qwen2.5-VL: segments, and temporal positions from real frame times."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.video_utils import VideoMetadata
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor as _Stock

from vllm_mm_ext.adapters.processors.patch_segments import PatchSegmentProcessor
from vllm_mm_ext.video.segments import VideoShape


class Qwen2_5_VLMultiModalProcessor(PatchSegmentProcessor, _Stock):  # type: ignore[misc]  # noqa: N801
    """vLLM's processor, which takes segments instead of videos."""

    def seconds_per_grid(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> float:
        """Seconds between grids at the mean frame rate, as transformers computes it."""
        if shape.metadata is None:
            return 1.0
        known = {k: v for k, v in shape.metadata.items() if k != "do_sample_frames"}
        patch = int(self.info.get_hf_processor().video_processor.temporal_patch_size)
        return patch / float(VideoMetadata(**known).sampled_fps)
