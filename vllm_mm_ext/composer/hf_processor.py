"""The composer's processor for transformers: text, videos and sound to the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import PILImageResampling
from transformers.video_processing_utils import BaseVideoProcessor

from vllm_mm_ext.composer.configuration import (
    SAMPLE_RATE,
    ComposerConfig,
    register_config,
)
from vllm_mm_ext.composer.features import mel_windows, pixel_values
from vllm_mm_ext.composer.layout import audio_layout, video_layout
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.video.resize import resized

# Parts of a hub reference, which configuration and tokenizer are loaded from as well.
_HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only", "subfolder")


class ComposerVideoProcessor(BaseVideoProcessor):  # type: ignore[misc]
    """Frames at the vision tower's size, normalised as SigLIP's: from -1 to 1."""

    resample = PILImageResampling.BICUBIC
    do_resize = True
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]


class ComposerProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenizer, frames and log-mel features of a composer checkpoint.

    All it needs to know stands in the checkpoint's ``config.json``.

    Args:
        tokenizer: Of the checkpoint.
        chat_template: Jinja chat template; None for the tokenizer's own.

    Attributes:
        config: Of the checkpoint; set by ``from_pretrained`` or ``with_config``.
        video_processor: Resizes frames.
    """

    config: ComposerConfig
    video_processor: ComposerVideoProcessor

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def with_config(cls, tokenizer: Any, config: ComposerConfig) -> Self:
        """A processor for a checkpoint that is not on disk."""
        self = cls(tokenizer)
        side = int(config.vision_config.image_size)
        self.config = config
        self.video_processor = ComposerVideoProcessor(size={"height": side, "width": side})
        return self

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, tokenizer: Any = None, **kwargs: Any
    ) -> Self:
        """Load a checkpoint's processor.

        Args:
            pretrained_model_name_or_path: Directory or hub name.
            tokenizer: In place of the checkpoint's own.
            **kwargs: Where on the hub to look; anything else is ignored.
        """
        hub = {key: value for key, value in kwargs.items() if key in _HUB_KWARGS}
        config = ComposerConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
        return cls.with_config(tokenizer, config)

    def timestamp_tokens(self, second: float) -> list[int]:
        """Text tokens of a time, as they stand before a group of frames."""
        ids: list[int] = self.tokenizer.encode(f"{second:.1f}s", add_special_tokens=False)
        return ids

    def frames(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """RGB frames ``[n, height, width, 3]`` resized to the vision tower's size."""
        side = int(self.config.vision_config.image_size)
        if frames.shape[1:3] == (side, side):
            return frames
        return resized(self.video_processor, frames, (side, side))

    def __call__(
        self,
        text: str,
        videos: Sequence[npt.NDArray[np.uint8]] = (),
        audio: Sequence[npt.NDArray[np.float32]] = (),
        *,
        seconds: Sequence[Sequence[float] | None] | None = None,
        sounds: Sequence[npt.NDArray[np.float32] | None] | None = None,
        reduction: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of one prompt.

        Args:
            text: The prompt, with ``<|video_pad|>`` for each video and ``<|audio_pad|>`` for each
                sound by itself, in order.
            videos: RGB frames ``[n, height, width, 3]`` of each.
            audio: Mono samples at 16 kHz of each sound by itself.
            seconds: Times of the frames of each video; None: one every 1 / ``config.fps``.
            sounds: Mono samples at 16 kHz of the sound of each video; None: it is silent.
            reduction: ``pool`` and ``temporal`` for all videos; None: the checkpoint's default.
            **kwargs: Taken for the sake of the interface; none is used.

        Returns:
            ``input_ids`` int64 ``[1, tokens]``; ``pixel_values`` float32 ``[frames, 3, side,
            side]`` of all videos, ``seconds`` float64 ``[frames]`` and ``frames_per_item`` with
            ``reduction``; ``features`` of all windows in the order of the prompt, their
            ``start_seconds`` and ``lengths`` (true encoder frames). Parts without media are left
            out.

        Raises:
            ValueError: The prompt has other media than those given, or the checkpoint does not
                support the reduction.
        """
        del kwargs
        config = self.config
        chosen = dict(reduction or config.default_reduction or {})
        times = [
            np.arange(len(video)) / config.fps if given is None else np.asarray(given)
            for video, given in zip(videos, seconds or [None] * len(videos), strict=True)
        ]
        tracks = list(sounds or [None] * len(videos))
        layouts = {
            config.video_pad_token_id: [
                video_layout(
                    config,
                    at.tolist(),
                    pool=chosen["pool"],
                    temporal=chosen["temporal"],
                    audio_samples=0 if track is None else len(track),
                    timestamp_tokens=self.timestamp_tokens,
                )
                for at, track in zip(times, tracks, strict=True)
            ],
            config.audio_pad_token_id: [audio_layout(config, len(samples)) for samples in audio],
        }
        heard: dict[int, list[Any]] = {
            config.video_pad_token_id: tracks,
            config.audio_pad_token_id: list(audio),
        }
        ids: list[int] = []
        windows: list[npt.NDArray[np.float32]] = []
        for token in self.tokenizer.encode(text):
            if not layouts.get(token):
                ids.append(token)
                continue
            ids += layouts[token].pop(0)
            samples = heard[token].pop(0)
            windows += [] if samples is None else [samples]
        if any(layouts.values()):
            raise MediaError("the prompt has fewer placeholders than there are videos and sounds")
        made: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if videos:
            made["pixel_values"] = torch.cat([pixel_values(self.frames(v)) for v in videos])
            made["seconds"] = torch.from_numpy(np.concatenate(times))
            made["frames_per_item"] = [len(video) for video in videos]
            made["reduction"] = chosen
        if windows:
            made["features"] = [mel for samples in windows for mel in mel_windows(config, samples)]
            lengths = [config.audio_states(len(samples)) for samples in windows]
            made["lengths"] = [states for own in lengths for states in own]
            made["start_seconds"] = [
                index * config.audio_window_s for own in lengths for index in range(len(own))
            ]
        return BatchFeature(made)

    @property
    def sampling_rate(self) -> int:
        """Samples per second of all sound."""
        return SAMPLE_RATE


# Whoever imports this module has transformers' Auto classes know the composer. The plugin registers
# the configuration alone at start-up: this import takes seconds, which other models need not wait.
register_config()
AutoProcessor.register(ComposerConfig, ComposerProcessor, exist_ok=True)
