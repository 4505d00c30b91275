"""The names inside vLLM that LLaVA-OneVision and InternVL in segments rely on."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_MODELS = "vllm.model_executor.models"
_LLAVA = f"{_MODELS}.llava_onevision:LlavaOnevision"
_INTERN = f"{_MODELS}.interns1:InternS1"


def _family(prefix: str) -> tuple[VllmName, ...]:
    """What both families override: sizes of items, inputs and prompt of a video, embeddings."""
    methods = {
        "ProcessingInfo.get_num_frames_with_most_features": ("seq_len", "mm_counts"),
        "MultiModalProcessor._apply_hf_processor_main": ("mm_items", "hf_kwargs"),
        "MultiModalProcessor._get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
        "MultiModalProcessor._get_prompt_updates": (
            "mm_items",
            "hf_processor_mm_kwargs",
            "out_mm_kwargs",
        ),
        "DummyInputsBuilder": (),
        "ForConditionalGeneration.embed_multimodal": (),
    }
    return tuple(
        VllmName(f"{prefix}{name}", parameters, by_source=True)
        for name, parameters in methods.items()
    )


PER_FRAME_NAMES: Mapping[str, tuple[Checked, ...]] = {
    "LLaVA-OneVision": (
        *_family(_LLAVA),
        VllmName(
            f"{_LLAVA}ProcessingInfo.get_num_video_tokens",
            ("image_width", "image_height", "num_frames"),
            by_source=True,
        ),
        *(
            VllmName(
                f"{_LLAVA}ForConditionalGeneration.{method}",
                ("vision_tower", "pixel_values"),
                by_source=True,
            )
            for method in ("_image_pixels_to_features", "_video_pixels_to_features")
        ),
        VllmName(
            f"{_LLAVA}ForConditionalGeneration._process_video_pixels", ("inputs",), by_source=True
        ),
        VllmAttributes(f"{_LLAVA}ForConditionalGeneration", ("image_newline",), by_source=True),
    ),
    "InternVL": (
        *_family(_INTERN),
        VllmName(
            f"{_INTERN}ForConditionalGeneration.extract_feature", ("pixel_values",), by_source=True
        ),
        VllmName("vllm.multimodal.processing:cached_encode", ("tokenizer", "text")),
        VllmName(
            "vllm.multimodal.processing:PromptUpdateDetails.select_token_id",
            ("seq", "embed_token_id"),
        ),
    ),
}
