"""The names inside vLLM that the composer is built from."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.base_names import SEGMENT_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_MODELS = "vllm.model_executor.models"
_PROCESSING = "vllm.multimodal.processing"
_ATTENTION = "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention"

COMPOSER_NAMES: tuple[Checked, ...] = (
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
    *(
        VllmName(f"{_MODELS}.interfaces:{name}", by_source=True)
        for name in (
            "MultiModalEmbeddings",
            "SupportsLoRA",
            "SupportsMultiModal._mark_language_model",
            "SupportsMultiModal._mark_tower_model",
            "SupportsMultiModal.configure_mm_token_handling",
            "SupportsPP",
        )
    ),
    *(
        VllmName(f"{_MODELS}.{name}", by_source=True)
        for name in (
            "module_mapping:MultiModelKeys",
            "utils:AutoWeightsLoader.load_weights",
            "utils:WeightsMapper",
            "utils:maybe_prefix",
        )
    ),
    VllmAttributes(
        f"{_MODELS}.whisper:WhisperEncoder",
        ("conv1", "conv2", "embed_positions", "layer_norm", "layers", "max_source_positions"),
        by_source=True,
    ),
    VllmAttributes(f"{_MODELS}.whisper:WhisperEncoderLayer", ("self_attn",), by_source=True),
    VllmAttributes(f"{_MODELS}.whisper:WhisperAttention", ("attn",), by_source=True),
    VllmName("vllm.sequence:IntermediateTensors", by_source=True),
    VllmName("vllm.distributed:get_tensor_model_parallel_world_size"),
    VllmName("vllm.config.multimodal:MultiModalDummyOptions"),
    VllmName("vllm.multimodal.parse:AudioProcessorItems"),
    VllmAttributes(f"{_PROCESSING}:BaseProcessingInfo", ("_get_expected_hidden_size",)),
    VllmAttributes(
        f"{_PROCESSING}:BaseDummyInputsBuilder", ("_get_dummy_audios", "_get_dummy_videos", "info")
    ),
    VllmName("vllm.config:VllmConfig.with_hf_config", ("hf_config",)),
    VllmAttributes("vllm.config:VllmConfig", ("model_config", "quant_config")),
    VllmAttributes("vllm.config:ModelConfig", ("multimodal_config",)),
)
