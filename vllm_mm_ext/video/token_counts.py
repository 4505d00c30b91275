"""How many prompt tokens a video becomes."""

from __future__ import annotations

from typing import NamedTuple


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
