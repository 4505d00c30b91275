"""Makes vLLM's processors take a video's segments instead of the video.

A video is split inside ``apply``, after vLLM has checked the client's number of videos against
``--limit-mm-per-prompt``. From there on every segment is an ordinary mm item, which vLLM hashes,
caches, schedules and encodes on its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.processors import fields
from vllm_mm_ext.adapters.processors.large_requests import LargeRequestCache, is_large
from vllm_mm_ext.adapters.processors.model_traits import video_kwargs
from vllm_mm_ext.adapters.processors.recorded_items import RecordedItems
from vllm_mm_ext.adapters.processors.segment_info import prunes_videos
from vllm_mm_ext.adapters.processors.segment_items import (
    SegmentItems,
    frames_of,
    part_of,
    segment_at,
    wrapped,
)
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.media.recorded import record_of
from vllm_mm_ext.video.resize import resized
from vllm_mm_ext.video.segments import (
    Segment,
    VideoLayout,
    VideoSegment,
    VideoShape,
    cut_video,
    segment_digest,
    segments_of,
)
from vllm_mm_ext.video.splits import (
    SegmentRecipe,
    SplitRecipe,
    SplitVideo,
    recorded_recipe,
    remembered,
)
from vllm_mm_ext.video.token_counts import TokenCount

# Videos with a ``uuid`` whose split is remembered, for requests that send the ``uuid`` alone.
_MAX_NAMES = 4096


class SegmentProcessor(RecordedItems):
    """Mixin in front of a family's multimodal processor in vLLM.

    A family overrides the methods of the first section. ``hf_kwargs`` are a request's
    ``mm_processor_kwargs``.
    """

    checkpoint_reduction: Reduction | None = None
    """The reduction that the checkpoint declares for requests that name none."""
    joins_sound = False
    """Whether a segment and its sound are one mm item."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = vllm_compat.settings_of(self.info.ctx.model_config)
        self.segment_tokens = settings.segments.tokens
        self._frames_are_final = settings.media.enabled and settings.media.resize == "target"
        self.default_reduction = settings.compression.default_reduction(self.checkpoint_reduction)
        self._named: LRUCache[str, SplitVideo] = LRUCache(_MAX_NAMES)

    # --- what a family defines --------------------------------------------------------------------

    @property
    def video_token_id(self) -> int:
        """Id of the token that stands in the prompt for a video, and for each visual token."""
        raise NotImplementedError

    def layout(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> VideoLayout | None:
        """How the model lays a video out; None leaves the video to stock vLLM."""
        raise NotImplementedError

    def encode_inputs(
        self, segments: Sequence[VideoSegment], hf_kwargs: Mapping[str, object]
    ) -> dict[str, Any]:
        """The model's inputs for some segments, by the names in vLLM's field configuration."""
        raise NotImplementedError

    def placeholder(self, part: Segment) -> list[int] | PromptUpdateDetails:
        """Prompt tokens of a segment, its placeholder."""
        return [self.video_token_id] * part.visual

    def around(self, layout: VideoLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt tokens before the first and after the last segment of a video."""
        return (), ()

    def track_piece(self, frames: SampledFrames, part: Segment) -> Waveform | None:
        """A segment's piece of its video's sound; None without sound."""
        return None

    @property
    def sound_rate(self) -> int | None:
        """Rate in Hz of the sound that the model takes with a video; None if it takes none."""
        return None

    def splits(self, hf_kwargs: Mapping[str, object]) -> bool:
        """Whether videos of a request with these ``mm_processor_kwargs`` are split."""
        return not prunes_videos(self.info.ctx)

    @property
    def hears_video(self) -> bool:
        """Whether the model hears videos: it can, and the server allows audio items at all."""
        hears = self.sound_rate is not None
        return hears and bool(self.info.ctx.get_mm_config().get_limit_per_prompt("audio"))

    # --- counting ---------------------------------------------------------------------------------

    def video_tokens(
        self,
        frames: int,
        height: int,
        width: int,
        *,
        times: Sequence[float] | None,
        audio_samples: int,
        reduction: Reduction,
        cut: bool = True,
    ) -> TokenCount:
        """Prompt tokens that a video becomes.

        Args:
            frames: Number of frames delivered.
            height, width: Size of a frame in pixels.
            times: Presentation times of the frames in seconds; None for the model's assumption.
            audio_samples: Samples of the sound at the model's rate; 0 for a video without sound.
            reduction: The token reduction.
            cut: The video is cut; of a whole one, vLLM resizes the frames once more.

        Raises:
            ValueError: The family leaves such a video to stock vLLM.
        """
        return self.tokens_of(
            VideoShape(
                frames,
                height,
                width,
                times=None if times is None else tuple(times),
                audio_samples=audio_samples,
                reduction=reduction,
                final=cut and self._frames_are_final,
            )
        )

    def tokens_of(self, shape: VideoShape) -> TokenCount:
        """Prompt tokens that a video becomes.

        Raises:
            ValueError: The family leaves such a video to stock vLLM.
        """
        layout = self.layout(shape, {}) if self.splits({}) else None
        if layout is None:
            raise ValueError("stock vLLM lays this video out")
        reduction = shape.reduction
        visual = text = audio = largest = 0
        for cut in cut_video(layout, reduction, self.segment_tokens):
            seen = reduction.count(cut.grids[1] - cut.grids[0], layout.height, layout.width)
            heard = cut.audio[1] - cut.audio[0]
            visual, audio = visual + seen, audio + heard
            largest = max(largest, seen + heard if self.joins_sound else max(seen, heard))
            text += self.text_tokens(layout, cut.grids, reduction)
        before, after = self.around(layout)
        around = len(before) + len(after)
        return TokenCount(visual + layout.tail, audio, text + around, largest + layout.tail)

    def text_tokens(self, layout: VideoLayout, grids: tuple[int, int], reduction: Reduction) -> int:
        """Number of tokens for neither picture nor sound in a segment of these grids."""
        return 0

    # --- splitting --------------------------------------------------------------------------------

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Split the videos of a request, then process the request as vLLM does."""
        inputs = self.split(inputs)
        if inputs.cache is None or not is_large(inputs, self.info.ctx):
            return super().apply(inputs, timing_ctx)
        cache = LargeRequestCache(inputs, self)
        made = super().apply(dataclasses.replace(inputs, cache=cache), timing_ctx)
        cache.follow_engine(made)
        return made

    def split(self, inputs: Any) -> Any:
        """Replace the videos in a request's ``ProcessorInputs`` by their segments.

        If one of the videos cannot be split, all of them stay whole.
        """
        videos = inputs.mm_data_items.get("video")
        if not isinstance(videos, VideoProcessorItems) or not self.splits(
            inputs.hf_processor_mm_kwargs
        ):
            return inputs
        names = (inputs.mm_uuid_items or {}).get("video") or [None] * len(videos)
        split = [
            self._split_one(videos, index, name, inputs.hf_processor_mm_kwargs)
            for index, name in enumerate(names)
        ]
        found = [video for video in split if video is not None]
        if len(found) < len(split):
            return inputs
        prompt = self.expand_prompt(inputs.prompt, found)
        if prompt is None:
            return inputs
        items = MultiModalDataItems(dict(inputs.mm_data_items))
        data = [(segment, v.metadata) for v in found for segment in v.segments]
        items["video"] = SegmentItems(
            [None if pair[0] is None else pair for pair in data], [pair[1] for pair in data]
        )
        uuids = {k: v for k, v in (inputs.mm_uuid_items or {}).items() if k != "video"}
        if any(name is not None for name in names):
            uuids["video"] = [name for video in found for name in video.names]
        return dataclasses.replace(
            inputs, prompt=prompt, mm_data_items=items, mm_uuid_items=uuids or None
        )

    def expand_prompt(self, prompt: list[int], videos: Sequence[SplitVideo]) -> list[int] | None:
        """The prompt with one video token per segment; None if it has too few video tokens.

        As in vLLM, the first video tokens stand for the videos; further ones are text.
        """
        expanded: list[int] = []
        left = iter(videos)
        # Asked for once: configurations of transformers take microseconds to say it.
        video_token = self.video_token_id
        for token in prompt:
            video = next(left, None) if token == video_token else None
            if video is None:
                expanded.append(token)
            else:
                expanded += [*video.before, *[token] * len(video.segments), *video.after]
        return expanded if next(left, None) is None else None

    def _split_one(
        self,
        videos: VideoProcessorItems,
        index: int,
        name: str | None,
        hf_kwargs: Mapping[str, object],
    ) -> SplitVideo | None:
        item = videos.get(index)
        if item is None:
            return None if name is None else self._named.get(name)
        metadata = videos.metadata[index] if isinstance(videos.metadata, list) else None
        frames: Any = frames_of(item[0] if isinstance(item, tuple) else item)
        if frames is None:
            return None
        chosen = isinstance(frames, SampledFrames) and frames.times is not None
        if not chosen and self._samples(metadata, hf_kwargs):
            return None
        if not isinstance(frames, SampledFrames):
            frames = wrapped(frames, self.default_reduction)
        video = self._split_frames(frames, metadata, hf_kwargs)
        if video is None or name is None:
            return video
        named = [f"{name}#{segment.digest}" for segment in video.segments if segment is not None]
        video = dataclasses.replace(video, names=named)
        self._named[name] = dataclasses.replace(video, segments=[None] * len(named))
        return video

    def _samples(self, metadata: Mapping[str, Any] | None, hf_kwargs: Mapping[str, object]) -> bool:
        """Whether transformers will choose among a video's frames, so they are not known yet."""
        asked = video_kwargs(self.info, hf_kwargs).get("do_sample_frames")
        return bool((metadata or {}).get("do_sample_frames") if asked is None else asked)

    def _split_frames(
        self,
        frames: SampledFrames,
        metadata: dict[str, Any] | None,
        hf_kwargs: Mapping[str, object],
    ) -> SplitVideo | None:
        """The split of a video; its recipe is remembered with the frames."""
        asked = (frames.reduction.key(), repr(sorted(hf_kwargs.items())), repr(metadata))
        recipe = remembered(
            frames,
            (self.segment_tokens, *asked),
            lambda: self._recipe(frames, metadata, hf_kwargs),
        )
        return None if recipe is None else recipe.applied(frames, metadata)

    def _recipe(
        self,
        frames: SampledFrames,
        metadata: dict[str, Any] | None,
        hf_kwargs: Mapping[str, object],
    ) -> SplitRecipe | None:
        shape = self.shape_of(frames, metadata)
        layout = self.layout(shape, hf_kwargs)
        if layout is None:
            return None
        if (record := record_of(frames)) is not None:
            around = self.around(layout)
            return recorded_recipe(record, frames, layout, self.segment_tokens, around)

        def pixels(part: slice) -> npt.NDArray[np.uint8]:
            return self.at_size(np.asarray(frames[part]), layout.size)

        digests = frames.frame_digests()
        segments = []
        for part in segments_of(layout, shape.reduction, self.segment_tokens, pixels):
            track = self.track_piece(frames, part)
            digest = segment_digest(part, frames.shape[1:3], digests[part.frames], track)
            segments.append(SegmentRecipe(part, digest, track))
        return SplitRecipe(tuple(segments), *self.around(layout))

    def shape_of(self, frames: SampledFrames, metadata: dict[str, Any] | None) -> VideoShape:
        """Everything that decides the tokens of a video.

        Raises:
            MediaError: The video's sound is not at the model's sampling rate.
        """
        rate, track = self.sound_rate, frames.audio
        if track is not None and track.rate != rate and self.hears_video:
            raise MediaError(
                f"a sound track at {track.rate} Hz; the model takes {rate} Hz",
                parameter="video_url",
            )
        return VideoShape(
            frames=len(frames),
            height=frames.shape[1],
            width=frames.shape[2],
            times=frames.times,
            step=frames.step,
            audio_samples=0 if frames.audio is None else len(frames.audio),
            reduction=frames.reduction,
            metadata=metadata,
            final=frames.pinned,
            unit_s=frames.unit_s,
        )

    def at_size(
        self, frames: npt.NDArray[np.uint8], size: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """Frames resized to ``(height, width)`` pixels as the model's video processor does it."""
        if frames.shape[1:3] == size:
            return frames
        return resized(self.info.get_hf_processor().video_processor, frames, size)

    # --- vLLM's processor -------------------------------------------------------------------------

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        """Process segments one by one and without the text; vLLM processes all other items."""
        videos = mm_items.get("video")
        segments = [segment_at(videos, i) for i in range(len(videos) if videos else 0)]
        own = [segment for segment in segments if segment is not None]
        if not own:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        others = MultiModalDataItems({k: v for k, v in mm_items.items() if k != "video"})
        processed = super()._apply_hf_processor_main(others, hf_kwargs)  # type: ignore[misc]
        processed.update(self.encode_inputs(own, hf_kwargs))
        processed.update(fields.segment_fields([part_of(segment) for segment in own]))
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return fields.without_slices({**stock, **fields.configuration()})

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        videos = mm_items.get("video")
        if not videos or segment_at(videos, 0) is None:
            return updates  # type: ignore[no-any-return]
        others = [update for update in updates if update.modality != "video"]
        return [*others, self.segment_update(videos)]

    def segment_update(self, videos: Any) -> PromptReplacement:
        """vLLM's rule that replaces each video token by a segment's placeholder."""

        def of_segment(index: int) -> list[int] | PromptUpdateDetails:
            segment = segment_at(videos, index)
            assert segment is not None
            return self.placeholder(part_of(segment))

        return PromptReplacement(
            modality="video", target=[self.video_token_id], replacement=of_segment
        )
