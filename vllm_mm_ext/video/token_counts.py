"""How many prompt tokens a video becomes."""

from __future__ import annotations

from typing import NamedTuple


def omni_audio_tokens(mel_frames: int) -> int:
    """Audio tokens that Qwen2.5-Omni makes of log-mel frames.

    A convolution and a pooling layer each halve the number (transformers,
    ``Qwen2_5OmniAudioEncoder._get_feat_extract_output_lengths``).

    Args:
        mel_frames: Number of log-mel frames; there are 100 per second.
    """
    return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


class TokenCount(NamedTuple):
    """Prompt tokens of one video.

    Attributes:
        visual: Tokens whose embeddings are encoder outputs of the frames.
        audio: Tokens whose embeddings are encoder outputs of the sound.
        text: Tokens around and between those (markers, written times).
        largest: Most visual and audio tokens of one mm item.
    """

    visual: int
    audio: int
    text: int
    largest: int

    @property
    def total(self) -> int:
        """All tokens that the video adds to the prompt."""
        return self.visual + self.audio + self.text
