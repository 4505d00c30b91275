"""Model classes, and which architectures they serve."""

_PACKAGE = "vllm_mm_ext.adapters.models"
_QWEN2_5_OMNI = f"{_PACKAGE}.qwen2_5_omni:Qwen2_5OmniForConditionalGeneration"

OVERRIDES: dict[str, dict[str, str]] = {
    "Qwen2.5-Omni": {
        "Qwen2_5OmniModel": _QWEN2_5_OMNI,
        "Qwen2_5OmniForConditionalGeneration": _QWEN2_5_OMNI,
    },
    "Qwen3-Omni": {
        "Qwen3OmniMoeForConditionalGeneration": (
            f"{_PACKAGE}.qwen3_omni:Qwen3OmniMoeForConditionalGeneration"
        ),
    },
    "Qwen2.5-VL": {
        "Qwen2_5_VLForConditionalGeneration": (
            f"{_PACKAGE}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration"
        ),
    },
    "Qwen3-VL": {
        "Qwen3VLForConditionalGeneration": f"{_PACKAGE}.qwen3_vl:Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration": (
            f"{_PACKAGE}.qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration"
        ),
    },
    "LLaVA-OneVision": {
        "LlavaOnevisionForConditionalGeneration": (
            f"{_PACKAGE}.llava_onevision:LlavaOnevisionForConditionalGeneration"
        ),
    },
    "InternVL": {
        "InternVLForConditionalGeneration": f"{_PACKAGE}.internvl:InternVLForConditionalGeneration",
    },
}
"""Family to its architectures, each with the ``module:Class`` that replaces vLLM's. Imported by
vLLM only when the architecture is served."""

COMPOSER: dict[str, str] = {
    "MMExtComposerForConditionalGeneration": (
        f"{_PACKAGE}.composer:MMExtComposerForConditionalGeneration"
    ),
}
"""The architecture that the plugin adds, with its ``module:Class``."""
