"""The host tier's eviction policy behind vLLM's own offloading manager."""

from __future__ import annotations

import random

import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from vllm_mm_ext.adapters.kv import offload_policy
from vllm_mm_ext.adapters.kv.offload_policy import CostAwarePolicy
from vllm_mm_ext.adapters.names.kv_names import OFFLOAD_NAMES
from vllm_mm_ext.adapters.names.names_check import VllmName

CHUNK = 256


def manager(chunks: int) -> CPUOffloadingManager:
    return CPUOffloadingManager(chunks, "CostAwarePolicy", "vllm_mm_ext.kv_offload")


def keys_of(name: str, count: int) -> list[OffloadKey]:
    return [make_offload_key(f"{name}.{i}".encode(), 0) for i in range(count)]


def context(name: str, keys: list[OffloadKey]) -> ReqContext:
    made = ReqContext(name)
    for place, key in enumerate(keys):
        made.set_offload_key_position(key, (place + 1) * CHUNK)
    return made


def serve(host: CPUOffloadingManager, name: str, count: int) -> int:
    """A request that loads what is there and stores the rest; how many chunks it found."""
    keys = keys_of(name, count)
    request = context(name, keys)
    host.on_new_request(request)
    found = 0
    while found < count and host.lookup(keys[found], request) is LookupResult.HIT:
        found += 1
    if found:
        host.prepare_load(keys[:found], request)
        host.complete_load(keys[:found], request)
    if host.prepare_store(keys[found:], request) is not None:
        host.complete_store(keys[found:], request)
    host.on_request_finished(request)
    return found


def there(host: CPUOffloadingManager, name: str, count: int) -> list[bool]:
    request = ReqContext("look")
    return [host.lookup(key, request) is LookupResult.HIT for key in keys_of(name, count)]


def test_vllm_loads_the_policy_by_the_names_of_the_documentation() -> None:
    assert isinstance(manager(4)._policy, CostAwarePolicy)


def test_of_a_request_the_last_chunks_go_first() -> None:
    host = manager(10)
    serve(host, "a", 8)
    serve(host, "b", 5)
    assert there(host, "a", 8) == [True] * 5 + [False] * 3


def test_what_comes_again_outlives_what_never_does() -> None:
    host = manager(16)
    found = 0
    for step in range(600):
        if step % 6 == 0:
            found += serve(host, "again and again", 4) * (step >= 300)
        else:
            # Five of these are more than there is room for, so LRU would find nothing.
            serve(host, f"once {step}", 4)
    assert found >= 0.9 * 50 * 4


def test_chunks_being_read_stay() -> None:
    host = manager(6)
    serve(host, "a", 4)
    keys, reader = keys_of("a", 4), context("reader", keys_of("a", 4))
    host.prepare_load(keys, reader)
    request = context("b", keys_of("b", 6))
    assert host.prepare_store(keys_of("b", 6), request) is None
    assert host.prepare_store(keys_of("b", 2), request) is not None
    assert all(there(host, "a", 4))


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_keep_the_manager_and_the_policy_in_step(seed: int) -> None:
    rng = random.Random(seed)
    host = manager(40)
    policy = host._policy
    assert isinstance(policy, CostAwarePolicy)
    reading: list[tuple[list[OffloadKey], ReqContext]] = []
    for step in range(1500):
        name, count = f"r{int(rng.paretovariate(0.7)) % 60}", rng.randrange(1, 9)
        keys = keys_of(name, count)
        action = rng.random()
        if action < 0.6:
            serve(host, name, count)
        elif action < 0.75:
            request = context(name, keys)
            found = [key for key in keys if host.lookup(key, request) is LookupResult.HIT]
            if found:
                host.prepare_load(found, request)
                reading.append((found, request))
        elif action < 0.9 and reading:
            host.complete_load(*reading.pop(rng.randrange(len(reading))))
        elif action < 0.97:
            request = context(name, keys)
            made = host.prepare_store(keys, request)
            if made is not None:
                host.complete_store(made.keys_to_store, request, success=rng.random() < 0.5)
        elif step % 500 == 499:
            reading.clear()
            host.reset_cache()
        chunks = policy._chunks
        assert len(chunks) <= 40
        assert len({chunk.chunk_id for chunk in chunks.values()}) == len(chunks)
        idle = {key for key, chunk in chunks.items() if chunk.ref_cnt == 0}
        assert idle == {key for key in chunks if key in policy._evictable}
        assert len(policy._evictable) == len(idle) == host._num_evictable_cache_chunks
        assert chunks.keys() == policy._last_uses.keys()
        policy._evictable.check_integrity()
        policy._history.check_integrity()


def test_an_eviction_that_cannot_be_satisfied_changes_nothing() -> None:
    host = manager(4)
    serve(host, "a", 4)
    keys = keys_of("a", 4)
    assert host._policy.evict(2, set(keys[:3])) is None
    assert all(there(host, "a", 4))
    evicted = host._policy.evict(1, set(keys[:3]))
    assert evicted is not None
    assert [key for key, _ in evicted] == keys[3:]


@pytest.mark.parametrize("with_context", [False, True], ids=["vLLM 0.32", "vLLM 0.33"])
def test_chunks_are_taken_in_as_each_version_of_vllm_gives_them(with_context: bool) -> None:
    policy = CostAwarePolicy(4)
    (key,) = keys_of("a", 1)
    chunk = ChunkStatus(0)
    if with_context:
        policy.insert(key, chunk, context("a", [key]))
    else:
        policy.insert(key, chunk)
    assert policy.get(key) is chunk


@pytest.mark.parametrize("gone", ["CachePolicy.no_longer_there", "CachePolicy.insert"])
def test_a_changed_interface_is_named_at_start_up(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = VllmName(f"{CachePolicy.__module__}:{gone}", ("something_else",))
    monkeypatch.setattr(offload_policy, "OFFLOAD_NAMES", (*OFFLOAD_NAMES, changed))
    with pytest.raises(RuntimeError, match=f"does not fit this vLLM.*{gone}"):
        manager(4)


def test_what_vllm_wants_beyond_the_policy_is_named_at_start_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = frozenset({*CachePolicy.__abstractmethods__, "brand_new"})
    monkeypatch.setattr(CachePolicy, "__abstractmethods__", wanted)
    assert "brand_new" in (offload_policy.offload_problem() or "")
