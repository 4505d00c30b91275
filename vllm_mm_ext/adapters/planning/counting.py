"""Counts the tokens of a workload's request with the processor that serves the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as PilImage

from vllm_mm_ext.adapters.planning.loading import CannotPlanError, LoadedModel
from vllm_mm_ext.adapters.processors.segment_processor import SegmentProcessor
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.planner.delivery import Delivery, frame_times
from vllm_mm_ext.planner.model_facts import ModelFacts
from vllm_mm_ext.planner.request_tokens import (
    ItemTokens,
    MediumTokens,
    Modality,
    RequestTokens,
    Stages,
)
from vllm_mm_ext.planner.video_tokens import EncoderShape, video_tokens
from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.video.segments import VideoShape


def check_countable(name: str, loaded: LoadedModel) -> None:
    """Refuse a model whose requests cannot be counted.

    Args:
        name: Model or path as the user gave it.
        loaded: The model.

    Raises:
        CannotPlanError: The plugin has no processor for the model's videos.
    """
    if not isinstance(loaded.processor, SegmentProcessor):
        raise CannotPlanError(
            f"{name}: the plugin has no processor of its own for "
            f"{loaded.config.model_config.architecture}, so stock vLLM lays its videos out and no "
            "plan can be made"
        )


class RequestCounter:
    """Counts with the processor of one loaded model.

    Args:
        loaded: The model.
        facts: Its sizes.
        max_audio_s: Seconds of sound after which that of a video is cut.
    """

    def __init__(self, loaded: LoadedModel, facts: ModelFacts, *, max_audio_s: float) -> None:
        self._processor: Any = loaded.processor
        self._loaded = loaded
        self._facts = facts
        self._max_audio_s = max_audio_s
        self._once = lru_cache(maxsize=256)(self._run)

    def request(self, workload: Workload, delivery: Delivery) -> RequestTokens:
        """Tokens of one request.

        Args:
            workload: What a request holds.
            delivery: What the server makes of its videos.

        Raises:
            CannotPlanError: The model does not take a medium of the workload.
            MediaError: The model does not take a video of that shape or the reduction.
        """
        media = [
            *(self.video(video, delivery) for video in workload.videos),
            *(self._other("audio", audio) for audio in workload.audios),
            *(self._other("image", image) for image in workload.images),
        ]
        # A medium's own count has all its tokens, so its one token of the template is left out.
        around = self._loaded.template_tokens([medium.kind for medium in media]) - len(media)
        return RequestTokens(workload.text + around, workload.output, tuple(media))

    @property
    def told_times(self) -> bool:
        """Whether the model is told when the frames of a video are shown."""
        shape = VideoShape(4, 448, 448, times=(0.0, 1.0, 2.0, 3.0), final=False)
        layout = self._processor.layout(shape, {}) if self._processor.splits({}) else None
        if layout is None:
            return False
        numbered = getattr(self._processor, "numbered", False)
        return layout.timestamps is not None or (layout.positions is not None and not numbered)

    def video(self, video: Video, delivery: Delivery) -> MediumTokens:
        """Tokens of one video."""
        self._check("video")
        traits, processor, facts = self._loaded.traits, self._processor, self._facts
        assert facts.vision is not None
        times = frame_times(video, delivery, traits.frame_multiple)
        rule = replace(traits.size_rule, max_frame_pixels=delivery.frame_pixels)
        height, width = target_size(
            rule, width=video.width, height=video.height, num_frames=len(times)
        )
        heard = min(video.seconds, self._max_audio_s)
        samples = 0
        if video.sound and processor.hears_video:
            samples = round(heard * (traits.audio_rate or 0))
        shape = VideoShape(
            len(times),
            height,
            width,
            times=times,
            step=1 / video.fps,
            audio_samples=samples,
            reduction=delivery.reduction,
            final=rule.kind != "native",
        )
        layout = processor.layout(shape, {}) if processor.splits({}) else None
        if layout is None:
            raise CannotPlanError(f"{facts.name}: stock vLLM lays its videos out; no plan is made")
        patch = round((facts.vision.input_values // 3 // self._temporal()) ** 0.5)
        audio = 0 if facts.audio is None else facts.audio.inputs_per_output
        encoder = EncoderShape(patch, audio, joint=traits.sound_token is not None)
        text = processor.tokens_of(shape).text
        later = 0
        if layout.timestamps is not None:
            # The longest that the written times can be: as if all frames were at the end.
            end = max(times[-1], video.seconds)
            late = tuple(end + 1e-3 * number for number in range(len(times)))
            later = max(0, processor.tokens_of(replace(shape, times=late, step=None)).text - text)
        stages, items = video_tokens(
            layout,
            delivery.reduction,
            processor.segment_tokens,
            encoder,
            frames=len(times),
            text=text,
        )
        return MediumTokens(
            kind="video",
            seconds=video.seconds,
            source=(video.width, video.height),
            size=(layout.size[1], layout.size[0]),
            audio_seconds=heard if samples else 0.0,
            stages=stages,
            items=items,
            picture_inputs=layout.size[0] * layout.size[1] // patch**2,
            later_text=later,
        )

    def _temporal(self) -> int:
        """Frames of a patch."""
        processor = getattr(self._processor.info.get_hf_processor(), "video_processor", None)
        return int(getattr(processor, "temporal_patch_size", 1) or 1)

    def _check(self, modality: Modality) -> None:
        limits = self._processor.info.get_supported_mm_limits()
        if modality not in limits:
            raise CannotPlanError(
                f"--{modality}: {self._facts.name} takes {', '.join(sorted(limits))} only"
            )

    def _other(self, kind: Modality, given: Image | float) -> MediumTokens:
        """Tokens of an image, or of a sound by itself: the processor makes them of a blank one."""
        self._check(kind)
        if not isinstance(given, Image) and given > self._max_audio_s:
            raise CannotPlanError(
                f"--audio: a server takes {self._max_audio_s:g} s of a sound at most "
                f"(VLLM_MAX_AUDIO_DECODE_DURATION_S), got {given:g} s"
            )
        return self._once(kind, given)

    def _run(self, kind: Modality, given: Image | float) -> MediumTokens:
        """What the processor makes of one medium."""
        processor = self._processor
        medium: Any
        if isinstance(given, Image):
            medium = PilImage.new("RGB", (given.width, given.height))
        else:
            rate = self._loaded.traits.audio_rate or 16_000
            medium = (np.zeros(round(given * rate), np.float32), rate)
        text = processor.dummy_inputs.get_dummy_text({kind: 1})
        before = len(self._loaded.tokenizer.encode(text, add_special_tokens=False))
        data = processor.info.parse_mm_data({kind: [medium]})
        with self._loaded.naming_kwargs():
            made = self._made(kind, given, text, data)
        places = made["mm_placeholders"][kind]
        fields = made["mm_kwargs"][kind]
        items = tuple(
            self._item(kind, place.get_num_embeds(), item)
            for place, item in zip(places, fields, strict=True)
        )
        embeddings = sum(item.embeddings for item in items)
        total = len(made["prompt_token_ids"]) - before + 1
        is_image = isinstance(given, Image)
        return MediumTokens(
            kind=kind,
            seconds=0.0 if isinstance(given, Image) else given,
            source=(given.width, given.height) if isinstance(given, Image) else (0, 0),
            size=(given.width, given.height) if isinstance(given, Image) else (0, 0),
            audio_seconds=0.0 if isinstance(given, Image) else given,
            stages=Stages(
                sampled=int(is_image),
                encoded=embeddings if is_image else 0,
                pooled=embeddings if is_image else 0,
                temporal=embeddings if is_image else 0,
                sound=0 if is_image else embeddings,
                text=total - embeddings,
            ),
            items=items,
            picture_inputs=sum(item.encoder_inputs for item in items) if is_image else 0,
        )

    def _made(self, kind: Modality, given: Image | float, text: str, data: Any) -> Any:
        try:
            return self._processor(text, data, {}, {}, cache=None)
        except ValueError as error:
            shown = f"{given.width}x{given.height}" if isinstance(given, Image) else f"{given:g}s"
            # vLLM says which processor failed, and the processor why.
            why = error.__cause__ or error
            raise CannotPlanError(f"--{kind}: the model does not take {shown}: {why}") from error

    def _item(self, kind: Modality, embeddings: int, fields: Mapping[str, Any]) -> ItemTokens:
        """An item of the engine, with the inputs that the encoder gets."""
        facts = self._facts.vision if kind == "image" else self._facts.audio
        assert facts is not None
        inputs = embeddings * facts.inputs_per_output
        if kind == "image" and "pixel_values" in fields:
            values = int(fields["pixel_values"].data.numel())
            inputs = max(inputs, values // facts.input_values)
        return ItemTokens(kind, inputs, embeddings, embeddings)
