"""Why each change to vLLM is made, which vLLM needs it, and when it can go.

``patches`` makes the changes and puts them on record; ``vllm-mm doctor --patches`` prints both. A
test compares this list with what all features really change.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm_mm_ext.adapters.patch_entry import Patch
from vllm_mm_ext.adapters.serving.serving_patches import SERVING_PATCHES

_RENDERER = "vllm.renderers.base:BaseRenderer"
_SPEECH = "vllm.entrypoints.speech_to_text"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MODELS = "vllm.model_executor.models:ModelRegistry.models"
_KEPT = "vllm.config:ModelConfig.mm_ext"

_SPLITS = "Videos become segments, their tokens are reduced, and frame times are exact."
_SPLITS_UNTIL = "vLLM's own model of the family cuts videos into items that it encodes one by one"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "configuration",
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config",),
        "additional_config is checked before the engine starts, and travels on to processors.",
        "vLLM gives multimodal processors the whole configuration, and plugins a hook to check it",
    ),
    Patch(
        "configuration",
        (f"{_KEPT}_settings", f"{_KEPT}_service", f"{_KEPT}_offline"),
        "vLLM hands multimodal processors and their profiling nothing but the ModelConfig.",
        "vLLM gives multimodal processors the whole configuration",
        later=True,
    ),
    Patch(
        "front-end settings",
        (f"{_RENDERER}.__init__", f"{_RENDERER}.shutdown"),
        "Each engine has a media front-end with its settings, which ends with the engine.",
        "vLLM tells plugins when an engine's renderer is made and shut down",
    ),
    Patch(
        "media connector",
        ("vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY",),
        "The plugin's connector is registered.",
        "never: this is how vLLM takes connectors",
    ),
    Patch(
        "media connector",
        ("vllm.envs:environment_variables",),
        "The plugin's connector is the default where VLLM_MEDIA_CONNECTOR is not set.",
        "a plugin can name the default connector",
    ),
    Patch(
        "video loader",
        ("vllm.multimodal.video:VIDEO_LOADER_REGISTRY",),
        "The plugin's loader is registered.",
        "never: this is how vLLM takes video loaders",
    ),
    Patch(
        "video loader",
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config",),
        "Unknown or contradictory options of the loader stop the server before it starts.",
        "vLLM lets a video loader check media_io_kwargs at start-up",
    ),
    Patch(
        "digest hashing",
        ("vllm.multimodal.hasher:MultiModalHasher.serialize_item",),
        "A waveform whose digest is known is not read again to hash it.",
        "vLLM's hasher asks an item for its digest, as it does for MediaWithBytes",
    ),
    Patch(
        "KV blocks",
        (f"{_SCHEDULER}.__init__",),
        "The KV cache gets the plugin's block pool, which keeps media by what they cost.",
        "vLLM's configuration can name the class of the block pool",
    ),
    Patch(
        "KV blocks",
        ("vllm.v1.core.kv_cache_coordinator:BlockPool",),
        "vLLM's coordinators build BlockPool by this name; it is changed while one is built.",
        "vLLM's configuration can name the class of the block pool",
        later=True,
    ),
    Patch(
        "KV blocks",
        ("vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",),
        "The block pool learns which cached blocks a request found.",
        "vLLM tells the block pool of cache hits with the request that has them",
    ),
    Patch(
        "KV blocks",
        (f"{_SCHEDULER}._preempt_request",),
        "Blocks of a request that is preempted in the pass that scheduled it are never computed; "
        "vLLM leaves them in the prefix cache.",
        "vLLM takes blocks out of the prefix cache that will not be computed",
    ),
    Patch(
        "KV control",
        ("vllm.v1.engine.core:EngineCore.mm_ext_kv",),
        "API servers call it to pin and release conversations in the engine.",
        "plugins can add utility calls to the engine",
    ),
    Patch(
        "operator page",
        (
            "vllm.v1.engine.core:EngineCore.mm_ext_sight",
            "vllm.v1.engine.core:EngineCore.preprocess_add_request",
            f"{_SPEECH}.transcription.serving:OpenAIServingTranscription.create_transcription",
            f"{_SPEECH}.translation.serving:OpenAIServingTranslation.create_translation",
        ),
        "API servers list what an engine's caches hold, and take media down, files that came to be "
        "transcribed too. Meanwhile no request gets its inputs.",
        "plugins can add utility calls to the engine, and vLLM's connector reads all files",
    ),
    *(
        Patch(family, (_MODELS,), _SPLITS, _SPLITS_UNTIL)
        for family in (
            *("Qwen2.5-Omni", "Qwen3-Omni", "Qwen2.5-VL", "Qwen3-VL"),
            *("LLaVA-OneVision", "InternVL"),
        )
    ),
    *(
        Patch(
            family,
            (f"vllm.model_executor.models.{module}:check_interleaved_audio_video",),
            "vLLM asks for each token whether video and sound alternate, which costs a fifth of a "
            "live session's unit; embeddings in the order of the prompt need no answer.",
            "vLLM's search does not ask for each token by itself",
            later=True,
        )
        for family, module in (
            ("Qwen2.5-Omni", "qwen2_5_omni_thinker"),
            ("Qwen3-Omni", "qwen3_omni_moe_thinker"),
        )
    ),
    Patch(
        "Composer",
        (_MODELS,),
        "The composer's architecture is registered.",
        "never: this is how vLLM takes models",
    ),
    Patch(
        "raw embeddings",
        ("vllm.config.vllm:VllmConfig._resolve_mm_embedding_inputs",),
        "vLLM lets clients send embeddings wherever an EC connector reads; the host tier reads "
        "only what it wrote.",
        "an EC connector can say that it needs no embeddings from clients",
    ),
    Patch(
        "raw embeddings",
        ("vllm.config:VllmConfig.ec_transfer_config",),
        "vLLM's rule for embeddings sees no EC connector while it is applied.",
        "an EC connector can say that it needs no embeddings from clients",
        later=True,
    ),
    Patch(
        "text-only servers",
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config",),
        "Of a server that takes no media, the host tier of the encoder cache is left out.",
        "vLLM starts no EC connector in a server that takes no media",
    ),
    Patch(
        "text-only servers",
        ("vllm.config:VllmConfig.ec_transfer_config",),
        "The configuration of such a server has no EC connector.",
        "vLLM starts no EC connector in a server that takes no media",
        later=True,
    ),
    Patch(
        "encoder cache",
        ("vllm.config:ECTransferConfig.mm_ext_host_tier",),
        "The device tier finds the host tier of its engine, which vLLM makes first.",
        "vLLM gives the encoder cache manager the engine's EC connector",
        later=True,
    ),
    *SERVING_PATCHES,
    Patch(
        "media affinity",
        ("vllm.v1.engine.core_client:DPLBAsyncMPClient.get_core_engine_for_request",),
        "Requests about the same media go to the same data-parallel rank.",
        "vLLM routes by content, or lets a plugin choose the rank",
    ),
    Patch(
        "live sessions",
        ("uvicorn.config:Config.ws_per_message_deflate",),
        "A few compressed bytes of a client could halt the event loop and fill the memory.",
        "vLLM has a flag for the compression of WebSocket messages, or uvicorn bounds what it "
        "inflates ahead of the application",
        later=True,
    ),
    Patch(
        "engine figures",
        tuple(
            f"{_SCHEDULER}.{method}"
            for method in ("__init__", "schedule", "update_from_output", "shutdown")
        ),
        "Metrics tell what steps do, whatever scheduler runs.",
        "vLLM lets a plugin add to the statistics of a step",
    ),
    Patch(
        "engine figures",
        (f"{_SCHEDULER}.mm_ext_steps",),
        "Each scheduler has its own counts.",
        "vLLM lets a plugin add to the statistics of a step",
        later=True,
    ),
)


def is_made(patch: Patch, places: Iterable[str]) -> bool:
    """Whether all targets of a change are among the places on record for its feature.

    Args:
        patch: The change.
        places: From the ledger; ``table[key]`` is an entry of a table.
    """
    return set(patch.targets) <= {place.partition("[")[0] for place in places}
