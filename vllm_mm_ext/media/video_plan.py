"""What a video is turned into, and the plans a request made for its videos before decoding any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.types import MediaInfo, SamplingSpec, SizeRule

# Chooses frame indices from a probe; its name tells two choosers apart in cache keys.
IndexChooser = Callable[[MediaInfo], Sequence[int]]


@dataclass(frozen=True)
class VideoPlan:
    """Everything but the source that decides what the model gets of a video.

    Attributes:
        sampling: Frames wanted; not used with a chooser.
        size: Output size rule.
        audio: Deliver the sound track along with the frames, if there is one.
        chooser_name: Identity of ``chooser``, part of the content key.
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


_plans: ContextVar[Mapping[str, VideoPlan]] = ContextVar("mm_ext_plans")
_refs: ContextVar[Mapping[str, MediaRef]] = ContextVar("mm_ext_refs")


def set_plans(plans: Mapping[str, VideoPlan], refs: Mapping[str, MediaRef] | None = None) -> None:
    """Plan the videos of the request whose context this is called in; replaces earlier plans.

    Args:
        plans: Plan by URL, as the request spells it.
        refs: Media that planning resolved, by URL: what was planned is what will be decoded, and
            it is not fetched or revalidated once more. Its bytes are let go when it has been
            delivered; the context may live as long as the answer.
    """
    _plans.set(plans)
    _refs.set(refs or {})


def planned(url: str) -> VideoPlan | None:
    """The current request's plan for ``url``, or None."""
    return _plans.get({}).get(url)


def resolved(url: str) -> MediaRef | None:
    """The media that planning resolved for ``url``, or None."""
    return _refs.get({}).get(url)
