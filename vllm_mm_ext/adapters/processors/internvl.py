"""InternVL in transformers' layout: segments of whole frames; each frame's number is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.interns1 import InternS1MultiModalProcessor as _StockProcessor
from vllm.model_executor.models.interns1 import InternS1ProcessingInfo as _StockInfo
from vllm.multimodal.processing import PromptUpdateDetails, cached_encode

from vllm_mm_ext.adapters.processors.per_frame import PerFrameInfo, PerFrameProcessor
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.video.segments import Segment, VideoLayout, VideoSegment


class InternVLProcessingInfo(PerFrameInfo, _StockInfo):  # type: ignore[misc]
    """vLLM's processing info, with video items no larger than a segment."""

    def frame_tokens(self) -> tuple[int, int]:
        """A square, as a frame is a single square tile."""
        return (math.isqrt(self.get_hf_processor().image_seq_length),) * 2


class InternVLMultiModalProcessor(PerFrameProcessor, _StockProcessor):  # type: ignore[misc]
    """vLLM's processor, which takes segments instead of videos."""

    numbered = True

    @property
    def video_token_id(self) -> int:
        """Id of ``<video>``."""
        token = self.info.get_hf_processor().video_token
        return int(self.info.get_tokenizer().get_vocab()[token])

    def before_frames(self, frames: Iterable[int]) -> Iterator[list[int]]:
        """Tokens between the visual tokens of each frame and those of the frame before it.

        Args:
            frames: Indices of the frames in the video, from 0.

        Yields:
            Tokens as transformers' processor writes them: the end of the frame before, the frame's
            number counted from 1, the start of the frame.
        """
        names, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        for frame in frames:
            text = f"Frame{frame + 1}: {names.start_image_token}"
            if frame:
                # Tokenized together, as the tokens of a text may depend on the text before it.
                text = f"{names.end_image_token}\n{text}"
            yield list(cached_encode(tokenizer, text, add_special_tokens=False))

    def placeholder(self, part: Segment) -> PromptUpdateDetails:
        """Tokens of a segment's frames; merged frames have the number of the first of them."""
        video, end = self.video_token_id, int(self.info.get_hf_processor().end_image_token_id)
        first, past = part.grids
        tokens: list[int] = []
        numbered = self.before_frames(range(first, past, part.reduction.temporal))
        for left, before in zip(part.left, numbered, strict=True):
            # Each segment has the end token of its last frame, so the next one leaves it out.
            tokens += before[1:] if part.continues and not tokens else before
            tokens += [video] * left
        return PromptUpdateDetails.select_token_id([*tokens, end], video)

    def text_tokens(self, layout: VideoLayout, grids: tuple[int, int], reduction: Reduction) -> int:
        """Tokens of the written numbers, and of the starts and ends of the segment's frames."""
        first, past = grids
        numbered = self.before_frames(range(first, past, reduction.temporal))
        return sum(map(len, numbered)) + (first == 0)

    def encode_inputs(
        self, segments: Sequence[VideoSegment], hf_kwargs: Mapping[str, object]
    ) -> dict[str, Any]:
        """Pixels of the frames of all segments, and the number of frames of each segment."""
        pixels = self.frame_pixels(segments, hf_kwargs)
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_num_patches": torch.tensor([len(frames) for frames in pixels]),
            "video_token_id": torch.tensor(self.video_token_id),
        }
