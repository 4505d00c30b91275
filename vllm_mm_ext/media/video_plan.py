"""What a video is turned into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.types import MediaInfo, SamplingSpec, SizeRule

# Chooses the indices of the frames wanted from what a probe found.
IndexChooser = Callable[[MediaInfo], Sequence[int]]


@dataclass(frozen=True)
class VideoPlan:
    """Everything but the source that decides what the model gets of a video.

    Attributes:
        sampling: Frames wanted; not used with a chooser.
        size: Output size rule.
        audio: Deliver the sound track along with the frames, if there is one.
        chooser_name: Tells two choosers apart in cache keys.
        chooser: Picks explicit indices after probing (stock vLLM's own choice).
        reduction: How the model's tokens are made fewer.
    """

    sampling: SamplingSpec
    size: SizeRule
    audio: bool = False
    chooser_name: str = ""
    chooser: IndexChooser | None = field(default=None, compare=False, repr=False)
    reduction: Reduction = NO_REDUCTION

    def key(self) -> str:
        """Text that differs whenever what the model gets could."""
        return f"{self.decode_key()}|{self.reduction.key()}"

    def decode_key(self) -> str:
        """Text that differs whenever the decoded pixels and samples could."""
        return f"{self.sampling}|{self.size}|audio={self.audio}|{self.chooser_name}"
