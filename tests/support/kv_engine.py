"""Conversations in an engine that is short of KV, and the same questions with nothing cached.

A reader of the engine's KV events follows what is cached. Run by ``test_kv_engine`` in a process of
its own; prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from kv_events import Reader, in_pool
from vllm.config import KVEventsConfig

from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.tools.bench.conversations_engine import CONFIG, cold, engine, play


def main(model: Path, media: Path) -> None:
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory() as folder:
        endpoint, replay = f"ipc://{folder}/told", f"ipc://{folder}/again"
        with Reader(endpoint, replay) as reader:
            _play(model, media, reader, KVEventsConfig(True, "zmq", endpoint, replay))


def _play(model: Path, media: Path, reader: Reader, events: KVEventsConfig) -> None:
    videos = sorted(media.glob("*.mp4"))
    llm = engine(model, media, len(videos), additional_config=CONFIG, kv_events_config=events)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert isinstance(pool, MMExtBlockPool)
    turns = play(llm, videos, turns=3)
    pool.check_integrity()
    kept = len(pool.tree)
    reader.read()
    known = reader.knowledge
    assert known.cached() == in_pool(pool)
    content = [piece.content for piece in pool.tree if piece.content.identifier]
    held = {(one.identifier, one.offset) for one in content}
    told = known.places()
    # First turns had nothing cached but text.
    answers = cold(llm, videos, [turn for turn in turns if turn.cached])
    pool.check_integrity()
    reader.read()
    assert known.cached() == in_pool(pool)
    found = {"turns": [asdict(t) for t in turns], "cold": answers, "kept": kept}
    items = {"held": sorted(held), "told": sorted(told), "cleared": known.cleared}
    print(json.dumps(found | items))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
