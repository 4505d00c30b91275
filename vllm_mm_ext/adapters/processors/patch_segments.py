"""Segments for the Qwen families, whose tokens are merged patches of two consecutive frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vllm_mm_ext.adapters.processors.model_traits import size_rule_for, video_kwargs
from vllm_mm_ext.adapters.processors.segment_items import part_of
from vllm_mm_ext.adapters.processors.segment_processor import SegmentProcessor
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.video.cuts import unit_ends
from vllm_mm_ext.video.grid_times import GridTimes, even_grid, grid_times
from vllm_mm_ext.video.segments import (
    Sound,
    VideoLayout,
    VideoSegment,
    VideoShape,
)

# Options of the video processor that still apply to frames that have their final size.
_PIXEL_KWARGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class PatchSegmentProcessor(SegmentProcessor):
    """Mixin for families whose video processor is Qwen2-VL's or Qwen3-VL's."""

    @property
    def video_token_id(self) -> int:
        """Id of the family's token for video (``<|video_pad|>``)."""
        return int(self.info.get_hf_config().video_token_id)

    @property
    def positions_per_second(self) -> float:
        """M-RoPE positions per second of video."""
        return float(self.info.get_hf_config().vision_config.tokens_per_second)

    def seconds_per_grid(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> float:
        """Seconds between grids that transformers' processor assumes for the whole video.

        Args:
            shape: The video.
            hf_kwargs: The request's ``mm_processor_kwargs``.
        """
        raise NotImplementedError

    def sound(self, shape: VideoShape, grids: GridTimes, per_grid: int) -> Sound | None:
        """How the video's tokens interleave with its sound's; None without sound.

        Args:
            shape: The video.
            grids: Times of the temporal grids.
            per_grid: Tokens of a grid.
        """
        return None

    def unit_tokens(self, seconds: float) -> int:
        """Audio tokens of a unit of a growing video; 0 for a family that hears nothing."""
        return 0

    def timestamps(self, shape: VideoShape) -> tuple[float, ...] | None:
        """Seconds written into the prompt before each grid; None if the family writes none."""
        return None

    def layout(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> VideoLayout | None:
        """One grid per temporal patch; a token is a square of merged patches."""
        processor = self.info.get_hf_processor().video_processor
        factor = processor.patch_size * processor.merge_size
        size = (shape.height, shape.width)
        # The front-end did not know of a size that the request itself sets.
        final = shape.final and not _sets_size(hf_kwargs)
        if not final or size[0] % factor or size[1] % factor:
            chosen = self._size_of_processor(shape, hf_kwargs)
            if chosen is None:
                return None
            size = chosen
        patch = int(processor.temporal_patch_size)
        num_grids = math.ceil(shape.frames / patch)
        per_grid = (size[0] // factor) * (size[1] // factor)
        seconds_per_grid = self.seconds_per_grid(shape, hf_kwargs)
        grids, positions = even_grid(num_grids, seconds_per_grid), None
        if shape.times is not None:
            grids = grid_times(shape.times, temporal_patch=patch, step=shape.step)
            positions = grids.temporal_positions(self.positions_per_second)
            # The model goes by the positions. A mean of the times would depend on the whole video,
            # and with it the identity of every segment.
            seconds_per_grid = grids.step or 1.0
        sound = self.sound(shape, grids, per_grid) if shape.audio_samples > 0 else None
        ends = None
        if shape.unit_s is not None:
            per_unit = 0 if sound is None else self.unit_tokens(shape.unit_s)
            total = 0 if sound is None else sum(audio for _, audio in sound.runs)
            ends = unit_ends(grids.seconds, shape.unit_s, audio=total, audio_per_unit=per_unit)
        return VideoLayout(
            size=size,
            grids=num_grids,
            height=size[0] // factor,
            width=size[1] // factor,
            temporal_patch=patch,
            positions=positions,
            seconds_per_grid=seconds_per_grid,
            timestamps=self.timestamps(shape),
            sound=sound,
            ends=None if ends is None else tuple(ends),
        )

    def _size_of_processor(
        self, shape: VideoShape, hf_kwargs: Mapping[str, object]
    ) -> tuple[int, int] | None:
        """Size to which transformers would resize the whole video; None if that is not known."""
        rule = size_rule_for(self.info, hf_kwargs, self.info.get_hf_processor(**hf_kwargs))
        if rule.kind not in ("qwen_vl", "qwen3_vl"):
            return None
        return target_size(rule, width=shape.width, height=shape.height, num_frames=shape.frames)

    def encode_inputs(
        self, segments: Sequence[VideoSegment], hf_kwargs: Mapping[str, object]
    ) -> dict[str, Any]:
        """Patches of each segment, made by the model's own video processor."""
        processor = self.info.get_hf_processor(**hf_kwargs).video_processor
        given = video_kwargs(self.info, hf_kwargs)
        frames = [
            torch.from_numpy(self.at_size(np.asarray(segment), part_of(segment).layout.size))
            .permute(0, 3, 1, 2)
            .contiguous()
            for segment in segments
        ]
        out = processor(
            videos=frames,
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
            **{key: given[key] for key in _PIXEL_KWARGS if key in given},
        )
        pixels = out["pixel_values_videos"]
        if pixels.is_floating_point():
            pixels = pixels.to(self.info.ctx.model_config.dtype)
        return {
            "pixel_values_videos": pixels,
            "video_grid_thw": out["video_grid_thw"],
            # float32, as the model's dtype, to which vLLM casts this field, cannot hold 2/3.
            "second_per_grid_ts": torch.tensor(
                [part.layout.seconds_per_grid for part in map(part_of, segments)],
                dtype=torch.float32,
            ),
        }


def _sets_size(hf_kwargs: Mapping[str, object]) -> bool:
    """Whether a request's ``mm_processor_kwargs`` set the size of frames."""
    scoped = hf_kwargs.get("videos_kwargs")
    given = hf_kwargs.keys() | (scoped.keys() if isinstance(scoped, Mapping) else set())
    return bool(given & {"size", "min_pixels", "max_pixels"})
