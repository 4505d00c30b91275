"""What the served model wants from the front-end.

Plain values; ``adapters/processors/model_traits.py`` reads them off the model's processor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_mm_ext.config.options import Reduction, TrainedReductions
from vllm_mm_ext.media.types import SizeRule


@dataclass(frozen=True)
class ModelTraits:
    """What the front-end needs to know about the model.

    Attributes:
        size_rule: Rule for the size at which the model's processor takes frames.
        frame_multiple: Frame counts are rounded down to a multiple of this, the frames of a
            temporal patch.
        audio_rate: Sampling rate in Hz that the model takes; None keeps a stream's own rate.
        hears_video: The model's processor takes the sound of a video along with its frames.
        cuts_videos: The processor cuts videos into segments; only tokens of segments are reduced.
        sound_token: Id of the token that stands in the prompt for sound inside a video item; None
            where sound has mm items of its own.
        default_reduction: The reduction that the checkpoint declares for requests that name none;
            None if it declares none.
        trained: The reductions that the checkpoint was trained for; None where any can be used.
        reads_files: The model's processor decodes the file of a video by itself, so videos are left
            to vLLM's loaders, which hand it on.
    """

    size_rule: SizeRule = field(default_factory=SizeRule)
    frame_multiple: int = 1
    audio_rate: int | None = 16_000
    hears_video: bool = False
    cuts_videos: bool = False
    sound_token: int | None = None
    default_reduction: Reduction | None = None
    trained: TrainedReductions | None = None
    reads_files: bool = False
