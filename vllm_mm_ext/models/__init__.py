"""Model classes, and which of vLLM's architectures they replace."""

OVERRIDES: dict[str, str] = {
    "Qwen2_5OmniModel": "vllm_mm_ext.models.qwen2_5_omni:Qwen2_5OmniForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": (
        "vllm_mm_ext.models.qwen2_5_omni:Qwen2_5OmniForConditionalGeneration"
    ),
}
"""Architecture to ``module:Class``, imported by vLLM only when the architecture is served."""
