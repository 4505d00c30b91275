"""Model classes, and which of vLLM's architectures they replace."""

_PACKAGE = "vllm_mm_ext.models"
_QWEN2_5_OMNI = f"{_PACKAGE}.qwen2_5_omni:Qwen2_5OmniForConditionalGeneration"

OVERRIDES: dict[str, str] = {
    "Qwen2_5OmniModel": _QWEN2_5_OMNI,
    "Qwen2_5OmniForConditionalGeneration": _QWEN2_5_OMNI,
    "Qwen3OmniMoeForConditionalGeneration": (
        f"{_PACKAGE}.qwen3_omni:Qwen3OmniMoeForConditionalGeneration"
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        f"{_PACKAGE}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration"
    ),
}
"""Architecture to ``module:Class``, imported by vLLM only when the architecture is served."""
