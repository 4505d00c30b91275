"""The sound of a video as a hidden audio item, paired with it per item.

vLLM's omni processors take sound in video from a flag that holds for a whole request and an audio
item per video, paired by order. Here the frames of a video carry their own sound track
(``media.payload.SampledFrames.audio``): a video that has one becomes a video item and an audio item
that share one run of prompt tokens; any other item is left as it is.

The track becomes an item inside ``apply``, after vLLM has checked the number of items a client
sent against ``--limit-mm-per-prompt``. Everything that shapes the prompt follows from the video
item alone (its frame times and the length of its track), so that the two can be cached apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.payload import SampledFrames, Waveform, known_digest
from vllm_mm_ext.processing.frame_times import (
    assumed_steps,
    frames_of,
    place,
    with_positions_field,
    write,
)
from vllm_mm_ext.processing.grid_times import GridTimes, even_grid

# Client-named videos whose having a track is remembered, for requests that send the name alone.
_MAX_NAMES = 4096


class DigestAudioItems(AudioProcessorItems):  # type: ignore[misc]
    """Audio items hashed by the digest they carry instead of by their samples."""

    def get_item_for_hash(self, index: int) -> object:
        """What identifies the item to vLLM's caches."""
        item = self.data[index]
        digest = known_digest(item)
        return item if digest is None else f"mm_ext:{digest}"


class TrackedItems(MultiModalDataItems):  # type: ignore[misc]
    """Data items whose last audio items are sound tracks.

    Attributes:
        owners: For each track, in the order of the audio items, the index of its video.
    """

    owners: tuple[int, ...] = ()


class SoundTrackProcessor:
    """Mixin in front of an omni family's multimodal processor.

    A family says how many tokens a waveform becomes and how tokens interleave.
    """

    info: Any
    data_parser: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_track: OrderedDict[str, bool] = OrderedDict()

    # --- what a family defines --------------------------------------------------------------------

    def audio_tokens(self, num_mel_frames: int) -> int:
        """Tokens that a waveform of so many log-mel frames becomes."""
        raise NotImplementedError

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[tuple[int, int]]:
        """Runs of ``(visual tokens, audio tokens)`` of a video with sound."""
        raise NotImplementedError

    # --- media properties -------------------------------------------------------------------------

    @property
    def hears_video(self) -> bool:
        """Whether videos are heard: not where the server takes no audio at all."""
        return bool(self.info.ctx.get_mm_config().get_limit_per_prompt("audio"))

    def track_of(self, frames: SampledFrames | None) -> Waveform | None:
        """The sound track to attach to a video, if it has one long enough for a token.

        Raises:
            ValueError: The track is not at the model's sampling rate.
        """
        if frames is None or frames.audio is None or not self.hears_video:
            return None
        rate = self.info.get_feature_extractor().sampling_rate
        if frames.audio.rate != rate:
            raise ValueError(f"a sound track at {frames.audio.rate} Hz; the model takes {rate} Hz")
        return frames.audio if self._track_tokens(frames.audio) else None

    def _track_tokens(self, track: Waveform) -> int:
        hop = self.info.get_feature_extractor().hop_length
        return self.audio_tokens(math.ceil(len(track) / hop))

    def _place(
        self, frames: SampledFrames | None, num_grids: int, assumed_step: float
    ) -> GridTimes | None:
        return place(
            frames,
            num_grids=num_grids,
            temporal_patch=int(self.info.get_hf_processor().video_processor.temporal_patch_size),
            assumed_step=assumed_step,
            exact=self.track_of(frames) is not None,
        )

    # --- vLLM's processor -------------------------------------------------------------------------

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Attach sound tracks, then process as usual."""
        if not inputs.hf_processor_mm_kwargs.get("use_audio_in_video"):
            inputs = self._attach_tracks(inputs)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _attach_tracks(self, inputs: Any) -> Any:
        items = TrackedItems(dict(inputs.mm_data_items))
        uuids = dict(inputs.mm_uuid_items or {})
        videos, audios = items.get("video"), items.get("audio")
        own: list[Any] = []
        if isinstance(audios, AudioProcessorItems):
            own = list(audios.data)
            items["audio"] = DigestAudioItems(own)
        if not isinstance(videos, VideoProcessorItems) or (audios is not None and not own):
            return dataclasses.replace(inputs, mm_data_items=items)

        names: Sequence[str | None] = uuids.get("video") or [None] * len(videos)
        tracks = {
            index: track
            for index, name in enumerate(names)
            for track, present in [self._find_track(videos.get(index), name)]
            if present
        }
        if tracks:
            items.owners = tuple(tracks)
            items["audio"] = DigestAudioItems([*own, *tracks.values()])
            uuids["audio"] = [
                *(uuids.get("audio") or [None] * len(own)),
                *(names[index] and f"{names[index]}#audio" for index in tracks),
            ]
        return dataclasses.replace(inputs, mm_data_items=items, mm_uuid_items=uuids)

    def _find_track(self, video: object, name: str | None) -> tuple[Waveform | None, bool]:
        """A video's track and whether it has one; a video sent by name alone has it remembered."""
        if video is None:
            return None, name is not None and self._has_track.get(name, False)
        track = self.track_of(frames_of(video))
        if name is not None:
            self._has_track[name] = track is not None
            self._has_track.move_to_end(name)
            while len(self._has_track) > _MAX_NAMES:
                self._has_track.popitem(last=False)
        return track, track is not None

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        flag = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return {**with_positions_field(stock), "use_audio_in_video": flag}

    def _postprocess_hf_mm_data(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object], processed_data: Any
    ) -> Any:
        """Replace what one flag or rate says about all videos by what holds for each."""
        data = super()._postprocess_hf_mm_data(hf_data, hf_kwargs, processed_data)  # type: ignore[misc]
        grids = data.get("video_grid_thw")
        flag = bool(hf_kwargs.get("use_audio_in_video", False))
        if grids is None or not len(grids):
            data.pop("use_audio_in_video", None)
            return data
        videos = hf_data.get("videos") or [None] * len(grids)
        all_frames = [frames_of(video) for video in videos]
        data["use_audio_in_video"] = torch.tensor(
            [flag or self.track_of(frames) is not None for frames in all_frames]
        )
        if hf_data.get("videos"):
            placed = [
                self._place(frames, int(grid[0]), step)
                for frames, grid, step in zip(all_frames, grids, assumed_steps(data), strict=True)
            ]
            write(data, placed, self.positions_per_second)
        return data

    @property
    def positions_per_second(self) -> float:
        """M-RoPE positions per second of video and sound."""
        return float(self.info.get_hf_config().position_id_per_seconds)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        if hf_processor_mm_kwargs.get("use_audio_in_video"):
            return super()._get_prompt_updates(  # type: ignore[misc,no-any-return]
                mm_items, hf_processor_mm_kwargs, out_mm_kwargs
            )
        config = self.info.get_hf_config()
        merge = int(config.vision_config.spatial_merge_size) ** 2

        def audio(index: int) -> list[int]:
            num_frames = int(out_mm_kwargs["audio"][index]["audio_feature_lengths"].data)
            tokens = self.audio_tokens(num_frames)
            if tokens == 0:
                raise MediaError(
                    f"audio item {index} has {num_frames} log-mel frames of 10 ms, too few for the"
                    " model to hear anything",
                    parameter="input_audio",
                )
            return [config.audio_token_id] * tokens

        def image(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return [config.image_token_id] * (int(grid.prod()) // merge)

        def video(index: int) -> Any:
            item = out_mm_kwargs["video"][index]
            grid_t, grid_h, grid_w = item["video_grid_thw"].data.tolist()
            per_grid = grid_h * grid_w // merge
            videos = mm_items["video"]
            frames = frames_of(
                videos.get(index) if isinstance(videos, VideoProcessorItems) else None
            )
            track = self.track_of(frames)
            if track is None:
                return [config.video_token_id] * (grid_t * per_grid)
            step = float(item["second_per_grid_ts"].data)
            grids = self._place(frames, grid_t, step) or even_grid(grid_t, step)
            tokens = [config.audio_start_token_id]
            for visual, audible in self.interleave(grids, per_grid, self._track_tokens(track)):
                tokens += [config.video_token_id] * visual + [config.audio_token_id] * audible
            tokens.append(config.audio_end_token_id)
            return PromptUpdateDetails.select_token_id(tokens, embed_token_id=config.video_token_id)

        targets = {"audio": (config.audio_token_id, audio), "image": (config.image_token_id, image)}
        targets["video"] = (config.video_token_id, video)
        return [
            PromptReplacement(modality=modality, target=[token], replacement=replacement)
            for modality, (token, replacement) in targets.items()
        ]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> tuple[list[int], Any]:
        if not isinstance(mm_items, TrackedItems):
            return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc,no-any-return]
        processor: Any = self
        counts = mm_items.get_all_counts()
        processor._validate_mm_kwargs(mm_res.kwargs, counts)
        processor._validate_mm_updates(mm_res.prompt_updates, counts)

        updates = dict(mm_res.prompt_updates)
        audio_updates = list(updates.pop("audio", ()))
        num_own = len(audio_updates) - len(mm_items.owners)
        if num_own:
            updates["audio"] = audio_updates[:num_own]
        prompt, found = processor._apply_prompt_updates(mm_res.prompt_ids, updates)

        placeholders = {modality: list(infos) for modality, infos in found.items()}
        audio_token = self.info.get_hf_config().audio_token_id
        heard = {}
        for k, owner in enumerate(mm_items.owners):
            video = placeholders["video"][owner]
            is_audio = torch.from_numpy(np.asarray(video.tokens) == audio_token)
            heard[owner] = int(is_audio.sum())
            track = PlaceholderFeaturesInfo(
                modality="audio",
                item_idx=num_own + k,
                start_idx=video.start_idx,
                tokens=video.tokens,
                is_embed=is_audio,
            )
            placeholders.setdefault("audio", []).append(track)
            if heard[owner] != len(audio_updates[num_own + k][0].content.full):
                raise ValueError("a video and its sound track do not belong together; send it anew")
        for index, video in enumerate(placeholders.get("video", ())):
            if index not in heard and audio_token in video.tokens:
                raise ValueError("the sound of a video named by uuid is not known; send it anew")
        processor._validate_mm_placeholders(placeholders, counts)
        return prompt, placeholders
