"""Conversations in an engine that is short of KV and offloads it with vLLM's own connector.

Run by ``test_offload_engine`` in a process of its own; prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from offload_on_cpu import Copies
from vllm.config import KVTransferConfig

from vllm_mm_ext.testing.engine_arguments import EVERY_PART
from vllm_mm_ext.tools.bench.conversations_engine import CONFIG, cold, engine, play


def main(model: Path, media: Path, policy: str) -> None:
    videos = sorted(media.glob("*.mp4"))
    extra: dict[str, Any] = {
        "spec_name": "OnCpu",
        "spec_module_path": "offload_on_cpu",
        "cpu_bytes_to_use": 1 << 30,
        "eviction_policy": policy,
    }
    if policy == "CostAwarePolicy":
        extra["cache_policy_module_path"] = "vllm_mm_ext.kv_offload"
    offloading = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )
    llm = engine(
        model,
        media,
        len(videos),
        additional_config=CONFIG,
        kv_transfer_config=offloading,
        **EVERY_PART,
    )
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    turns = play(llm, videos, turns=3)
    pool.check_integrity()
    found = {"stored": Copies.stored, "loaded": Copies.loaded}
    # With the KV cache empty and the connector's full.
    again = cold(llm, videos, turns)
    found["loaded_when_cold"] = Copies.loaded - found["loaded"]
    before = Copies.loaded
    # With nothing anywhere.
    computed = []
    for turn in turns:
        llm.reset_prefix_cache(reset_connector=True)
        computed += cold(llm, videos, [turn])
    found["loaded_when_nothing_is_there"] = Copies.loaded - before
    pool.check_integrity()
    answers = {"turns": [turn.answer for turn in turns], "again": again, "computed": computed}
    print(json.dumps(found | answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
