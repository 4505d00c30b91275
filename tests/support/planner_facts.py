"""A model of the reference design's sizes, for tests of the planner."""

from __future__ import annotations

from vllm_mm_ext.planner.model_facts import EncoderFacts, ModelFacts, TextFacts

VIT_L = EncoderFacts("vision", 24, 1024, 4096, 16, 304_000_000, 588, 1, 4096)
LLAMA_70B = ModelFacts(
    name="llama-70b",
    architecture="LlamaForCausalLM",
    family="composer",
    dtype_bytes=2,
    weight_bytes=140 * 10**9,
    text=TextFacts(80, 8192, 28672, 64, 8, 128, 128_256, 0, 0, 70 * 10**9, 70 * 10**9),
    vision=VIT_L,
    audio=None,
    max_context=131_072,
    kv_dtype_bytes=2,
)
