"""The composer's multimodal processor for vLLM.

A video becomes segments. A segment is one mm item: groups of frames and the windows of sound
between them, in the order of the prompt, as `composer/layout.py` lays a whole video out. Sound
without a video becomes one mm item per window of the audio encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import (
    AudioProcessorItems,
    MultiModalDataItems,
    VideoProcessorItems,
)
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    PromptReplacement,
    PromptUpdateDetails,
)

from vllm_mm_ext.adapters.processors.composer_info import (
    ComposerProcessingInfo,
    default_reduction_of,
)
from vllm_mm_ext.adapters.processors.fields import KINDS, token_kinds
from vllm_mm_ext.adapters.processors.segment_info import prunes_videos
from vllm_mm_ext.adapters.processors.segment_items import part_of
from vllm_mm_ext.adapters.processors.segment_processor import SegmentProcessor
from vllm_mm_ext.adapters.processors.sound_tracks import DigestAudioItems
from vllm_mm_ext.composer.configuration import SAMPLE_RATE, SPECIAL_TOKENS, ComposerConfig
from vllm_mm_ext.composer.features import pixel_values
from vllm_mm_ext.composer.layout import (
    audio_layout,
    group_starts,
    interleaved,
    run_tokens,
)
from vllm_mm_ext.composer.sound import AUDIO_FIELDS, SoundPiece, fields_of
from vllm_mm_ext.config.options import Reduction, TrainedReductions
from vllm_mm_ext.errors import MediaError, UnheldMediaError
from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.video.cuts import unit_ends
from vllm_mm_ext.video.segments import (
    Segment,
    Sound,
    VideoLayout,
    VideoSegment,
    VideoShape,
)
from vllm_mm_ext.video.token_counts import TokenCount

# Positions of frames are whole microseconds, which are finer than frame times and can be hashed
# exactly.
MICROSECONDS = 1_000_000
# Sounds with a ``uuid`` whose windows are remembered, for requests that send the ``uuid`` alone.
_MAX_NAMES = 4096


class _WithoutSegments(BaseMultiModalProcessor[ComposerProcessingInfo]):  # type: ignore[misc]
    """The processor of sound, and the model's input fields of both modalities."""

    @property
    def config(self) -> ComposerConfig:
        """Configuration of the checkpoint."""
        config: ComposerConfig = self.info.get_hf_config()
        return config

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        audios = mm_items.get("audio")
        pieces = list(audios.data) if audios else []
        if not pieces:
            return BatchFeature({})
        return BatchFeature(
            fields_of(self.config, "audio", pieces, self.info.ctx.model_config.dtype)
        )

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        of = MultiModalFieldConfig.batched
        sound = {
            f"{modality}_{key}": of(modality, keep_on_cpu=key != "mel")
            for modality in ("video", "audio")
            for key in AUDIO_FIELDS
        }
        return {"pixel_values_videos": of("video"), KINDS: of("video", keep_on_cpu=True), **sound}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        audios = mm_items.get("audio")
        if not audios:
            return []
        pad = self.config.audio_pad_token_id

        def window(index: int) -> PromptUpdateDetails:
            tokens = audio_layout(self.config, len(audios.data[index]))
            return PromptUpdateDetails.select_token_id(tokens, embed_token_id=pad)

        return [PromptReplacement(modality="audio", target=[pad], replacement=window)]


class ComposerMultiModalProcessor(SegmentProcessor, _WithoutSegments):
    """The composer's processor: videos in segments, sound in windows.

    Raises:
        ValueError: The checkpoint does not support the server's default reduction, or vLLM is told
            to prune videos (``--video-pruning-rate``).
    """

    joins_sound = True

    def __init__(self, info: ComposerProcessingInfo, *args: Any, **kwargs: Any) -> None:
        config = info.get_hf_config()
        self.trained = TrainedReductions(config.pairs)
        self.checkpoint_reduction = default_reduction_of(config)
        super().__init__(info, *args, **kwargs)
        self._named_sounds: LRUCache[str, list[str]] = LRUCache(_MAX_NAMES)
        if not self.trained.allow(self.default_reduction):
            raise ValueError(
                f"compression.reduction = {self.default_reduction.key()!r}: the checkpoint was "
                f"trained for {self.trained}"
            )
        if prunes_videos(info.ctx):
            raise ValueError("a composer has no --video-pruning-rate; see compression.reduction")

    # --- layout -----------------------------------------------------------------------------------

    @property
    def video_token_id(self) -> int:
        """Id of ``<|video_pad|>``."""
        return self.config.video_pad_token_id

    @property
    def sound_token_id(self) -> int:
        """Id of ``<|audio_pad|>``, which stands for sound, inside a video item too."""
        return self.config.audio_pad_token_id

    @property
    def sound_rate(self) -> int | None:
        """16 kHz; None if the checkpoint has no audio tower."""
        return None if self.config.audio_config is None else SAMPLE_RATE

    def splits(self, hf_kwargs: Mapping[str, object]) -> bool:
        """True: vLLM has no processor of its own for a composer, so every video is split."""
        return True

    def _samples(self, metadata: Any, hf_kwargs: Mapping[str, object]) -> bool:
        """False: the model is shown all frames that it is given."""
        return False

    def layout(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> VideoLayout:
        """One grid per frame, whose position is the frame's time in microseconds.

        Raises:
            MediaError: The checkpoint does not support the reduction.
            ValueError: The sound is not at the model's rate.
        """
        config, reduction = self.config, shape.reduction
        if not self.trained.allow(reduction):
            raise MediaError(
                f"reduction {reduction.key()}: the served model was trained for {self.trained}",
                parameter="mm_ext.reduction",
                value=reduction.key(),
            )
        micro = np.rint(_seconds(shape, config.fps) * MICROSECONDS).astype(np.int64)
        seconds = tuple((micro / MICROSECONDS).tolist())
        side = int(config.vision_config.image_size)
        sound = None
        if shape.audio_samples and self.hears_video:
            audio = config.audio_tokens(shape.audio_samples)
            ends = self._unit_ends(shape, seconds, audio)
            borders = [shape.frames] if ends is None else [frames for frames, _ in ends]
            groups = _groups(borders, reduction)
            runs = interleaved(
                [seconds[begin] for begin, _ in groups],
                [(end - begin) * config.side**2 for begin, end in groups],
                audio,
                config.audio_window_s,
            )
            sound = Sound(tuple(runs), unit=0)
        else:
            ends = self._unit_ends(shape, seconds, [])
        return VideoLayout(
            size=(side, side),
            grids=shape.frames,
            height=config.side,
            width=config.side,
            temporal_patch=1,
            positions=micro,
            timestamps=seconds if config.timestamps else None,
            sound=sound,
            ends=ends,
        )

    def _unit_ends(
        self, shape: VideoShape, seconds: Sequence[float], audio: Sequence[int]
    ) -> tuple[tuple[int, int], ...] | None:
        """Frames and audio tokens at the end of each unit of a growing video; None of another."""
        if shape.unit_s is None:
            return None
        per_unit = sum(self.config.audio_tokens(round(shape.unit_s * SAMPLE_RATE))) if audio else 0
        ends = unit_ends(seconds, shape.unit_s, audio=sum(audio), audio_per_unit=per_unit)
        return tuple(ends)

    def around(self, layout: VideoLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of ``<video>`` and ``</video>``."""
        return (self.config.video_start_token_id,), (self.config.video_end_token_id,)

    def segment_tokens_of(self, part: Segment) -> list[int]:
        """Prompt tokens of a segment."""
        runs = part.runs if part.layout.sound else [(left, 0) for left in part.left]
        assert part.positions is not None
        starts = group_starts((part.positions / MICROSECONDS).tolist(), part.reduction.temporal)
        times = self.info.get_hf_processor().timestamp_tokens
        return run_tokens(self.config, runs, starts, times)

    def placeholder(self, part: Segment) -> PromptUpdateDetails:
        """Tokens of a segment; the frames and windows have embeddings, the markers have none."""
        embedded = [self.config.video_pad_token_id, self.config.audio_pad_token_id]
        return PromptUpdateDetails.select_token_ids(self.segment_tokens_of(part), embedded)

    def tokens_of(self, shape: VideoShape) -> TokenCount:
        """Prompt tokens that a video becomes; see `SegmentProcessor.tokens_of`."""
        count = super().tokens_of(shape)
        windows = len(self.config.audio_tokens(shape.audio_samples)) if count.audio else 0
        return count._replace(text=count.text + 2 * windows)

    def text_tokens(self, layout: VideoLayout, grids: tuple[int, int], reduction: Reduction) -> int:
        """Tokens of ``<frame>`` and of the written time, if there is one, before each group."""
        unit = reduction.temporal
        text = -(-(grids[1] - grids[0]) // unit)
        if layout.timestamps is not None:
            written = self.info.get_hf_processor().timestamp_tokens
            starts = group_starts(layout.timestamps[slice(*grids)], unit)
            text += sum(len(written(start)) for start in starts)
        return text

    # --- inputs of the model ----------------------------------------------------------------------

    def track_piece(self, frames: SampledFrames, part: Segment) -> Waveform | None:
        """A segment's windows of sound."""
        if part.layout.sound is None or part.audio[0] == part.audio[1]:
            return None
        assert frames.audio is not None
        per_window = self.config.audio_tokens(self.config.window_samples)[0]
        windows = range(part.audio[0] // per_window, -(-part.audio[1] // per_window))
        return SoundPiece.cut(frames.audio, windows, self.config)

    def encode_inputs(
        self, segments: Sequence[VideoSegment], hf_kwargs: Mapping[str, object]
    ) -> dict[str, Any]:
        """Pixels, windows of sound, and the kind of each token of the placeholder."""
        dtype, config = self.info.ctx.model_config.dtype, self.config
        side = int(config.vision_config.image_size)
        # vLLM joins the frames of segments, so those of a segment of sound alone, which are none,
        # must have the same size.
        none = np.empty((0, side, side, 3), np.uint8)
        frames = [
            self.at_size(np.asarray(one), (side, side)) if len(one) else none for one in segments
        ]
        tokens = [self.segment_tokens_of(part_of(one)) for one in segments]
        return {
            "pixel_values_videos": [pixel_values(own).to(dtype) for own in frames],
            KINDS: [
                token_kinds(ids, config.video_pad_token_id, config.audio_pad_token_id)
                for ids in tokens
            ],
            **fields_of(config, "video", [one.audio for one in segments], dtype),
        }

    # --- vLLM's processor -------------------------------------------------------------------------

    def split(self, inputs: Any) -> Any:
        """Split videos into segments and sounds into windows.

        Args:
            inputs: vLLM's ``ProcessorInputs`` of a request.

        Raises:
            MediaError: The request has embeddings, or a video that is not uint8 frames, or fewer
                placeholders in its prompt than media, or media by a ``uuid`` that is not known.
        """
        items = inputs.mm_data_items
        kinds = {"video": VideoProcessorItems, "audio": AudioProcessorItems}
        for modality, own in items.items():
            if not isinstance(own, kinds[modality]):
                raise MediaError(f"{modality}: a composer takes no embeddings")
        inputs = super().split(inputs)
        videos = inputs.mm_data_items.get("video")
        if videos and type(videos) is VideoProcessorItems:
            names = (inputs.mm_uuid_items or {}).get("video") or [None] * len(videos)
            if any(
                v is None and n not in self._named for v, n in zip(videos.data, names, strict=True)
            ):
                raise UnheldMediaError.of(["video"])
            raise MediaError(
                "a composer takes videos as uint8 frames [n, height, width, 3], one placeholder "
                f"{SPECIAL_TOKENS['video_pad_token_id']} for each"
            )
        audios = inputs.mm_data_items.get("audio")
        return inputs if audios is None else self._split_sounds(inputs, list(audios.data))

    def _split_sounds(self, inputs: Any, sounds: list[Any]) -> Any:
        names = (inputs.mm_uuid_items or {}).get("audio") or [None] * len(sounds)
        pieces = [self._windows(*pair) for pair in zip(sounds, names, strict=True)]
        pad, prompt = self.config.audio_pad_token_id, []
        counts = iter([len(own) for own, _ in pieces])
        for token in inputs.prompt:
            prompt += [token] * (next(counts, 1) if token == pad else 1)
        if next(counts, None) is not None:
            raise MediaError(
                f"{len(pieces)} sounds, but fewer placeholders "
                f"{SPECIAL_TOKENS['audio_pad_token_id']} in the prompt"
            )
        items = MultiModalDataItems(dict(inputs.mm_data_items))
        items["audio"] = DigestAudioItems([window for own, _ in pieces for window in own])
        uuids = {k: v for k, v in (inputs.mm_uuid_items or {}).items() if k != "audio"}
        if any(name is not None for name in names):
            uuids["audio"] = [name for _, own in pieces for name in own]
        return dataclasses.replace(
            inputs, prompt=prompt, mm_data_items=items, mm_uuid_items=uuids or None
        )

    def _windows(
        self, samples: npt.NDArray[np.float32] | None, name: str | None
    ) -> tuple[list[SoundPiece | None], list[str | None]]:
        """Split a sound into windows.

        Args:
            samples: The sound; None if the client sent its ``uuid`` alone.
            name: The sound's ``uuid``; None if it has none.

        Returns:
            The windows (each None if ``samples`` is None) and a ``uuid`` for each of them.

        Raises:
            MediaError: The sound is empty, or no sound with this ``uuid`` is remembered.
        """
        if samples is None:
            known = self._named_sounds.get(name or "")
            if known is None:
                raise UnheldMediaError.of(["audio"])
            return [None] * len(known), list(known)
        count = len(self.config.audio_tokens(len(samples)))
        if not count:
            raise MediaError("the sound is empty", parameter="input_audio")
        windows = [
            SoundPiece.cut(samples, range(number, number + 1), self.config)
            for number in range(count)
        ]
        if name is None:
            return [*windows], [None] * count
        named = [f"{name}#{window.digest}" for window in windows]
        self._named_sounds[name] = named
        return [*windows], [*named]


def _groups(ends: Sequence[int], reduction: Reduction) -> list[tuple[int, int]]:
    """First frame of each group that a reduction merges, and the frame after its last.

    Args:
        ends: Frames up to each place that no group goes beyond, ascending; the last: all frames.
        reduction: The token reduction.
    """
    return [
        (at, min(at + reduction.temporal, end))
        for begin, end in pairwise([0, *ends])
        for at in range(begin, end, reduction.temporal)
    ]


def _seconds(shape: VideoShape, fps: float) -> npt.NDArray[np.float64]:
    """Time of each frame in seconds.

    Used are the frames' own times, else those of vLLM's metadata, else ``fps`` frames per second.
    """
    if shape.times is not None:
        return np.asarray(shape.times, np.float64)
    said = shape.metadata or {}
    indices, rate = said.get("frames_indices"), said.get("fps")
    if rate and indices is not None and len(indices) == shape.frames:
        return np.asarray(indices, np.float64) / float(rate)
    return np.arange(shape.frames) / fps
