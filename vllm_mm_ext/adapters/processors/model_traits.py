"""Reads from vLLM's multimodal processor what the model wants from the front-end."""

from __future__ import annotations

import logging
from typing import Any

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SizeRule

logger = logging.getLogger("vllm.mm_ext")


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
        overrides = mm_processor.info.ctx.get_merged_mm_kwargs({})
        size_rule = size_rule_of(video_processor, overrides, size_default_of(processor))
        return ModelTraits(
            size_rule=size_rule,
            frame_multiple=int(getattr(video_processor, "temporal_patch_size", 1) or 1),
            audio_rate=vllm_compat.audio_resampler_rate(mm_processor),
            hears_video=bool(getattr(mm_processor, "hears_video", False)),
            sound_token=getattr(mm_processor, "sound_token_id", None),
            default_reduction=getattr(mm_processor, "checkpoint_reduction", None),
            trained=getattr(mm_processor, "trained", None),
        )
    except Exception as error:
        logger.warning("mm_ext: model traits unknown, frames keep their own size: %s", error)
        return ModelTraits(audio_rate=None)


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
        overrides: The server's ``--mm-processor-kwargs``. If they set a size, vLLM starts from the
            video processor's own size instead of ``default``.
        default: Return value of ``size_default_of``.
    """
    if video_processor is None or not getattr(video_processor, "do_resize", False):
        return SizeRule()
    size = dict(getattr(video_processor, "size", None) or {}) | dict(overrides.get("size") or {})
    if default and not overrides.keys() & {"size", "min_pixels", "max_pixels"}:
        size = default
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
    if {"height", "width"} <= size.keys() and size["height"] and size["width"]:
        return SizeRule(kind="fixed", height=int(size["height"]), width=int(size["width"]))
    return SizeRule()
