"""Names of mm items that instances share: by content and plan, whatever else differs.

Stock vLLM has the path of the model in every name, names items by a counter of requests where both
of its caches are off, and takes a client's ``uuid`` as it is. Two clients may use one ``uuid`` for
different pictures, so what only a ``uuid`` names is not shared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from blake3 import blake3

from vllm_mm_ext.adapters.encoder_cache import bare_items, failed_loads
from vllm_mm_ext.adapters.encoder_cache.instance_plan import (
    join_shared_store,
    kept_plan,
    made_plan,
)
from vllm_mm_ext.adapters.encoder_cache.startup import CONNECTOR, check_encode_only
from vllm_mm_ext.adapters.encoder_cache.transport_options import OWN, SHARED_STORE, transport_of
from vllm_mm_ext.adapters.names.encoder_cache_names import SHARED_NAMES
from vllm_mm_ext.adapters.patches import set_on, wrap
from vllm_mm_ext.adapters.vllm_compat import Feature
from vllm_mm_ext.fleet.pairing import digest


def install() -> None:
    """Name items by content and plan where a transport is configured. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal.processing.processor import BaseMultiModalProcessor
    from vllm.renderers.base import BaseRenderer

    wrap(EngineArgs, "create_engine_config", _with_plan)
    wrap(BaseMultiModalProcessor, "_get_mm_hashes", _without_path)
    wrap(BaseRenderer, "_process_mm_uuids", _by_content)
    bare_items.install()
    failed_loads.install()


def _with_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        transfer = config.ec_transfer_config
        if transfer is None or transfer.ec_connector != CONNECTOR:
            return config
        transport = transport_of(transfer)
        if transport is not None:
            check_encode_only(config)
            plan = made_plan(config)
            set_on(config.model_config, "vllm.config:ModelConfig.mm_ext_plan", plan)
            if transport == SHARED_STORE:
                # Here as well as in the engine, so that a server fails before it loads a model.
                join_shared_store(config)
        return config

    return create_engine_config


def _without_path(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_mm_hashes(self: Any, inputs: Any) -> Any:
        context = self.info.ctx
        plan = kept_plan(context.model_config)
        if plan is None:
            return original(self, inputs)
        algorithm, uuids = context.get_mm_config().mm_hasher_algorithm, inputs.mm_uuid_items or {}
        return {
            modality: [marked(*pair) for pair in zip_longest(found, uuids.get(modality) or ())]
            for modality, found in inputs.get_mm_hashes(digest(plan), algorithm).items()
        }

    return _get_mm_hashes


def _by_content(original: Callable[..., Any]) -> Callable[..., Any]:
    def _process_mm_uuids(
        self: Any, mm_data: Any, mm_data_items: Any, mm_uuid_items: Any, *args: Any, **kwargs: Any
    ) -> Any:
        plan = kept_plan(self.model_config)
        if plan is None:
            return original(self, mm_data, mm_data_items, mm_uuid_items, *args, **kwargs)
        named = {
            modality: uuids and [uuid and mapped(uuid, digest(plan)) for uuid in uuids]
            for modality, uuids in mm_uuid_items.items()
        }
        self._validate_mm_uuids(mm_data, mm_data_items, named)
        return named

    return _process_mm_uuids


def marked(name: str, uuid: str | None) -> str:
    """The name of an item, marked if nothing but a client's ``uuid`` says what is in the item.

    Args:
        name: vLLM's.
        uuid: As ``mapped``; segments and windows have a digest of their content behind it.
    """
    by_content = uuid is None or "#" in uuid.removesuffix("#audio")
    return name if by_content else name + OWN


def mapped(uuid: str, plan: str) -> str:
    """The name that instances share for an item of which a client says the ``uuid``.

    Args:
        uuid: The client's.
        plan: Digest of the plan.
    """
    return blake3(f"{plan}\0{uuid}".encode("utf-8", "surrogatepass")).hexdigest()


SHARED_OUTPUTS_FEATURE = Feature(
    "shared encoder outputs",
    "instances cannot share encoder outputs: a server with a transport does not start",
    SHARED_NAMES,
    install,
)
