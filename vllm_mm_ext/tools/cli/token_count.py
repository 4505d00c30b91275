"""Tokens a clip costs in the model families the tools know by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.types import SizeRule, VideoStream
from vllm_mm_ext.video.token_counts import omni_audio_tokens


class FamilyName(StrEnum):
    """Families the tools know, by the names used on the command line."""

    qwen25_omni = "qwen2.5-omni"
    qwen25_vl = "qwen2.5-vl"
    qwen3_vl = "qwen3-vl"
    llava_onevision = "llava-onevision"
    composer_tiny = "composer-tiny"


@dataclass(frozen=True)
class Family:
    """Token arithmetic of one model family.

    Attributes:
        name: Which family.
        rule: Size its processor gives frames.
        rule_text: The same in words.
        visual: ``(frames, height, width)`` at the target size to visual tokens.
        audio: Seconds of sound to audio tokens, or None if the family does not hear.
    """

    name: FamilyName
    rule: SizeRule
    rule_text: str
    visual: Callable[[int, int, int], int]
    audio: Callable[[float], int] | None = None


@dataclass(frozen=True)
class TokenCount:
    """Tokens of one selection: visual, audio, and the frame size they follow from."""

    visual: int
    audio: int
    height: int
    width: int


def count_tokens(
    family: Family, video: VideoStream | None, num_frames: int, audio_s: float
) -> TokenCount:
    """Tokens of ``num_frames`` frames of ``video`` and ``audio_s`` seconds of sound.

    Text between the items (prompt, separators, written timestamps) is not counted.

    Raises:
        MediaError: The family refuses the aspect ratio.
    """
    height = width = visual = 0
    if video is not None and num_frames:
        height, width = target_size(
            family.rule, width=video.width, height=video.height, num_frames=num_frames
        )
        visual = family.visual(num_frames, height, width)
    audio = family.audio(audio_s) if family.audio is not None and audio_s > 0 else 0
    return TokenCount(visual, audio, height, width)


def _merged_patches(factor: int) -> Callable[[int, int, int], int]:
    """Qwen: one token per ``factor`` x ``factor`` pixels of each pair of frames."""

    def tokens(frames: int, height: int, width: int) -> int:
        return math.ceil(frames / 2) * (height // factor) * (width // factor)

    return tokens


def _omni_audio(seconds: float) -> int:
    return omni_audio_tokens(math.ceil(seconds * 100))


# Sizes: defaults of the Qwen2VLVideoProcessor and LlavaOnevisionVideoProcessor classes in
# transformers; for Qwen3-VL those of the released checkpoints.
_QWEN_25 = SizeRule(
    kind="qwen_vl", factor=28, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28, temporal_factor=2
)
_QWEN_25_TEXT = "sides in multiples of 28, 128 to 768 tokens a frame pair"

FAMILIES: dict[FamilyName, Family] = {
    family.name: family
    for family in (
        Family(FamilyName.qwen25_omni, _QWEN_25, _QWEN_25_TEXT, _merged_patches(28), _omni_audio),
        Family(FamilyName.qwen25_vl, _QWEN_25, _QWEN_25_TEXT, _merged_patches(28)),
        Family(
            FamilyName.qwen3_vl,
            SizeRule(
                kind="qwen3_vl",
                factor=32,
                min_pixels=4096,
                max_pixels=24576 * 32 * 32,
                temporal_factor=2,
            ),
            "sides in multiples of 32, at most 24,576 x 32 x 32 pixels over all frames",
            _merged_patches(32),
        ),
        Family(
            FamilyName.llava_onevision,
            SizeRule(kind="fixed", height=384, width=384),
            "384 x 384, 27 x 27 patches pooled to 14 x 14 a frame",
            # One newline embedding closes the video.
            lambda frames, height, width: (
                frames * math.ceil(height // 14 / 2) * math.ceil(width // 14 / 2) + 1
            ),
        ),
        Family(
            FamilyName.composer_tiny,
            SizeRule(kind="fixed", height=64, width=64),
            "64 x 64, 16 patches a frame, no reduction",
            lambda frames, height, width: frames * (height // 16) * (width // 16),
            # Whole encoder frames of 20 ms, 20 of them a token.
            lambda seconds: math.ceil(math.ceil(seconds * 50) / 20),
        ),
    )
}
