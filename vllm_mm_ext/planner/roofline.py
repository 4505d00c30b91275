"""Rates of a model on a GPU that nobody measured: from its sizes and the GPU's figures.

Arithmetic as in Pope et al., Efficiently Scaling Transformer Inference (arXiv 2211.05102): two
operations for each parameter and token, four for each pair that attends, layer and value of a head,
and every step reads all weights once, and the KV cache of what decodes. Of a mixture of experts, a
step that only decodes reads the experts that its tokens are expected to choose between them.
"""

from __future__ import annotations

from vllm_mm_ext.planner.gpu_facts import GpuFacts
from vllm_mm_ext.planner.host_work import PICTURE
from vllm_mm_ext.planner.model_facts import EncoderFacts, ModelFacts, TextFacts
from vllm_mm_ext.planner.rates import HostCosts, Rates, RatesRange
from vllm_mm_ext.planner.step_costs import StepCosts

# Shares of a GPU's figures that large matrices, attention and reading of memory reach in vLLM.
_MATRIX, _ATTENTION, _MEMORY = 0.5, 0.3, 0.75
# Seconds of a step that no figure of the GPU explains: scheduling, launches, sampling, and what
# steps outside of the graphs captured for decoding take more; and of an encoder input on its
# way to the workers, 2 kB at a few GB/s.
_STEP_S, _SEQUENCE_S, _PROMPT_S, _ENCODE_S, _ITEM_S = 2e-3, 2e-5, 3e-3, 4e-3, 2e-4
_INPUT_S = 5e-7
# Of layers with windows, about so many attend to whole pictures (Qwen2.5-VL: 4 of 32).
_WHOLE_LAYERS = 1 / 8
# About what `vllm-mm calibrate` finds on one core of an AMD EPYC (Zen 4, 2.6 GHz).
HOST = HostCosts(
    request=7e-3,
    medium=1e-3,
    sent_input=5e-6,
    token=3e-4,
    probe=5e-3,
    decode=2e-3,
    megapixel={"h264": 5e-4, "hevc": 8e-4, "vp9": 7e-4, "av1": 6e-4, "mpeg4": 5e-4, PICTURE: 5e-3},
    frame_megapixel=5e-3,
    sound_second=4e-3,
    preprocess=1e-3,
    preprocess_input=5e-6,
    preprocess_sound_second=7e-4,
    decode_threads=1.0,
    engine_threads=1.0,
    cached_medium=6e-3,
    cached_input=2e-7,
)
# How far off such rates may be: steps and the host.
_STEP_RANGE, _HOST_RANGE = (0.6, 2.0), (0.4, 2.5)


def roofline(
    facts: ModelFacts, gpu: GpuFacts, tp: int, dp: int = 1, *, decodes: int = 1
) -> RatesRange | None:
    """Rates of a model on a GPU, with the wide range that they have.

    Args:
        facts: The model.
        gpu: Each GPU.
        tp: GPUs of a replica.
        dp: Replicas, which share the experts of a mixture.
        decodes: Requests of a replica that decode at a time.

    Returns:
        The rates; None where the GPU's figures are not known, where there is none, and for
        quantised weights, which are read and multiplied at other rates.
    """
    if gpu.bf16_flops is None or gpu.bandwidth is None or facts.quantization:
        return None
    text = facts.text
    flops, bytes_s = gpu.bf16_flops * tp, gpu.bandwidth * _MEMORY
    matrix, attention = flops * _MATRIX, flops * _ATTENTION
    head = text.vocabulary * text.hidden
    experts = facts.expert_bytes / (tp * dp) / bytes_s
    dense = (text.parameters * facts.dtype_bytes - facts.expert_bytes) / tp / bytes_s
    chosen = _chosen(text, decodes * dp) * experts
    vision, vision_pairs = _encoder(facts.vision, matrix, attention)
    audio, _ = _encoder(facts.audio, matrix, attention)
    step = StepCosts(
        step=_STEP_S + dense + chosen,
        decodes=_SEQUENCE_S + 2 * text.active_parameters / matrix,
        decode_context=facts.kv_bytes_per_token(tp) / bytes_s,
        # The many tokens of a prompt choose all experts.
        prompts=_PROMPT_S + experts - chosen,
        # Logits are computed of a prompt's last token alone.
        prefill=2 * (text.active_parameters - head) / matrix,
        pairs=4 * text.layers * text.heads * text.head_dim / attention,
        encodes=_ENCODE_S,
        items=_ITEM_S,
        vision=vision,
        vision_pairs=vision_pairs,
        audio=audio,
        inputs=_INPUT_S,
    )
    return RatesRange.around(Rates(step, HOST), step=_STEP_RANGE, host=_HOST_RANGE)


def _chosen(text: TextFacts, tokens: int) -> float:
    """Share of a mixture's experts that at least one of so many tokens is expected to choose."""
    if not text.experts:
        return 0.0
    return 1 - (1 - text.experts_per_token / text.experts) ** tokens


def _encoder(facts: EncoderFacts | None, matrix: float, attention: float) -> tuple[float, float]:
    """Seconds of a position, and of a pair of them."""
    if facts is None:
        return 0.0, 0.0
    pair = 4 * facts.layers * facts.hidden / attention
    position = 2 * facts.parameters / matrix
    if facts.attention_span:
        return position + pair * facts.attention_span, pair * _WHOLE_LAYERS
    return position, pair
