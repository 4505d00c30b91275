"""Conversations in an engine that is short of KV, and the same questions with nothing cached.

Run by ``test_kv_engine`` in a process of its own; prints JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.tools.bench.conversations_engine import CONFIG, cold, engine, play


def main(model: Path, media: Path) -> None:
    videos = sorted(media.glob("*.mp4"))
    llm = engine(model, media, len(videos), additional_config=CONFIG)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert isinstance(pool, MMExtBlockPool)
    turns = play(llm, videos, turns=3)
    pool.check_integrity()
    kept = len(pool.tree)
    # First turns had nothing cached but text.
    answers = cold(llm, videos, [turn for turn in turns if turn.cached])
    pool.check_integrity()
    print(json.dumps({"turns": [asdict(t) for t in turns], "cold": answers, "kept": kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
