"""The plan of a video: which frames, at which size, with which token reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.types import MediaInfo, SamplingSpec, SizeRule

# Returns the indices of the wanted frames, given what the container says about the file.
IndexChooser = Callable[[MediaInfo], Sequence[int]]


@dataclass(frozen=True)
class VideoPlan:
    """Everything, apart from the source, that decides what the model gets of a video.

    Attributes:
        sampling: Frames wanted; not used with a chooser.
        size: Rule for the size of the frames.
        audio: Deliver the sound track along with the frames, if the video has one.
        chooser_name: Name of the chooser; different choosers have different names.
        chooser: Returns explicit frame indices after the probe, where stock vLLM's rule chooses
            the frames; None otherwise.
        reduction: How the number of the model's tokens is reduced.
        audio_stream: Number of the audio stream, from 0; None for the one that a player plays.
    """

    sampling: SamplingSpec
    size: SizeRule
    audio: bool = False
    chooser_name: str = ""
    chooser: IndexChooser | None = field(default=None, compare=False, repr=False)
    reduction: Reduction = NO_REDUCTION
    audio_stream: int | None = None

    @property
    def recordable(self) -> bool:
        """Whether what comes of the plan follows from the file and the plan alone."""
        return self.chooser is None and self.sampling.span is None

    def key(self) -> str:
        """Cache key of the model's input: plans with equal keys give the model the same."""
        return f"{self.decode_key()}|{self.reduction.key()}"

    def decode_key(self) -> str:
        """Cache key of the decode: plans with equal keys decode the same pixels and samples."""
        sound = self.audio_stream if self.audio else None
        return f"{self.sampling}|{self.size}|audio={self.audio},{sound}|{self.chooser_name}"
