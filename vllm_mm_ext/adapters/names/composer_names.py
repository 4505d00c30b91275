"""The names inside vLLM that the composer is built from."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.base_names import SEGMENT_NAMES
from vllm_mm_ext.adapters.names.names_check import VllmName

_MODELS = "vllm.model_executor.models"
_PROCESSING = "vllm.multimodal.processing"
_ATTENTION = "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention"

COMPOSER_NAMES = (
    *SEGMENT_NAMES,
    VllmName(f"{_PROCESSING}:PromptUpdateDetails.select_token_ids", ("seq", "embed_token_ids")),
    VllmName(
        f"{_PROCESSING}:BaseProcessingInfo.get_mm_max_tokens_per_item", ("seq_len", "mm_counts")
    ),
    VllmName(
        f"{_PROCESSING}:BaseDummyInputsBuilder.get_dummy_mm_data",
        ("seq_len", "mm_counts", "mm_options"),
    ),
    VllmName(f"{_MODELS}.siglip:SiglipVisionModel.forward", ("pixel_values",), by_source=True),
    VllmName(
        f"{_MODELS}.whisper:WhisperEncoder.__init__", ("vllm_config", "enable_pp"), by_source=True
    ),
    VllmName(
        f"{_MODELS}.whisper:WhisperEncoderLayer.forward",
        ("hidden_states", "cu_seqlens", "max_seqlen", "sequence_lengths"),
        by_source=True,
    ),
    *(
        VllmName(f"{_ATTENTION}.{method}", parameters, by_source=True)
        for method, parameters in (
            ("compute_max_seqlen", ("attn_backend", "cu_seqlens")),
            ("maybe_compute_seq_lens", ("attn_backend", "cu_seqlens", "device")),
            (
                "maybe_recompute_cu_seqlens",
                ("attn_backend", "cu_seqlens", "hidden_size", "tp_size", "device"),
            ),
        )
    ),
    VllmName(
        f"{_MODELS}.utils:init_vllm_registered_model",
        ("vllm_config", "prefix", "hf_config"),
        by_source=True,
    ),
    VllmName(
        "vllm.utils.multi_stream_utils:maybe_execute_in_parallel",
        ("fn0", "fn1", "event0", "event1", "aux_stream"),
        by_source=True,
    ),
    VllmName("vllm.utils.torch_utils:aux_stream", by_source=True),
)
