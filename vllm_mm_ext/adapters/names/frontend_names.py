"""The names inside vLLM that the media front-end and its connector rely on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.base_names import ERROR_NAMES, PROCESSING_INFO, STOCK_CHOICE_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_CONNECTOR = "vllm.multimodal.media:MediaConnector"
_RENDERER = "vllm.renderers.base:BaseRenderer"

# What the front-end of an engine is made from: its renderer, and what the model's processor wants.
FRONTEND_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_RENDERER}.__init__", ("config", "tokenizer")),
    VllmName(f"{_RENDERER}.shutdown", ("self",)),
    VllmName("vllm.multimodal.parse:MultiModalDataParser"),
    VllmAttributes(_RENDERER, ("config", "mm_processor")),
    VllmAttributes("vllm.config:VllmConfig", ("additional_config", "model_config")),
    VllmAttributes("vllm.config:ModelConfig", ("allowed_media_domains",)),
    VllmAttributes("vllm.multimodal.processing:BaseMultiModalProcessor", ("info",)),
    PROCESSING_INFO,
    VllmName("vllm.multimodal.processing:InputProcessingContext.get_merged_mm_kwargs", ("kwargs",)),
    VllmAttributes("vllm.multimodal.parse:MultiModalDataParser", ("audio_resampler",)),
    VllmAttributes("vllm.multimodal.audio:AudioResampler", ("target_sr",)),
    VllmName("vllm.version:__version__"),
    *(
        VllmName(f"vllm.envs:VLLM_{variable}")
        for variable in (
            "MAX_AUDIO_DECODE_BYTES",
            "MAX_AUDIO_DECODE_DURATION_S",
            "MAX_IMAGE_PIXELS",
            "MAX_MEDIA_DOWNLOAD_SIZE_MB",
            "MEDIA_CACHE",
            "MEDIA_CACHE_MAX_SIZE_MB",
            "MEDIA_CACHE_TTL_HOURS",
            "MEDIA_FETCH_MAX_RETRIES",
            "MEDIA_URL_ALLOW_REDIRECTS",
        )
    ),
)

CONNECTOR_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY.register", ("name",)),
    VllmName("vllm.envs:environment_variables"),
    VllmName(
        f"{_CONNECTOR}.__init__",
        ("media_io_kwargs", "allowed_local_media_path", "allowed_media_domains"),
        # Whatever else it is given may be a limit that has to hold. The budgets came with vLLM
        # 0.33.
        optional=("connection", "decoded_budget", "download_budget"),
    ),
    *(
        VllmName(
            f"vllm.connections:HTTPConnection.{method}",
            ("url", "timeout", "max_bytes"),
            passed_on=True,
        )
        for method in ("get_bytes", "async_get_bytes")
    ),
    VllmName("vllm.multimodal.media.connector:_wrap_media_fetch_error", ("url", "exc")),
    VllmName(f"{_CONNECTOR}.fetch_video_async", ("video_url", "image_mode", "video_processor")),
    VllmName(f"{_CONNECTOR}.fetch_audio_async", ("audio_url",)),
    VllmName(f"{_CONNECTOR}.fetch_video", ("video_url", "image_mode", "video_processor")),
    VllmName(f"{_CONNECTOR}.fetch_audio", ("audio_url",)),
    VllmName(f"{_CONNECTOR}.fetch_image_async", ("image_url",), passed_on=True),
    VllmName(f"{_CONNECTOR}.fetch_image", ("image_url",), passed_on=True),
    VllmName(f"{_CONNECTOR}._load_data_url", ("url", "media_io")),
    VllmName("vllm.multimodal.media.base:MediaIO.load_base64", ("media_type", "data")),
    VllmName("vllm.multimodal.media.base:MediaWithBytes", ("media", "original_bytes")),
    VllmName("vllm.multimodal.video:get_video_loader_backend_for_processor", ("video_processor",)),
    VllmName(f"{_CONNECTOR}.load_from_url", ("url", "media_io"), passed_on=True),
    VllmName(f"{_CONNECTOR}.load_from_url_async", ("url", "media_io"), passed_on=True),
    VllmName("vllm.multimodal.media.audio:AudioMediaIO.get_max_bytes"),
    VllmName("vllm.multimodal.media.audio:AudioMediaIO.load_bytes", ("data",)),
    VllmName("vllm.multimodal.media.audio:AudioMediaIO.load_file", ("filepath",)),
    VllmAttributes(
        _CONNECTOR,
        ("allowed_local_media_path", "allowed_media_domains", "connection", "media_io_kwargs"),
    ),
    *(
        VllmName(f"vllm.envs:VLLM_{variable}")
        for variable in (
            "AUDIO_FETCH_TIMEOUT",
            "MEDIA_CONNECTOR",
            "VIDEO_FETCH_TIMEOUT",
            "VIDEO_LOADER_BACKEND",
        )
    ),
    *STOCK_CHOICE_NAMES,
    *ERROR_NAMES,
)
