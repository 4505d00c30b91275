"""Entry points: what the plugin registers in a vLLM process, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.client_id_wrappers import CLIENT_ID_FEATURE
from vllm_mm_ext.adapters.encoder_cache.shared_names import SHARED_OUTPUTS_FEATURE
from vllm_mm_ext.adapters.encoder_cache.startup import ENCODER_CACHE_FEATURES
from vllm_mm_ext.adapters.live.live_feature import LIVE_FEATURE
from vllm_mm_ext.adapters.models import COMPOSER, OVERRIDES
from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.base_names import FAMILY_NAMES
from vllm_mm_ext.adapters.names.composer_names import COMPOSER_NAMES
from vllm_mm_ext.adapters.names.frontend_names import CONNECTOR_NAMES, FRONTEND_NAMES
from vllm_mm_ext.adapters.names.kv_names import CONTROL_NAMES, POOL_NAMES
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.serving.encoders_apart_feature import ENCODERS_APART_FEATURE
from vllm_mm_ext.adapters.serving.routing import ROUTING_FEATURE
from vllm_mm_ext.adapters.serving.serving_features import SERVING_FEATURES
from vllm_mm_ext.adapters.sight.engine_watch import ENGINE_FIGURES_FEATURE
from vllm_mm_ext.adapters.sight.sight_feature import SIGHT_FEATURE
from vllm_mm_ext.adapters.vllm_compat import Feature, FeatureStatus

if TYPE_CHECKING:
    from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin
    from vllm_mm_ext.config.media_settings import MediaConfig
    from vllm_mm_ext.config.root import MMExtConfig
    from vllm_mm_ext.media.traits import ModelTraits


def _install_config() -> None:
    vllm_compat.around_engine_config(read_config)


def _install_frontend() -> None:
    from vllm_mm_ext.adapters.runtime import detach_runtime

    vllm_compat.around_renderer(attach, detach_runtime)


def _install_connector() -> None:
    from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector

    vllm_compat.register_connector(MMExtMediaConnector)


def _install_loader() -> None:
    from vllm_mm_ext.adapters.media.video_loader import MMExtVideoLoader, check_server_kwargs

    vllm_compat.register_video_loader(MMExtVideoLoader)
    vllm_compat.before_engine_config(check_server_kwargs)


def _probe(name: str) -> Callable[[], None]:
    def probe() -> None:
        from vllm_mm_ext.adapters import probes

        getattr(probes, name)()

    return probe


def _install_hashing() -> None:
    from vllm_mm_ext.media.payload import known_digest

    vllm_compat.hash_by_digest(known_digest)


def _install_kv() -> None:
    from vllm_mm_ext.adapters.kv import install as adapter

    adapter.install()


def _install_kv_control() -> None:
    from vllm_mm_ext.adapters.kv import install as adapter

    adapter.install_control()


def _install_composer() -> None:
    from vllm_mm_ext.composer.configuration import register_config

    register_config()
    vllm_compat.override_models(COMPOSER)


def read_config(additional_config: object) -> MMExtConfig:
    """The plugin's settings at start-up, with a warning about keys that it does not look at.

    Args:
        additional_config: vLLM's setting of that name.
    """
    from vllm_mm_ext.config.root import MMExtConfig, near_misses

    for key in near_misses(additional_config):
        vllm_compat.logger.warning(
            "mm_ext: %r in additional_config has no effect; the plugin reads the mapping under the "
            "key 'mm_ext'",
            key,
        )
    return MMExtConfig.from_additional_config(additional_config)


def attach(renderer: Any) -> None:
    """Start the front-end of a renderer of vLLM's, with its server's settings and model."""
    from vllm_mm_ext.adapters.encoder_cache.instance_plan import kept_plan
    from vllm_mm_ext.adapters.media.media_records import records_for
    from vllm_mm_ext.adapters.media.request_budgets import warn_of_decode_bound
    from vllm_mm_ext.adapters.processors.model_traits import read_traits
    from vllm_mm_ext.adapters.runtime import attach_runtime
    from vllm_mm_ext.adapters.serving.encoder_asks import EncoderAsks
    from vllm_mm_ext.config.root import MMExtConfig

    if renderer.mm_processor is not None:
        config = MMExtConfig.from_additional_config(renderer.config.additional_config)
        domains = renderer.config.model_config.allowed_media_domains
        warn_of_private_addresses(config.media, domains)
        warn_of_decode_bound(config.media.decode)
        traits = read_traits(renderer.mm_processor)
        warn_of_whole_videos(config, traits)
        runtime = attach_runtime(config, traits, renderer)
        if vllm_compat.is_offline(renderer.config.model_config):
            runtime.wait_without_end()
        plan = kept_plan(renderer.config.model_config)
        if plan is not None and config.encoder_cache.encoders:
            runtime.encoder_asks = EncoderAsks(
                config.encoder_cache.encoders, plan, config.encoder_cache.encoder_wait_s
            )
        runtime.records = records_for(
            renderer, runtime.frontend.limits, config.encoder_cache.encoder_wait_s
        )
        if runtime.records is not None and renderer.config.ec_transfer_config.is_ec_producer:
            renderer.mm_processor.recorder = runtime.records.write
        if config.media.enabled:
            runtime.frontend.pool.warm()


def warn_of_private_addresses(config: MediaConfig, domains: Sequence[str] | None) -> None:
    """Say at start-up that clients can make this server contact its own network, if they can.

    An operator who has set ``private_addresses`` to either value has decided, and is not told.

    Args:
        config: Settings of the media front-end.
        domains: vLLM's ``--allowed-media-domains``.
    """
    decided = "private_addresses" in config.fetch.model_fields_set
    if config.enabled and not domains and not decided:
        vllm_compat.logger.warning(
            "mm_ext: media URLs may point to loopback and private addresses, and no "
            "--allowed-media-domains are set, so clients can make this server contact services on "
            "its own network. Set mm_ext.media.fetch.private_addresses to 'refuse', or to 'allow' "
            "if that is wanted."
        )


def warn_of_whole_videos(config: MMExtConfig, traits: ModelTraits) -> None:
    """Say at start-up that the configured reduction is not done, if it is not.

    Args:
        config: The plugin's configuration.
        traits: What the served model wants from the front-end.
    """
    if not (config.compression.reduction.is_identity or traits.cuts_videos):
        vllm_compat.logger.warning(
            "mm_ext: compression.reduction has no effect: vLLM's own processor gets the videos of "
            "this server whole, because of the served model or of --video-pruning-rate."
        )


_WITHOUT_FAMILY = {
    "Qwen2.5-Omni": "videos are whole and silent, and frame times assumed even",
    "Qwen3-Omni": "videos are whole and silent, and frame times assumed even",
    "Qwen2.5-VL": "videos are whole, no tokens are reduced, and frame times assumed even",
    "Qwen3-VL": "videos are whole and no tokens are reduced",
    "LLaVA-OneVision": "videos are whole and no tokens are reduced",
    "InternVL": "videos are whole and no tokens are reduced",
}


_REGISTER_MODEL = VllmName(
    "vllm.model_executor.models:ModelRegistry.register_model", ("model_arch", "model_cls")
)


def _family_feature(family: str) -> Feature:
    return Feature(
        family,
        _WITHOUT_FAMILY[family],
        (_REGISTER_MODEL, *FAMILY_NAMES[family]),
        lambda: vllm_compat.override_models(OVERRIDES[family]),
    )


FEATURES: tuple[Feature, ...] = (
    Feature(
        "configuration",
        "additional_config.mm_ext is not validated at start-up",
        (
            VllmName(
                "vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self", "usage_context")
            ),
            VllmAttributes(
                "vllm.usage.usage_lib:UsageContext", ("LLM_CLASS", "OPENAI_BATCH_RUNNER")
            ),
            VllmName("vllm.config:ParallelConfig", ("_api_process_count", "_api_process_rank")),
            VllmAttributes("vllm.engine.arg_utils:EngineArgs", ("additional_config",)),
            VllmAttributes("vllm.config:VllmConfig", ("model_config", "parallel_config")),
        ),
        _install_config,
    ),
    Feature(
        "front-end settings",
        "the front-end runs with default settings and does not know the model",
        FRONTEND_NAMES,
        _install_frontend,
    ),
    Feature(
        "media connector",
        "media is fetched and decoded by stock vLLM on every turn",
        CONNECTOR_NAMES,
        _install_connector,
        _probe("connector"),
    ),
    Feature(
        "video loader",
        "video_backend 'mm_ext' is not selectable with vLLM's own connector",
        (
            VllmName("vllm.multimodal.video:VIDEO_LOADER_REGISTRY.register", ("name",)),
            VllmName("vllm.multimodal.video:VideoLoader.load_bytes", ("data",)),
            VllmName("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
            VllmName("vllm.engine.arg_utils:EngineArgs", ("media_io_kwargs", "additional_config")),
            VllmName("vllm.envs:VLLM_MEDIA_CONNECTOR"),
        ),
        _install_loader,
    ),
    Feature(
        "digest hashing",
        "vLLM hashes every sample of a waveform on every turn",
        (
            VllmName("vllm.multimodal.hasher:MultiModalHasher.serialize_item", ("obj",)),
            VllmName("vllm.multimodal.hasher:MultiModalHasher.hash_kwargs", ("algorithm",)),
        ),
        _install_hashing,
        _probe("hashing"),
    ),
    Feature(
        "KV blocks",
        "cached media give way to text in the order of their last use",
        POOL_NAMES,
        _install_kv,
    ),
    Feature(
        "KV control",
        "API servers cannot pin or release conversations",
        CONTROL_NAMES,
        _install_kv_control,
    ),
    *(_family_feature(family) for family in OVERRIDES),
    Feature(
        "Composer",
        "composer checkpoints cannot be served",
        (_REGISTER_MODEL, *COMPOSER_NAMES),
        _install_composer,
    ),
    *ENCODER_CACHE_FEATURES,
    SHARED_OUTPUTS_FEATURE,
    *SERVING_FEATURES,
    CLIENT_ID_FEATURE,
    ENCODERS_APART_FEATURE,
    ROUTING_FEATURE,
    LIVE_FEATURE,
    SIGHT_FEATURE,
    ENGINE_FIGURES_FEATURE,
)


def register() -> list[FeatureStatus]:
    """``vllm.general_plugins`` entry point: runs in every vLLM process, possibly repeatedly."""
    reason = vllm_compat.check_version()
    if reason is not None:
        vllm_compat.logger.warning("mm_ext: %s; features are checked one by one", reason)
    vllm_compat.warn_if_unnamed()
    return vllm_compat.activate(FEATURES)


def endpoint_plugin() -> MMExtEndpointPlugin:
    """``vllm.endpoint_plugins`` entry point: the HTTP surface, API server only."""
    from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin

    return MMExtEndpointPlugin()
