"""The sound of a video as hidden audio items, one for each segment that has sound.

Stock vLLM's omni processors take the sound of videos from one flag per request and from one audio
item per video, paired by order. With this module the frames of a video carry their sound track
(``media.payload.SampledFrames.audio``). A segment with a piece of the track becomes two mm items, a
video item and an audio item that share one placeholder range. Other items stay as they are.

The audio items are added inside ``apply``, after vLLM has checked the client's number of items
against ``--limit-mm-per-prompt``. The prompt's tokens follow from the video item alone, so vLLM can
cache the two items independently.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from vllm_mm_ext.adapters.processors.model_traits import video_kwargs
from vllm_mm_ext.adapters.processors.patch_segments import PatchSegmentProcessor
from vllm_mm_ext.adapters.processors.segment_items import segment_at
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.payload import SampledFrames, Waveform, known_digest
from vllm_mm_ext.video.cuts import Run
from vllm_mm_ext.video.grid_times import GridTimes
from vllm_mm_ext.video.segments import Segment, Sound, VideoLayout, VideoShape
from vllm_mm_ext.video.track_pieces import MEL_RATE, AudioWindow, TrackPiece, piece_of

# Segments with a ``uuid`` of which it is remembered whether they have sound, for requests that send
# the ``uuid`` alone.
_MAX_NAMES = 1 << 16


class DigestAudioItems(AudioProcessorItems):  # type: ignore[misc]
    """Audio items that vLLM hashes by the digest they carry instead of by their samples.

    Args:
        data: The items.
        beside: By index, the digest of the segment whose placeholder an item shares. It is part of
            the item's identity: connectors that know KV by one item of each placeholder (LMCache)
            would give a video the KV of another one with equal sound, such as silence.
    """

    def __init__(self, data: Any, beside: Mapping[int, str] | None = None) -> None:
        super().__init__(data)
        self._beside = beside or {}

    def get_item_for_hash(self, index: int) -> object:
        """What vLLM hashes to identify the item in its caches."""
        item = self.data[index]
        digest = known_digest(item)
        if digest is None:
            return item
        beside = self._beside.get(index)
        return f"mm_ext:{digest}" if beside is None else f"mm_ext:{digest} in {beside}"


class TrackedItems(MultiModalDataItems):  # type: ignore[misc]
    """Data items whose last audio items are pieces of sound tracks.

    Attributes:
        owners: Index of the video item of each piece, in the order of the audio items.
    """

    owners: tuple[int, ...] = ()


class SoundTrackProcessor(PatchSegmentProcessor):
    """Mixin in front of an omni family's multimodal processor in vLLM.

    A family overrides the methods of the first section, which say how many tokens sound becomes
    and how they interleave with the visual tokens.

    Attributes:
        assumed_fps: Frames per second that transformers assumes if no option says.
    """

    data_parser: Any
    assumed_fps: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_track: LRUCache[str, bool] = LRUCache(_MAX_NAMES)

    # --- what a family defines --------------------------------------------------------------------

    def audio_tokens(self, num_mel_frames: int) -> int:
        """Number of tokens that a waveform of so many log-mel frames becomes."""
        raise NotImplementedError

    def audio_window(self) -> AudioWindow:
        """The audio encoder's window; sound is cut between windows."""
        raise NotImplementedError

    @property
    def unit_s(self) -> float:
        """Seconds of sound and frames that the model can take in before it knows what follows."""
        raise NotImplementedError

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[Run]:
        """Runs of ``(visual tokens, audio tokens)`` of a video with sound, in prompt order.

        Args:
            grids: Times of the temporal grids.
            tokens_per_grid: Visual tokens of a grid.
            num_audio_tokens: Audio tokens of the whole track.
        """
        raise NotImplementedError

    def track_features(self, track: Waveform) -> torch.Tensor:
        """Log-mel spectrogram ``[bins, frames]`` of a whole track, computed as for other audio."""
        raise NotImplementedError

    # --- layout -----------------------------------------------------------------------------------

    @property
    def sound_rate(self) -> int:
        """Sampling rate of the model's feature extractor, in Hz."""
        return int(self.info.get_feature_extractor().sampling_rate)

    @property
    def positions_per_second(self) -> float:
        """M-RoPE positions per second of video and sound."""
        return float(self.info.get_hf_config().position_id_per_seconds)

    def splits(self, hf_kwargs: Mapping[str, object]) -> bool:
        """Whether videos are split; not if the request sets ``use_audio_in_video``."""
        return not hf_kwargs.get("use_audio_in_video") and super().splits(hf_kwargs)

    def seconds_per_grid(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> float:
        """Seconds between grids at one frame rate for all videos, by the server's or the request's
        options.
        """
        fps = video_kwargs(self.info, hf_kwargs).get("fps") or self.assumed_fps
        return int(self.info.get_hf_processor().video_processor.temporal_patch_size) / float(fps)

    def sound(self, shape: VideoShape, grids: GridTimes, per_grid: int) -> Sound | None:
        """How a video's tokens interleave with its sound's; None without sound."""
        hop = self.info.get_feature_extractor().hop_length
        num_tokens = self.audio_tokens(math.ceil(shape.audio_samples / hop))
        if not num_tokens or not self.hears_video:
            return None
        window = self.audio_window()
        runs = tuple(self.interleave(grids, per_grid, num_tokens))
        return Sound(runs, window.tokens, window.least)

    def unit_tokens(self, seconds: float) -> int:
        """Audio tokens of a unit of a growing video."""
        return self.audio_tokens(round(seconds * MEL_RATE))

    def around(self, layout: VideoLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Start and end token of audio around a video with sound; nothing around one without."""
        if layout.sound is None:
            return (), ()
        config = self.info.get_hf_config()
        return (config.audio_start_token_id,), (config.audio_end_token_id,)

    def track_piece(self, frames: SampledFrames, part: Segment) -> Waveform | None:
        """A segment's piece of the sound, cut from the spectrogram of the whole track."""
        if part.layout.sound is None or part.audio[0] == part.audio[1]:
            return None
        track = frames.audio
        assert track is not None
        mel = track.mel if isinstance(track, TrackPiece) else frames.memo.get("mel")
        if mel is None:
            # The transform clamps to the maximum of its input, so pieces transformed one by one
            # would differ from the whole.
            mel = frames.memo["mel"] = self.track_features(track)
        window = self.audio_window()
        # Units of a growing video may end within a window, at a whole chunk of the encoder.
        begin, end = (at * window.mel_frames // window.tokens for at in part.audio)
        to_the_end = part.audio[1] == sum(audio for _, audio in part.layout.sound.runs)
        return piece_of(track, mel[:, begin : None if to_the_end else end])

    def placeholder(self, part: Segment) -> list[int] | PromptUpdateDetails:
        """Tokens of a segment; of a segment with sound, only the visual tokens are the video's."""
        if part.audio[0] == part.audio[1]:
            return super().placeholder(part)
        config = self.info.get_hf_config()
        tokens: list[int] = []
        for visual, audible in part.runs:
            tokens += [config.video_token_id] * visual + [config.audio_token_id] * audible
        return PromptUpdateDetails.select_token_id(tokens, embed_token_id=config.video_token_id)

    # --- vLLM's processor -------------------------------------------------------------------------

    def split(self, inputs: Any) -> Any:
        """Split videos, and add an audio item for each segment that has sound.

        Args:
            inputs: vLLM's ``ProcessorInputs`` of the request.
        """
        audios = inputs.mm_data_items.get("audio")
        embedded = audios is not None and not isinstance(audios, AudioProcessorItems)
        if embedded or inputs.hf_processor_mm_kwargs.get("use_audio_in_video"):
            # vLLM does not mix audio given as embeddings with other audio in one request.
            return inputs
        inputs = super().split(inputs)
        items = TrackedItems(dict(inputs.mm_data_items))
        uuids = dict(inputs.mm_uuid_items or {})
        videos = items.get("video")
        own: list[Any] = [] if audios is None else list(audios.data)
        if own:
            items["audio"] = DigestAudioItems(own)
        if not isinstance(videos, VideoProcessorItems):
            return dataclasses.replace(inputs, mm_data_items=items)

        names: Sequence[str | None] = uuids.get("video") or [None] * len(videos)
        pieces = {
            index: piece
            for index, name in enumerate(names)
            for piece, present in [self._find_piece(videos, index, name)]
            if present
        }
        if pieces:
            items.owners = tuple(pieces)
            beside = {
                len(own) + number: digest
                for number, index in enumerate(pieces)
                if (digest := known_digest(segment_at(videos, index))) is not None
            }
            items["audio"] = DigestAudioItems([*own, *pieces.values()], beside)
            uuids["audio"] = [
                *(uuids.get("audio") or [None] * len(own)),
                *(names[index] and f"{names[index]}#audio" for index in pieces),
            ]
        return dataclasses.replace(inputs, mm_data_items=items, mm_uuid_items=uuids)

    def _find_piece(
        self, videos: VideoProcessorItems, index: int, name: str | None
    ) -> tuple[Waveform | None, bool]:
        """A segment's piece of sound, and whether the segment has sound.

        Args:
            videos: The video items.
            index: Index of the segment.
            name: The segment's ``uuid``; if the client sent nothing else, whether the segment has
                sound is known from an earlier request.
        """
        if videos.data[index] is None:
            return None, name is not None and self._has_track.get(name, False)
        segment = segment_at(videos, index)
        piece = None if segment is None else segment.audio
        if name is not None:
            self._has_track[name] = piece is not None
        return piece, piece is not None

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        """Add the features that pieces of tracks carry; vLLM transforms all other audio."""
        audios = mm_items.get("audio")
        heard = list(audios.data) if isinstance(audios, AudioProcessorItems) else []
        pieces = [audio for audio in heard if isinstance(audio, TrackPiece)]
        if not pieces:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        others = MultiModalDataItems({k: v for k, v in mm_items.items() if k != "audio"})
        if own := heard[: len(heard) - len(pieces)]:
            others["audio"] = DigestAudioItems(own)
        data = super()._apply_hf_processor_main(others, hf_kwargs)
        mel = [piece.mel.to(self.info.ctx.model_config.dtype) for piece in pieces]
        lengths = torch.tensor([features.shape[1] for features in mel])
        before = data.get("input_audio_features")
        if before is None:
            data["audio_feature_lengths"] = lengths
            data["feature_attention_mask"] = []
            data["input_audio_features"] = torch.cat(mel, dim=1)
        else:
            data["audio_feature_lengths"] = torch.cat([data["audio_feature_lengths"], lengths])
            data["input_audio_features"] = torch.cat([before, *mel], dim=1)
        masks = list(data["feature_attention_mask"])
        data["feature_attention_mask"] = masks + [torch.ones(int(n)) for n in lengths]
        return data

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        flag = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return {**stock, "use_audio_in_video": flag}

    def encode_inputs(
        self, segments: Sequence[Any], hf_kwargs: Mapping[str, object]
    ) -> dict[str, Any]:
        """Inputs as for silent video, and whether each segment has sound."""
        heard = torch.tensor([segment.audio is not None for segment in segments])
        return {**super().encode_inputs(segments, hf_kwargs), "use_audio_in_video": heard}

    def _postprocess_hf_mm_data(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object], processed_data: Any
    ) -> Any:
        """Replace the request's single ``use_audio_in_video`` by one flag per video."""
        data = super()._postprocess_hf_mm_data(hf_data, hf_kwargs, processed_data)  # type: ignore[misc]
        grids = data.get("video_grid_thw")
        data.pop("use_audio_in_video", None)
        if grids is not None and len(grids):
            flag = bool(hf_kwargs.get("use_audio_in_video", False))
            data["use_audio_in_video"] = torch.tensor([flag] * len(grids))
        return data

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        if hf_processor_mm_kwargs.get("use_audio_in_video"):
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
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

        def vision(kind: str, token: int) -> PromptReplacement:
            def tokens(index: int) -> list[int]:
                grid = out_mm_kwargs[kind][index][f"{kind}_grid_thw"].data
                return [token] * (int(grid.prod()) // merge)

            return PromptReplacement(modality=kind, target=[token], replacement=tokens)

        videos = mm_items.get("video")
        segmented = bool(videos) and segment_at(videos, 0) is not None
        return [
            PromptReplacement(modality="audio", target=[config.audio_token_id], replacement=audio),
            vision("image", config.image_token_id),
            self.segment_update(videos) if segmented else vision("video", config.video_token_id),
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
                raise MediaError(
                    "a video and its sound track do not belong together; send it anew",
                    parameter="video_url",
                )
        for index, video in enumerate(placeholders.get("video", ())):
            if index not in heard and audio_token in video.tokens:
                raise MediaError(
                    "the sound of a video named by uuid is not known; send it anew",
                    parameter="video_url",
                )
        processor._validate_mm_placeholders(placeholders, counts)
        return prompt, placeholders
