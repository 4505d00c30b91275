"""Reads from vLLM's multimodal processor what the model wants from the front-end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers.video_processing_utils import BaseVideoProcessor

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SizeRule

logger = logging.getLogger("vllm.mm_ext")

# vLLM's processors that decode the file of a video by themselves.
_FILE_READERS = frozenset({"Dots3NoteMultiModalProcessor"})
_SIZE_KEYS = frozenset({"size", "min_pixels", "max_pixels"})


def read_traits(mm_processor: Any) -> ModelTraits:
    """What the front-end should deliver to this processor.

    If the family's resizing rule is not known, frames keep their own size, as in stock vLLM.

    Args:
        mm_processor: vLLM's ``BaseMultiModalProcessor`` of the served model, or None for a
            text-only model.
    """
    if mm_processor is None:
        return ModelTraits()
    try:
        processor = mm_processor.info.get_hf_processor()
        video_processor = getattr(processor, "video_processor", None)
        return ModelTraits(
            size_rule=size_rule_for(mm_processor.info, {}, processor),
            frame_multiple=int(getattr(video_processor, "temporal_patch_size", 1) or 1),
            audio_rate=vllm_compat.audio_resampler_rate(mm_processor),
            hears_video=bool(getattr(mm_processor, "hears_video", False)),
            cuts_videos=splits_videos(mm_processor, {}),
            sound_token=getattr(mm_processor, "sound_token_id", None),
            default_reduction=getattr(mm_processor, "checkpoint_reduction", None),
            trained=getattr(mm_processor, "trained", None),
            reads_files=type(mm_processor).__name__ in _FILE_READERS,
        )
    except Exception as error:
        logger.warning("mm_ext: model traits unknown, frames keep their own size: %s", error)
        return ModelTraits(audio_rate=None)


def splits_videos(mm_processor: Any, hf_kwargs: Mapping[str, object]) -> bool:
    """Whether a processor cuts the videos of a request into segments, if nothing else prevents it.

    Args:
        mm_processor: vLLM's or the plugin's multimodal processor.
        hf_kwargs: The request's ``mm_processor_kwargs``.
    """
    splits = getattr(mm_processor, "splits", None)
    return splits is not None and bool(splits(hf_kwargs))


def size_rule_for(info: Any, hf_kwargs: Mapping[str, object], processor: Any) -> SizeRule:
    """The resizing rule for videos of a request.

    Args:
        info: vLLM's ``BaseProcessingInfo`` of the served model.
        hf_kwargs: The request's ``mm_processor_kwargs``, on top of the server's. What they say of
            videos alone (``videos_kwargs``) outranks what they say of all media.
        processor: The model's transformers processor.
    """
    merged = info.ctx.get_merged_mm_kwargs(hf_kwargs)
    overrides = video_kwargs(info, hf_kwargs)
    # For all media, transformers starts from the size of the checkpoint; for videos alone, from
    # that of the processor class.
    default = None if merged.keys() & _SIZE_KEYS else size_default_of(processor)
    return size_rule_of(getattr(processor, "video_processor", None), overrides, default)


def video_kwargs(info: Any, hf_kwargs: Mapping[str, object]) -> dict[str, Any]:
    """What a request's ``mm_processor_kwargs``, on top of the server's, say of videos.

    Args:
        info: vLLM's ``BaseProcessingInfo`` of the served model.
        hf_kwargs: As for ``size_rule_for``.
    """
    if any(kind.__name__ == "Qwen3VLProcessingInfo" for kind in type(info).__mro__):
        # vLLM lets a request's `size` outrank the server's `max_pixels` for this family alone.
        merged = info._merge_and_resolve_mm_processor_kwargs(hf_kwargs)
        return dict(merged.get("videos_kwargs") or {})
    merged = info.ctx.get_merged_mm_kwargs(hf_kwargs)
    return dict(merged | dict(merged.get("videos_kwargs") or {}))


def requested_size(info: Any, hf_kwargs: Mapping[str, object] | None) -> SizeRule | None:
    """The resizing rule for a request whose ``mm_processor_kwargs`` set one of its own.

    Args:
        info: vLLM's ``BaseProcessingInfo`` of the served model.
        hf_kwargs: The request's ``mm_processor_kwargs``; they may repeat the server's.

    Returns:
        None if the server's rule holds.

    Raises:
        MediaError: The request's sizes are no sizes.
    """
    if not hf_kwargs:
        return None
    processor = info.get_hf_processor()
    own = size_rule_for(info, {}, processor)
    try:
        asked = size_rule_for(info, hf_kwargs, processor)
    except (KeyError, TypeError, ValueError):
        raise MediaError(
            "mm_processor_kwargs: size, min_pixels or max_pixels of videos is not valid.",
            parameter="mm_processor_kwargs",
        ) from None
    return None if own == asked else asked


def size_default_of(processor: Any) -> dict[str, int] | None:
    """Size that a processor class passes to its video processor if the caller gives none.

    This size overrides the checkpoint's setting (transformers, ``ProcessorMixin._merge_kwargs``).
    The processors of the omni families have one; for others None is returned.
    """
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    size = defaults.get("videos_kwargs", {}).get("size")
    return dict(size) if size else None


def size_rule_of(
    video_processor: Any, overrides: dict[str, Any], default: dict[str, int] | None = None
) -> SizeRule:
    """The resizing rule of a transformers video processor.

    Args:
        video_processor: The model's video processor, or None.
        overrides: ``mm_processor_kwargs`` for videos.
        default: Size from which transformers starts, if not from the video processor's own.
    """
    if video_processor is None or not getattr(video_processor, "do_resize", False):
        return SizeRule()
    if not overrides.get("do_resize", True):
        return SizeRule()
    own = default or getattr(video_processor, "size", None) or {}
    size = dict(own) | dict(overrides.get("size") or {})
    names = {cls.__name__ for cls in type(video_processor).__mro__}
    if names & {"Qwen3VLVideoProcessor", "Qwen2VLVideoProcessor"}:
        patch, merge = video_processor.patch_size, video_processor.merge_size
        factor = patch * merge
        capped = bool(getattr(video_processor, "cap_pixels_per_frame", None))
        if capped and "Qwen3VLVideoProcessor" in names:
            # This class's cap per frame is not idempotent: transformers could resize frames that
            # have left the decoder at the right size.
            return SizeRule()
        total = 0
        if capped:
            # 90 % of the pixels of ``max_video_tokens`` (transformers,
            # ``Qwen2VLVideoProcessor.resize``).
            total = int(video_processor.max_video_tokens * factor * factor * 0.9)
        return SizeRule(
            kind="qwen3_vl" if "Qwen3VLVideoProcessor" in names else "qwen_vl",
            factor=factor,
            min_pixels=int(overrides.get("min_pixels") or size["shortest_edge"]),
            max_pixels=int(overrides.get("max_pixels") or size["longest_edge"]),
            temporal_factor=video_processor.temporal_patch_size,
            total_pixels=total,
        )
    # A class with a method of its own may keep the aspect ratio all the same, as MiniMax-M3's does;
    # InternVL's method is a copy of the base class's.
    own_method = getattr(type(video_processor), "_preprocess", None)
    stretches = own_method is BaseVideoProcessor._preprocess or "InternVLVideoProcessor" in names
    if stretches and size.get("height") and size.get("width"):
        return SizeRule(kind="fixed", height=int(size["height"]), width=int(size["width"]))
    return SizeRule()
