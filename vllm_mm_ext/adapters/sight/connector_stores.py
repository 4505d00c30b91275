"""What the connectors of an engine keep in stores of their own, and cannot drop when asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from vllm_mm_ext.adapters.encoder_cache.ec_connector import NoHostTier

# Classes of vLLM's that hand KV from one engine to another, or make it up, and keep none.
_KEEP_NO_KV = frozenset(
    (
        "DecodeBenchConnector",
        "MoRIIOConnector",
        "MooncakeConnector",
        "NixlBaseConnector",
        "P2PSecondaryTierManager",
    )
)


def stores_left(scheduler: Any) -> list[str]:
    """Names of the classes whose stores outlast a takedown.

    Args:
        scheduler: vLLM's scheduler.
    """
    found = [*_kv_stores(scheduler.connector), *_output_stores(scheduler)]
    return sorted({type(one).__name__ for one in found})


def _kv_stores(connector: Any) -> Iterator[Any]:
    if connector is None:
        return
    if several := getattr(connector, "sub_connectors", ()):
        stores = [store for one in several for store in _kv_stores(one)]
    elif type(connector).reset_cache is KVConnectorBase_V1.reset_cache:
        # vLLM takes a connector that has no way to drop anything for one that has dropped it.
        stores = [connector]
    else:
        # The host's tier of offloaded KV is reset. Tiers behind it (files, object stores) are not.
        offloading = getattr(connector, "connector_scheduler", None)
        stores = getattr(getattr(offloading, "manager", None), "secondary_tiers", [])
    for store in stores:
        if _KEEP_NO_KV.isdisjoint(base.__name__ for base in type(store).__mro__):
            yield store


def _output_stores(scheduler: Any) -> Iterator[Any]:
    store = scheduler.ec_connector
    if getattr(scheduler.encoder_cache_manager, "host", None) is not None:
        # The plugin's own tier drops what it is asked to; a connector of vLLM's may be behind it.
        store = getattr(store, "transport", None)
    if not (store is None or hasattr(store, "forget") or isinstance(store, NoHostTier)):
        yield store
