"""The names inside vLLM that the model families and the frame choice of ``stock`` rely on."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName
from vllm_mm_ext.adapters.names.per_frame_names import PER_FRAME_NAMES

_MODELS = "vllm.model_executor.models"
_QWEN3_VL = f"{_MODELS}.qwen3_vl"
_PROCESSOR = "vllm.multimodal.processing:BaseMultiModalProcessor"

# What ``error_answers`` raises in the place of the plugin's own errors.
_FAILURE = ("message", "parameter", "value")
ERROR_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.exceptions:VLLMError"),
    VllmName("vllm.exceptions:VLLMValidationError", _FAILURE),
    VllmName("vllm.exceptions:VLLMUnprocessableEntityError", _FAILURE),
    VllmName("vllm.exceptions:GracefulHTTPError", ("message", "http_status")),
    VllmName("vllm.exceptions:RetryableRequestError", ("message",)),
    VllmName("vllm.exceptions:VLLMClientError"),
    VllmName("vllm.entrypoints.serve:create_error_response", ("message",)),
    VllmAttributes("vllm.entrypoints.serve.engine.protocol:ErrorResponse", ("error",)),
    VllmAttributes("vllm.entrypoints.serve.engine.protocol:ErrorInfo", ("code", "param")),
)

PROCESSING_INFO = VllmAttributes(
    "vllm.multimodal.processing:BaseProcessingInfo",
    (
        *("allowed_mm_limits", "ctx", "data_parser"),
        *("get_hf_config", "get_hf_processor", "get_tokenizer"),
    ),
)

PROCESSOR_CACHE_NAMES: tuple[Checked, ...] = tuple(
    VllmName(f"vllm.multimodal.cache.base:BaseMultiModalProcessorCache.{name}", parameters)
    for name, parameters in (
        ("is_cached", ("mm_hashes",)),
        ("is_cached_item", ("mm_hash",)),
        ("touch_sender_cache_item", ("mm_hash",)),
        ("get_and_update_item", ("mm_item", "mm_hash")),
        ("release_sender_touches", ()),
    )
)

# Methods that ``processing`` and ``models`` override in vLLM's classes, with their parameters.
_OVERRIDDEN = {
    "_postprocess_hf_mm_data": ("processed_data",),
    "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    "_maybe_apply_prompt_updates": ("mm_items", "mm_res"),
    "get_mrope_input_positions": ("input_tokens", "mm_features"),
    "embed_input_ids": ("input_ids", "multimodal_embeddings", "is_multimodal"),
    "embed_multimodal": (),
    "_process_image_input": ("image_input",),
    "_process_video_input": ("video_input",),
    "get_encoder_cudagraph_config": (),
    "get_input_modality": ("mm_kwargs",),
    "select_encoder_cudagraph_items": ("mm_kwargs", "indices"),
    "encoder_eager_forward": ("mm_kwargs",),
    "get_max_video_tokens": ("seq_len", "mm_counts"),
    "get_num_frames_with_most_features": ("seq_len", "mm_counts"),
}

# Methods of a model that bound its encoder calls and reduce what comes of them.
_ENCODER = (
    "embed_multimodal",
    "_process_image_input",
    "_process_video_input",
    "get_encoder_cudagraph_config",
    "get_input_modality",
    "select_encoder_cudagraph_items",
    "encoder_eager_forward",
)

# What splitting a video into segments overrides and calls in vLLM's base classes.
SEGMENT_NAMES: tuple[Checked, ...] = (
    PROCESSING_INFO,
    VllmName(
        "vllm.multimodal:MULTIMODAL_REGISTRY.register_processor",
        ("processor", "info", "dummy_inputs"),
    ),
    VllmName("vllm.multimodal.processing:InputProcessingContext.get_merged_mm_kwargs", ("kwargs",)),
    VllmAttributes(
        "vllm.multimodal.processing:InputProcessingContext", ("get_mm_config", "model_config")
    ),
    VllmName(
        "vllm.multimodal.processing:BaseProcessingInfo.parse_mm_data", ("mm_data", "validate")
    ),
    VllmName(
        "vllm.multimodal.processing:BaseProcessingInfo.get_mm_max_tokens_per_item",
        ("seq_len", "mm_counts"),
    ),
    VllmName("vllm.config:MultiModalConfig.get_limit_per_prompt", ("modality",)),
    VllmName("vllm.config:MultiModalConfig.is_multimodal_pruning_enabled"),
    VllmAttributes(
        "vllm.config:MultiModalConfig", ("mm_device_do_normalize", "mm_processor_cache_gb")
    ),
    # Requests that are too large for the processor cache.
    *PROCESSOR_CACHE_NAMES,
    VllmName("vllm.multimodal.cache:LruKeyReplicatedSenderCache.invalidate", ("mm_hash",)),
    VllmName(f"{_PROCESSOR}._get_mm_hashes", ("inputs",)),
    VllmName("vllm.multimodal.utils:argsort_mm_positions", ("mm_positions",)),
    VllmName("vllm.multimodal.inputs:MultiModalFlatField.build_elems", ("modality", "key", "data")),
    VllmName(f"{_PROCESSOR}.apply", ("inputs", "timing_ctx")),
    VllmName(f"{_PROCESSOR}._apply_hf_processor_main", ("mm_items", "hf_kwargs")),
    VllmName("vllm.multimodal.parse:VideoProcessorItems", ("data", "metadata")),
    VllmName("vllm.multimodal.parse:MultiModalDataItems"),
    VllmName("vllm.multimodal.processing:PromptReplacement", ("modality", "target", "replacement")),
    VllmName("vllm.multimodal.inputs:MultiModalFieldConfig.batched", ("modality", "keep_on_cpu")),
    VllmName("vllm.multimodal.inputs:MultiModalFieldConfig", ("field", "modality")),
    VllmName("vllm.multimodal.inputs:MultiModalFieldElem", ("data", "field")),
    VllmName("vllm.multimodal.inputs:MultiModalFlatField", ("slices", "dim", "keep_on_cpu")),
    # Records of videos: every processor that splits can write and read them.
    VllmName(f"{_PROCESSOR}._apply_hf_processor", ("inputs", "timing_ctx")),
    VllmName(f"{_PROCESSOR}._get_cache_missing_items", ("cache", "mm_data_items", "mm_hashes")),
    VllmName(
        f"{_PROCESSOR}._get_mm_prompt_updates",
        ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    ),
    VllmName("vllm.multimodal.inputs:MultiModalBatchedField", ("keep_on_cpu",)),
    VllmName("vllm.multimodal.inputs:MultiModalKwargsItem"),
    VllmName("vllm.multimodal.inputs:MultiModalKwargsItems"),
    VllmName("vllm.v1.serial_utils:MsgpackEncoder", ("size_threshold",)),
    VllmName("vllm.v1.serial_utils:MsgpackDecoder", ("t", "share_mem")),
    VllmAttributes("vllm.multimodal.processing.inputs:ProcessorInputs", ("cache", "mm_data_items")),
)

# What the omni processors and models call in vLLM.
_SOUND_TRACK_NAMES: tuple[Checked, ...] = (
    *SEGMENT_NAMES,
    VllmName(f"{_PROCESSOR}._call_hf_processor", ("hf_data", "hf_kwargs")),
    VllmName(f"{_PROCESSOR}._apply_prompt_updates", ("token_ids", "mm_prompt_updates")),
    VllmName(f"{_PROCESSOR}._validate_mm_kwargs", ("mm_kwargs", "mm_item_counts")),
    VllmName(f"{_PROCESSOR}._validate_mm_updates", ("mm_updates", "mm_item_counts")),
    VllmName(f"{_PROCESSOR}._validate_mm_placeholders", ("mm_placeholders", "mm_item_counts")),
    VllmName(
        "vllm.multimodal.processing.processor:PlaceholderFeaturesInfo",
        ("modality", "item_idx", "start_idx", "tokens", "is_embed"),
    ),
    VllmName("vllm.multimodal.utils:get_mm_embedding_modalities"),
    VllmName("vllm.multimodal.utils:set_mm_embedding_modality"),
    VllmName("vllm.utils.gpu_sync_debug:gpu_sync_allowed"),
    VllmName("vllm.multimodal.parse:AudioProcessorItems"),
    VllmName("vllm.multimodal.parse:MultiModalDataItems.get_all_counts"),
    VllmAttributes(
        "vllm.multimodal.processing.processor:MultiModalProcessingResult",
        ("prompt_ids", "prompt_updates"),
    ),
)

# What ``models.reduced_outputs`` overrides beside what the families define themselves.
_REDUCED_NAMES: tuple[Checked, ...] = (
    VllmName(
        f"{_MODELS}.interfaces:SupportsEncoderCudaGraph.postprocess_encoder_output",
        ("outputs", "indices", "per_item_out_tokens", "dest", "clone", "batch_mm_kwargs"),
        by_source=True,
    ),
    VllmAttributes("vllm.config:MultiModalConfig", ("mm_encoder_tp_mode",)),
    VllmAttributes("vllm.config:VllmConfig", ("lora_config",)),
    VllmAttributes("vllm.config:LoRAConfig", ("enable_tower_connector_lora",)),
)


def _sizes(info: str) -> tuple[VllmName, ...]:
    """The methods that say how large an item is profiled for."""
    names = ("get_max_video_tokens", "get_num_frames_with_most_features")
    return _methods("qwen2_vl", info, *names)


def _methods(module: str, class_name: str, *methods: str) -> tuple[VllmName, ...]:
    return tuple(
        VllmName(
            f"{_MODELS}.{module}:{class_name}.{method}",
            _OVERRIDDEN[method],
            by_source=True,
            # The families give the first two other names; they are passed by place.
            passed_on=method == "_postprocess_hf_mm_data",
        )
        for method in methods
    )


def _definitions(module: str, *names: str) -> tuple[VllmName, ...]:
    return tuple(VllmName(f"{_MODELS}.{module}:{name}", by_source=True) for name in names)


FAMILY_NAMES: Mapping[str, tuple[Checked, ...]] = {
    **{family: (*SEGMENT_NAMES, *names) for family, names in PER_FRAME_NAMES.items()},
    "Qwen2.5-Omni": (
        *_SOUND_TRACK_NAMES,
        *_sizes("Qwen2VLProcessingInfo"),
        *_definitions(
            "qwen2_5_omni_thinker",
            "Qwen2_5OmniThinkerDummyInputsBuilder",
            "Qwen2_5OmniThinkerProcessingInfo",
            "check_interleaved_audio_video",
        ),
        VllmName(
            f"{_MODELS}.qwen2_5_omni_thinker:Qwen2_5OmniThinkerProcessingInfo.get_feature_extractor",
            by_source=True,
        ),
        VllmName(
            "vllm.multimodal.processing:InputProcessingContext.call_hf_processor",
            ("hf_processor", "data"),
        ),
        *_methods(
            "qwen2_5_omni_thinker",
            "Qwen2_5OmniThinkerMultiModalProcessor",
            "_postprocess_hf_mm_data",
            "_get_mm_fields_config",
            "_get_prompt_updates",
            "_maybe_apply_prompt_updates",
        ),
        *_methods(
            "qwen2_5_omni_thinker",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            "get_mrope_input_positions",
            "embed_input_ids",
            "embed_multimodal",
        ),
    ),
    "Qwen3-Omni": (
        *_SOUND_TRACK_NAMES,
        *_sizes("Qwen2VLProcessingInfo"),
        *_definitions(
            "qwen3_omni_moe_thinker",
            "Qwen3OmniMoeThinkerDummyInputsBuilder",
            "Qwen3OmniMoeThinkerProcessingInfo",
            "_get_feat_extract_output_lengths",
            "check_interleaved_audio_video",
        ),
        VllmName(
            f"{_MODELS}.qwen3_omni_moe_thinker:Qwen3OmniMoeThinkerProcessingInfo.get_feature_extractor",
            by_source=True,
        ),
        *_methods(
            "qwen3_omni_moe_thinker",
            "Qwen3OmniMoeThinkerMultiModalProcessor",
            "_postprocess_hf_mm_data",
            "_get_prompt_updates",
            "_maybe_apply_prompt_updates",
        ),
        *_methods(
            "qwen3_omni_moe_thinker",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            "get_mrope_input_positions",
            "embed_input_ids",
            "embed_multimodal",
        ),
    ),
    "Qwen2.5-VL": (
        *SEGMENT_NAMES,
        *_REDUCED_NAMES,
        *_sizes("Qwen2VLProcessingInfo"),
        *_definitions("qwen2_5_vl", "Qwen2_5_VLDummyInputsBuilder", "Qwen2_5_VLProcessingInfo"),
        *_methods(
            "qwen2_5_vl",
            "Qwen2_5_VLMultiModalProcessor",
            "_get_mm_fields_config",
            "_get_prompt_updates",
        ),
        *_methods(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "get_mrope_input_positions",
            *_ENCODER,
        ),
    ),
    "Qwen3-VL": (
        *SEGMENT_NAMES,
        *_REDUCED_NAMES,
        *_definitions("qwen3_vl", "Qwen3VLDummyInputsBuilder"),
        *_definitions(
            "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeProcessingInfo"
        ),
        VllmName(f"{_QWEN3_VL}:Qwen3VLProcessingInfo.get_video_processor", by_source=True),
        VllmName(
            f"{_MODELS}.qwen2_vl:Qwen2VLProcessingInfo._merge_and_resolve_mm_processor_kwargs",
            ("mm_kwargs",),
            by_source=True,
        ),
        VllmName(
            f"{_QWEN3_VL}:Qwen3VLMultiModalProcessor.get_video_repl",
            (
                "tokens_per_frame",
                "timestamps",
                "tokenizer",
                "vision_start_token_id",
                "vision_end_token_id",
                "video_token_id",
                "select_token_id",
            ),
            by_source=True,
        ),
        VllmName(
            f"{_QWEN3_VL}:Qwen3VLMultiModalProcessor._get_per_video_kwargs",
            ("kwargs",),
            by_source=True,
        ),
        VllmName(
            f"{_QWEN3_VL}:Qwen3VLMultiModalProcessor._expands_only_video_token",
            ("hf_processor",),
            by_source=True,
        ),
        VllmName(
            f"{_QWEN3_VL}:Qwen3VLProcessingInfo._calculate_timestamps",
            ("indices", "video_fps", "merge_size"),
            by_source=True,
        ),
        VllmName(
            f"{_QWEN3_VL}:Qwen3VLProcessingInfo._get_video_second_idx",
            ("metadata", "do_sample_frames"),
            by_source=True,
        ),
        *_methods(
            "qwen3_vl",
            "Qwen3VLMultiModalProcessor",
            "_get_mm_fields_config",
            "_get_prompt_updates",
        ),
        *_methods(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "get_mrope_input_positions",
            *_ENCODER,
        ),
    ),
}

_LOADER = "vllm.multimodal.video:VideoLoader"

# Sampling policy ``stock``: the frames a loader of vLLM's would read.
STOCK_CHOICE_NAMES = (
    VllmName("vllm.multimodal.video:VIDEO_LOADER_REGISTRY.load", ("cls_name",)),
    VllmName(f"{_LOADER}.compute_frames_index_to_sample", ("source", "target")),
    VllmName(f"{_LOADER}._prepare_source", ("source",)),
    VllmName(f"{_LOADER}.create_hf_metadata", ("source", "valid_frame_indices", "video_backend")),
    VllmName("vllm.multimodal.video_decoders:VideoSourceMetadata"),
    VllmName("vllm.multimodal.video_decoders:VideoTargetMetadata"),
)
