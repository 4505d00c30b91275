"""What the served model takes in of a live session, by its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_mm_ext.adapters.live.growing import Features, Samples, Sound
from vllm_mm_ext.adapters.processors.composer import ComposerMultiModalProcessor
from vllm_mm_ext.adapters.processors.model_traits import read_traits
from vllm_mm_ext.adapters.processors.patch_segments import PatchSegmentProcessor
from vllm_mm_ext.adapters.processors.sound_tracks import SoundTrackProcessor
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.prompt import Picture, Stretch
from vllm_mm_ext.live.wire_error import WireError
from vllm_mm_ext.media.audio.waveforms import HOP, MODEL_RATE
from vllm_mm_ext.video.segments import VideoShape


class UnsupportedModelError(Exception):
    """The served model takes nothing that live sessions have; the message says why."""


@dataclass(frozen=True)
class Family:
    """The served model's family.

    Attributes:
        traits: What sessions need to know.
        token_ids: The token that stands for a medium, by modality.
        reduction: The token reduction of stretches.
        new_sound: Makes the sound of a new stretch; None for a model that hears nothing.
        sound_tokens: Prompt tokens of so many samples without frames, but for the text around.
        least_samples: A unit with fewer samples goes on with silence.
        turn_end: Token by which the model ends a turn; None where the checkpoint declares none.
        processor: vLLM's multimodal processor of the model.
    """

    traits: FamilyTraits
    token_ids: Mapping[str, int]
    reduction: Reduction
    new_sound: Callable[[], Sound] | None
    sound_tokens: Callable[[int], int]
    least_samples: int
    turn_end: int | None
    processor: Any

    def tokens_of(self, stretch: Stretch) -> int:
        """Prompt tokens of a stretch, but for the text around its placeholder."""
        units = stretch.units
        heard = [len(unit.samples) for unit in units if len(unit.samples)]
        samples = sum(max(count, self.least_samples) for count in heard)
        frames = [frame for unit in units for frame in unit.frames]
        if not frames:
            return self.sound_tokens(samples)
        height, width = frames[0].pixels.shape[:2]
        shape = VideoShape(
            len(frames),
            height,
            width,
            times=tuple(frame.time_s for frame in frames),
            audio_samples=samples,
            reduction=self.reduction,
            unit_s=self.traits.unit_s,
        )
        total: int = self.processor.tokens_of(shape).total
        return total

    def tokens_of_picture(self, picture: Picture) -> int:
        """Prompt tokens of a picture, but for the text around its placeholder.

        Raises:
            WireError: The model does not take a picture of such a shape.
        """
        info = self.processor.info
        width, height = picture.image.size
        try:
            count: int = info.get_num_image_tokens(
                image_width=width,
                image_height=height,
                image_processor=info.get_image_processor(),
                mm_kwargs={},
            )
        except ValueError as error:
            raise WireError(
                f"The model does not take a picture of {width}x{height} pixels: {error}.",
                param="image_url",
            ) from None
        return count


def family_of(model_config: Any, processor: Any, settings: MMExtConfig) -> Family:
    """The family of the served model.

    Args:
        model_config: vLLM's.
        processor: vLLM's multimodal processor of the model, or None.
        settings: The server's.

    Raises:
        UnsupportedModelError: Live sessions do not work with it.
    """
    if not isinstance(processor, PatchSegmentProcessor | ComposerMultiModalProcessor):
        name = ", ".join(model_config.architectures)
        raise UnsupportedModelError(
            f"live sessions need a composer, Qwen2.5/3-Omni or Qwen2.5/3-VL; {name} is served"
        )
    if not processor.splits({}):
        raise UnsupportedModelError("live sessions do not work with --video-pruning-rate")
    limits = processor.info.ctx.get_mm_config().get_limit_per_prompt
    config = processor.info.get_hf_config()
    hears = processor.hears_video
    new_sound: Callable[[], Sound] | None = None
    sound_tokens: Callable[[int], int] = _no_tokens
    images, turn_end, least = False, None, 0
    token_ids = {"video": processor.video_token_id}
    if isinstance(processor, ComposerMultiModalProcessor):
        unit_s, patch, turn_end = config.audio_window_s, 1, config.turn_end_token_id
        if hears:
            new_sound, sound_tokens = _sound_of_composer(config)
            token_ids["audio"] = processor.sound_token_id
    else:
        patch = int(processor.info.get_hf_processor().video_processor.temporal_patch_size)
        unit_s = max(1.0, patch / settings.live.fps)
        images = bool(limits("image"))
        token_ids["image"] = int(config.image_token_id)
        if isinstance(processor, SoundTrackProcessor):
            unit_s = processor.unit_s
            if hears:
                window = processor.audio_window()
                least = HOP * window.mel_frames * window.least // window.tokens
                new_sound, sound_tokens = _sound_of_omni(processor, least)
                token_ids["audio"] = int(config.audio_token_id)
    if model_config.logprobs_mode != "raw_logprobs":
        turn_end = None
    traits = FamilyTraits(
        hears=hears,
        sees=bool(limits("video")),
        images=images,
        audio_rate=int(processor.sound_rate or MODEL_RATE),
        unit_s=unit_s,
        frame_multiple=patch,
        fps=settings.live.fps,
        size_rule=replace(
            read_traits(processor).size_rule,
            max_frame_pixels=settings.media.sampling.frame_pixels,
        ),
        turn_end=turn_end is not None,
    )
    return Family(
        traits=traits,
        token_ids=token_ids,
        reduction=processor.default_reduction,
        new_sound=new_sound,
        sound_tokens=sound_tokens,
        least_samples=least,
        turn_end=turn_end,
        processor=processor,
    )


def _no_tokens(samples: int) -> int:  # noqa: ARG001 - a family that hears nothing
    return 0


def _sound_of_composer(config: Any) -> tuple[Callable[[], Sound], Callable[[int], int]]:
    def tokens(samples: int) -> int:
        windows: list[int] = config.audio_tokens(samples)
        return sum(windows) + 2 * len(windows)

    return lambda: Samples(MODEL_RATE), tokens


def _sound_of_omni(
    processor: SoundTrackProcessor, least: int
) -> tuple[Callable[[], Sound], Callable[[int], int]]:
    def tokens(samples: int) -> int:
        return processor.audio_tokens(-(-samples // HOP))

    return lambda: Features(processor.sound_rate, processor.track_features, least), tokens
