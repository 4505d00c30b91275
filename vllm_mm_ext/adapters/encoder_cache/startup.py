"""Checks and prepares what the host tier needs of an engine, when the engine starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.adapters.encoder_cache.transport_options import (
    CPU,
    SHARED_STORE,
    TRANSPORT,
    TransportError,
    transport_of,
)
from vllm_mm_ext.adapters.names.encoder_cache_names import EMBEDS_NAMES
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.patches import set_meanwhile, set_on, wrap
from vllm_mm_ext.adapters.vllm_compat import Feature, logger
from vllm_mm_ext.config.encoder_cache_settings import EncoderCacheSettings
from vllm_mm_ext.config.root import MIB, MMExtConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONNECTOR = "MMExtECConnector"
_MANAGER = "vllm_mm_ext.encoder_cache.MMExtEncoderCacheManager"


class HostTierError(ValueError):
    """The engine is configured in a way the host tier cannot work with."""


def check_host_tier(vllm_config: VllmConfig) -> None:
    """Check that the host tier can work in an engine, and with the transport if there is one.

    Raises:
        HostTierError: The host tier would give wrong answers, or be of no use.
        TransportError: The transport cannot work.
    """
    transfer = vllm_config.ec_transfer_config
    transport = transport_of(transfer)
    if transport is None and not (transfer.is_ec_producer and transfer.is_ec_consumer):
        raise HostTierError(
            f'ec_role must be "ec_both" for the host tier, got {transfer.ec_role}; to share '
            f"encoder outputs with other instances name ec_connector_extra_config.{TRANSPORT}"
        )
    if transport == CPU and not vllm_config.use_v2_model_runner:
        raise TransportError(f"{CPU} needs vLLM's second model runner (CUDA)")
    encoders = encoder_settings(vllm_config).encoders
    if encoders and (transport != SHARED_STORE or not transfer.is_ec_consumer):
        # Transfers from one instance to another need what only vLLM's proxy passes on.
        raise TransportError(
            "mm_ext.encoder_cache.encoders are asked by an instance that reads what they store: "
            f"it needs ec_connector_extra_config.{TRANSPORT}: {SHARED_STORE} and an ec_role of "
            f"ec_consumer or ec_both, got {transport} and {transfer.ec_role}"
        )
    if vllm_config.ec_manager_config.encoder_cache_manager_cls != _MANAGER:
        raise HostTierError(
            "the host tier needs the device tier beside it: --ec-manager-config "
            f'\'{{"encoder_cache_manager_cls": "{_MANAGER}"}}\''
        )
    multimodal = vllm_config.model_config.multimodal_config
    kv_consumer = vllm_config.kv_transfer_config is not None and (
        vllm_config.kv_transfer_config.is_kv_consumer
    )
    if multimodal is not None and multimodal.allow_missing_mm_embeddings and not kv_consumer:
        raise HostTierError(
            "clients could send raw embeddings: the plugin did not take part when the engine's "
            "configuration was made; is it named in VLLM_PLUGINS?"
        )


def check_encode_only(vllm_config: VllmConfig) -> None:
    """Check what an instance needs that encodes only: it computes a prompt in one piece.

    Raises:
        TransportError: Steps are shorter than the longest prompt.
    """
    transfer, scheduler = vllm_config.ec_transfer_config, vllm_config.scheduler_config
    longest = vllm_config.model_config.max_model_len
    if not transfer.is_ec_consumer and scheduler.max_num_batched_tokens < longest:
        raise TransportError(
            f"an instance with ec_role {transfer.ec_role} takes prompts in one step: "
            f"--max-num-batched-tokens ({scheduler.max_num_batched_tokens}) must be at least "
            f"--max-model-len ({longest})"
        )


def encoder_settings(vllm_config: VllmConfig) -> EncoderCacheSettings:
    """The plugin's settings of the encoder cache."""
    return MMExtConfig.from_additional_config(vllm_config.additional_config).encoder_cache


def host_bytes(vllm_config: VllmConfig) -> int:
    """Size of the host tier in bytes, from the plugin's settings."""
    return max(1, int(encoder_settings(vllm_config).host_mb * MIB))


def keep_raw_embeddings_out() -> None:
    """Leave ``--enable-mm-embeds`` as the operator set it where the host tier is the EC connector.

    vLLM lets clients send embeddings, with or without tensors, wherever an EC connector reads:
    disaggregated encoders reach a model in that way. The host tier reads only what it wrote.
    """
    from vllm.config import VllmConfig

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def resolve_mm_embedding_inputs(self: Any) -> None:
            transfer = self.ec_transfer_config
            if transfer is None or transfer.ec_connector != CONNECTOR:
                original(self)
                return
            with set_meanwhile(self, "vllm.config:VllmConfig.ec_transfer_config", None):
                original(self)

        return resolve_mm_embedding_inputs

    wrap(VllmConfig, "_resolve_mm_embedding_inputs", make)


def leave_out_of_text_servers() -> None:
    """Start a server that takes no media without the host tier, and say so.

    Such a server has no encoder outputs to keep, and vLLM fails at start-up where it finds none to
    measure. Which media a model takes, and whether the operator's limits leave any of them, is
    known once the configuration is made.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            config = original(self, *args, **kwargs)
            transfer = config.ec_transfer_config
            if transfer is None or transfer.ec_connector != CONNECTOR:
                return config
            if self.language_model_only or not config.model_config.supports_multimodal_inputs:
                logger.warning(
                    "mm_ext: the server takes no media (--language-model-only, or a "
                    "--limit-mm-per-prompt of 0 for each kind of media that the model takes): the "
                    "host tier of the encoder cache (ec_transfer_config) is off, and nothing of "
                    "the plugin that concerns media has any effect"
                )
                set_on(config, "vllm.config:VllmConfig.ec_transfer_config", None)
            return config

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", make)


ENCODER_CACHE_FEATURES = (
    Feature(
        "text-only servers",
        "a server with the host tier of the encoder cache fails if it takes no media",
        (
            VllmName("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
            VllmName("vllm.engine.arg_utils:EngineArgs", ("language_model_only",)),
            VllmName("vllm.config:ModelConfig.supports_multimodal_inputs"),
            # Without that feature, vLLM would have let clients send embeddings by now.
            *EMBEDS_NAMES,
        ),
        leave_out_of_text_servers,
    ),
    Feature(
        "raw embeddings",
        "the host tier of the encoder cache refuses to start: clients could send embeddings",
        EMBEDS_NAMES,
        keep_raw_embeddings_out,
    ),
)
