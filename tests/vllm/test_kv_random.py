"""Long random runs over the real KV cache manager, checked after every operation."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_events import Knowledge, in_pool
from kv_harness import BLOCK, Engine, Media, Part, Text, request
from vllm.v1.request import Request

from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.policies.kv.control import KVControl

# What a block holds: its group, all tokens up to its end, and the media they are placeholders of.
Content = tuple[int, tuple[int, ...], tuple[tuple[str, int], ...]]


class Model:
    """What must hold, whatever the pool keeps: who uses which block, and what is in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.content: dict[int, Content] = {}
        self.told = Knowledge()

    def check(self) -> None:
        engine, pool = self.engine, self.engine.pool
        pool.check_integrity()
        self.told.read(engine.told())
        assert self.told.cached() == in_pool(pool)
        for piece in pool.tree:
            media = piece.content.identifier is not None
            assert sum(piece.modalities.values()) == media * piece.tokens
        uses: dict[int, int] = {}
        for group, manager in enumerate(engine.manager.coordinator.single_type_managers):
            for name, blocks in manager.req_to_blocks.items():
                for index, block in enumerate(blocks):
                    if not block.is_null:
                        uses[block.block_id] = uses.get(block.block_id, 0) + 1
                        self._write(engine.running[name], group, index, block.block_id)
        assert all(block.ref_cnt == uses.get(block.block_id, 0) for block in pool.blocks[1:])
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(uses)
        limits = pool.limits
        idle = pool.retention.idle
        over = idle.blocks > limits.quota
        short = idle.blocks and pool.get_num_free_blocks() - idle.blocks < limits.floor
        # Idle media that requests are after cannot be given up.
        stuck = any(piece.idle and piece.with_media and piece.children for piece in pool.tree)
        assert not (over or short) or idle.items <= limits.min_items or stuck

    def _write(self, owner: Request, group: int, index: int, block_id: int) -> None:
        """A block that was found must hold what the request would have computed."""
        end = (index + 1) * BLOCK
        media = tuple(
            (f.identifier, f.mm_position.offset)
            for f in owner.mm_features
            if f.mm_position.offset < end
        )
        content = (group, tuple(owner.all_token_ids[:end]), media)
        if end <= self.engine.cached[owner.request_id]:
            assert self.content[block_id] == content
        elif end <= owner.num_computed_tokens:
            self.content[block_id] = content
        else:
            self.content.pop(block_id, None)


def _parts(rng: random.Random) -> list[Part]:
    parts: list[Part] = [Text(rng.randrange(2), rng.choice((0, 3, 9, 16)))]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        name = f"item{rng.randrange(6)}"
        modality = ("image", "audio", "video")[len(parts) % 3]
        parts.append(Media(f"{modality}-{name}", 2 + 7 * int(name[-1]) % 24, modality))
        if rng.random() < 0.5:
            parts.append(Text(rng.randrange(4), rng.randrange(1, 12)))
    parts.append(Text(rng.randrange(6), rng.randrange(1, 14)))
    return parts


def run(seed: int, steps: int, settings: KVSettings, *, blocks: int, window: int | None) -> Engine:
    """Random operations; everything is checked after each of them."""
    rng = random.Random(seed)
    engine = Engine(blocks, settings, window, events=True)
    control, model = KVControl(engine.pool), Model(engine)
    waiting: list[Request] = []
    for step in range(steps):
        names = sorted(engine.running)
        session = rng.choice((None, None, "a", "b", "c"))
        action = rng.random()
        listed = engine.pool.free_block_queue.listed
        kept = _kept(engine)
        used = engine.pool.num_gpu_blocks - engine.pool.get_num_free_blocks()
        if action < 0.35:
            new = waiting.pop() if waiting and rng.random() < 0.7 else None
            new = new or request(f"r{step}", _parts(rng), session=session)
            if engine.admit(new, rng.choice((6, 30, 1000))) is None:
                waiting.append(new)
            grown = engine.pool.num_gpu_blocks - engine.pool.get_num_free_blocks() - used
            lost = [i for i, key in kept.items() if engine.pool.blocks[i].block_hash != key]
            # Kept blocks are taken only after all others.
            assert not lost or grown >= listed + len(lost)
        elif action < 0.65 and names:
            name = rng.choice(names)
            if not engine.extend(name, rng.choice((1, 8, 1000))):
                waiting.append(engine.preempt(rng.choice(names)))
        elif action < 0.85 and names:
            engine.finish(rng.choice(names))
        elif action < 0.89 and names:
            waiting.append(engine.preempt(rng.choice(names)))
        elif action < 0.93:
            ids = rng.sample(range(1, blocks), 2)
            unused = {i for i in ids if engine.pool.blocks[i].ref_cnt == 0}
            engine.manager.evict_blocks(unused)
        elif action < 0.98:
            getattr(control, rng.choice(("pin", "unpin", "release")))(rng.choice("abcd"))
        else:
            done = engine.manager.reset_prefix_cache()
            assert done == (not engine.running)
            assert not done or (not len(engine.pool.tree) and not engine.pool.media())
        model.check()
    for name in sorted(engine.running):
        engine.finish(name)
        model.check()
    # All of the pool can be had, whatever is kept.
    taken = engine.pool.get_new_blocks(blocks - 1)
    assert len(taken) == blocks - 1
    engine.pool.free_blocks(taken)
    assert not len(engine.pool.tree)
    engine.pool.check_integrity()
    return engine


def _kept(engine: Engine) -> dict[int, object]:
    holders = engine.pool.free_block_queue.holders
    return {
        block.block_id: block.block_hash
        for block in engine.pool.blocks
        if holders[block.block_id] is not None and block.ref_cnt == 0
    }


CASES = {
    "default": KVSettings(),
    "small quota": KVSettings(max_visual_cache_share=0.2, min_items=1),
    "nothing but the minimum": KVSettings(max_visual_cache_share=0, min_items=2),
    "pressure": KVSettings(pressure_limit=0.7, min_items=0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 12])
def test_blocks_items_and_lists_agree_after_every_operation(name: str, window: int | None) -> None:
    engine = run(len(name), 700, CASES[name], blocks=48, window=window)
    assert engine.hit_tokens > 0


@given(seed=st.integers(0, 1 << 30), blocks=st.integers(8, 90), name=st.sampled_from(list(CASES)))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_any_pool_size_survives_any_order_of_operations(seed: int, blocks: int, name: str) -> None:
    run(seed, 80, CASES[name], blocks=blocks, window=None)
