"""The engine's part: what its caches hold, item by item, and what is dropped or kept there.

API servers call it between the engine's steps, as a utility method of vLLM's engine core.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllm_mm_ext.adapters.sight import kv_part, worker_part
from vllm_mm_ext.adapters.sight.connector_stores import stores_left
from vllm_mm_ext.adapters.sight.processor_cache import drop_inputs
from vllm_mm_ext.base.heap_scrub import clear_what_is_freed, scrub

# Bytes of a message to workers besides what fills it.
_MESSAGE_BYTES = 1 << 16

# An engine's cache of inputs is changed by vLLM's thread for inputs, and by takedowns.
_INPUTS = threading.Lock()

# The method of vLLM's ``EngineCore`` that API processes call.
UTILITY = "mm_ext_sight"


def install() -> None:
    """Let API processes call ``UTILITY``. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    from vllm_mm_ext.adapters.patches import replace_attribute, wrap

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            with _INPUTS:
                return original(self, request)

        return preprocess_add_request

    wrap(EngineCore, "preprocess_add_request", make)

    def mm_ext_sight(self: Any, action: str, arguments: Mapping[str, Any]) -> Any:
        return _ACTIONS[action](self, **arguments)

    replace_attribute(EngineCore, UTILITY, mm_ext_sight)


def look(core: Any) -> dict[str, Any]:
    """What the caches of an engine hold, as plain values.

    Args:
        core: vLLM's ``EngineCore``.
    """
    pool = kv_part.pool_of(core)
    return {
        # Among all engines of the service: a machine's own may begin with any.
        "number": core.scheduler.parallel_config.data_parallel_index,
        "kv": None if pool is None else kv_part.view(pool),
        "encoder": _encoder(core.scheduler.encoder_cache_manager),
    }


def busy(core: Any, hashes: Collection[str]) -> int:
    """Number of requests of an engine that use some mm items.

    Args:
        core: vLLM's ``EngineCore``.
        hashes: vLLM's hashes of the items.
    """
    wanted = _one_of(hashes)
    return sum(
        any(wanted(feature.identifier) for feature in request.mm_features)
        for request in core.scheduler.requests.values()
    )


def take_down(core: Any, hashes: Collection[str]) -> dict[str, Any]:
    """Drop all that was made of some mm items, and overwrite it where it lies.

    What a request still uses stays, and is told.

    Args:
        core: vLLM's ``EngineCore``.
        hashes: vLLM's hashes of the items.

    Returns:
        Numbers of what was dropped: ``kv_blocks``, ``outputs`` (of encoders), ``inputs``; ``busy``
        is the number of requests that use an item, ``kv_left`` whether cached KV may be left,
        ``stores_left`` names the connectors that may hold something and cannot drop it, and
        ``kv_overwritten`` is whether the KV blocks hold nothing any more.
    """
    scheduler = core.scheduler
    wanted = _one_of(hashes)
    used = {
        feature.identifier
        for request in scheduler.requests.values()
        for feature in request.mm_features
        if wanted(feature.identifier)
    }

    def free(identifier: str) -> bool:
        return wanted(identifier) and identifier not in used

    pool = kv_part.pool_of(core)
    kv_left, evicted = False, set[int]()
    if pool is not None:
        evicted = pool.take_down(free)
    elif hashes:
        # vLLM's pool does not know what its blocks hold.
        kv_left = not scheduler.reset_prefix_cache()
    if hashes and scheduler.connector is not None:
        # Nor does a connector know which of its keys are of what.
        kv_left = not scheduler.reset_connector_cache() or kv_left
    manager = scheduler.encoder_cache_manager
    identifiers = {*hashes} - used
    if hasattr(manager, "take_down"):
        identifiers.update(manager.take_down(free))
    elif hasattr(manager, "freeable"):
        identifiers.update(_evict(manager, free))
    elif hashes and not scheduler.requests:
        # That of encoder-decoders takes nothing for cached, but the worker's outputs stay a while.
        core.reset_encoder_cache()
    known = frozenset(hashes)
    with _INPUTS:
        inputs = drop_inputs(
            core.mm_receiver_cache, {one for name in identifiers if (one := _hash_of(name, known))}
        )
    # The end of a prompt that fills no block is free without ever having been cached.
    blocks = [
        block.block_id
        for block in scheduler.kv_cache_manager.block_pool.blocks
        if not (block.ref_cnt or block.is_null)
        and (block.block_id in evicted or block.block_hash is None)
    ]
    executor = core.model_executor
    if "kv_cache" in executor.sleeping_tags:
        # A sleeping engine has given that memory back: there is nothing to overwrite.
        blocks = []
    _overwrite_queue(executor)
    found = executor.collective_rpc(worker_part.take_down, args=(sorted(identifiers), blocks))
    forget_stored = getattr(scheduler.ec_connector, "forget_stored", None)
    if forget_stored is not None:
        # The shared store does not tell what it holds. The steps that wrote to it have ended.
        forget_stored(sorted(identifiers))
    scrub()
    return {
        "busy": busy(core, hashes),
        "kv_blocks": len(evicted),
        "kv_left": kv_left,
        "stores_left": stores_left(scheduler) if hashes else [],
        # Asked again, what nothing overwrites is no reason to ask once more.
        "kv_overwritten": not evicted or all(zeroed for _, zeroed in found),
        "outputs": max((dropped for dropped, _ in found), default=0),
        "inputs": inputs,
    }


def keep(core: Any, hashes: Collection[str], key: str, keeps: bool) -> int | None:
    """Pin the KV of media that are cached now, or end such a pin.

    Args:
        core: vLLM's ``EngineCore``.
        hashes: vLLM's hashes of the items of the media.
        key: Names the pin.
        keeps: True to pin, False to end the pin.

    Returns:
        The number of items; None without the plugin's block pool.
    """
    pool = kv_part.pool_of(core)
    if pool is None:
        return None
    return kv_part.pin(pool, _one_of(hashes), key) if keeps else kv_part.unpin(pool, key)


def let_go(core: Any, hashes: Collection[str]) -> int | None:
    """Stop keeping the KV of media; returns as ``keep``.

    Args:
        core: vLLM's ``EngineCore``.
        hashes: vLLM's hashes of the items of the media.
    """
    pool = kv_part.pool_of(core)
    return None if pool is None else kv_part.let_go(pool, _one_of(hashes))


def begin(core: Any) -> None:
    """Prepare an engine and its workers for takedowns."""
    core.model_executor.collective_rpc(worker_part.begin)
    clear_what_is_freed()


_ACTIONS: dict[str, Callable[..., Any]] = {
    "begin": begin,
    "look": look,
    "busy": busy,
    "take_down": take_down,
    "keep": keep,
    "let_go": let_go,
}


def _overwrite_queue(executor: Any) -> None:
    """Overwrite the shared memory through which an engine sends inputs to workers of its own.

    It is a ring of as many chunks; a message takes one.
    """
    queue = getattr(executor, "rpc_broadcast_mq", None)
    if queue is None:
        return
    filling = bytes(queue.buffer.max_chunk_bytes - _MESSAGE_BYTES)
    for _ in range(queue.buffer.max_chunks):
        executor.collective_rpc(worker_part.ignore, args=(filling,))


def _evict(manager: Any, wanted: Callable[[str], bool]) -> list[str]:
    """Let vLLM's own encoder cache give up items that no request uses, as when it needs the room.

    The worker's tensors are the caller's to drop: the manager would else take the items for cached,
    and a step that needs one of them would fail with the whole engine.

    Args:
        manager: vLLM's ``EncoderCacheManager``.
        wanted: Whether an item, named by its identifier, is one of them.

    Returns:
        Identifiers of the items.
    """
    found = [identifier for identifier in manager.freeable if wanted(identifier)]
    for identifier in found:
        manager.num_free_slots += manager.freeable.pop(identifier)
        del manager.cached[identifier], manager.num_embeds_by_hash[identifier]
    return found


def _one_of(hashes: Collection[str]) -> Callable[[str], bool]:
    """Whether an identifier is of one of the hashes."""
    known = frozenset(hashes)
    return lambda identifier: _hash_of(identifier, known) is not None


def _hash_of(identifier: str, hashes: frozenset[str]) -> str | None:
    """The one of some hashes that an identifier is of; None if it is of none of them.

    The name of a LoRA adapter may stand before the hash. Both may have colons.
    """
    rest, colon = identifier, ":"
    while colon:
        if rest in hashes:
            return rest
        _, colon, rest = rest.partition(":")
    return None


def _encoder(manager: Any) -> dict[str, Any] | None:
    if not hasattr(manager, "take_down"):
        return None
    host = None if manager.host is None else dict(manager.host.items())
    found = sorted(manager.items(), key=lambda one: -one[2])
    sums: Counter[str] = Counter()
    for _, modality, size, _ in found:
        sums[modality] += size
    return {
        "capacity": manager.capacity,
        "held": sum(sums.values()),
        "bytes": dict(sums),
        "items": [
            {
                "hash": key.rpartition(":")[2],
                "modality": modality,
                "bytes": size,
                "in_use": in_use,
                "on_host": host is not None and key in host,
            }
            for key, modality, size, in_use in found[: kv_part.LISTED]
        ],
        "all_items": len(found),
        "host": None if host is None else {"held": sum(host.values()), "items": len(host)},
    }
