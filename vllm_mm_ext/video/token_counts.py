"""How many prompt tokens a video becomes."""

from __future__ import annotations

from typing import NamedTuple


def omni_audio_tokens(mel_frames: int) -> int:
    """Tokens that Qwen2.5-Omni makes of log-mel frames, of which there are 100 a second.

    A convolution and a pool halve their number one after the other (transformers,
    ``Qwen2_5OmniAudioEncoder._get_feat_extract_output_lengths``).
    """
    return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


class TokenCount(NamedTuple):
    """Prompt tokens of one video.

    Attributes:
        visual: Placeholders that take an encoder output of the video.
        audio: Placeholders that take an encoder output of its sound.
        text: Tokens around and between those (markers, timestamps).
    """

    visual: int
    audio: int
    text: int

    @property
    def total(self) -> int:
        """All tokens the video adds to the prompt."""
        return self.visual + self.audio + self.text
