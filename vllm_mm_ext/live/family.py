"""What the served model family can take in of a live session."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mm_ext.media.types import SizeRule

#: Seconds after which a stretch ends at the next border of a unit, so that old ones can be dropped.
MAX_STRETCH_S = 60.0


@dataclass(frozen=True, slots=True)
class FamilyTraits:
    """What a model takes in, and in which units.

    Attributes:
        hears: The model takes sound.
        sees: The model takes frames of video.
        images: The model takes pictures in messages (``input_image``).
        audio_rate: Sampling rate in Hz of the sound that the model takes.
        unit_s: Seconds of a unit: what the model can take in without knowing what follows.
        frame_multiple: The frames of a unit are a multiple of this (frames of a temporal patch).
        fps: Frames per second that the model is shown at most.
        size_rule: Gives the size at which the model's processor takes frames.
        turn_end: The model can tell that a turn has ended (``semantic_vad``).
    """

    hears: bool
    sees: bool
    images: bool
    audio_rate: int
    unit_s: float
    frame_multiple: int
    fps: float
    size_rule: SizeRule
    turn_end: bool

    @property
    def unit_samples(self) -> int:
        """Samples of a whole unit at the model's rate."""
        return round(self.unit_s * self.audio_rate)

    @property
    def frame_slots(self) -> int:
        """How many frames a unit can have; slots of equal length, with one frame each."""
        return max(1, int(self.unit_s * self.fps + 1e-6))

    @property
    def unit_frames(self) -> int:
        """Most frames of a unit: one for each slot, made a multiple of ``frame_multiple``."""
        return -(-self.frame_slots // self.frame_multiple) * self.frame_multiple
