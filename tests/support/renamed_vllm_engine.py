"""An engine told to use all of the plugin, on a vLLM whose names have changed; prints JSON.

Run by ``test_renamed_vllm`` in a process of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path


def main(model: str, clip: Path) -> None:
    from vllm_mm_ext.adapters import patches as vllm_patches
    from vllm_mm_ext.plugin import FEATURES, register
    from vllm_mm_ext.testing.engine_arguments import DEVICE_TIER, SCHEDULER
    from vllm_mm_ext.testing.server import KV_CACHE_BYTES

    warnings: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            warnings.append(record.getMessage())
        return True

    # A filter: vLLM takes handlers away when it sets up logging.
    logging.getLogger("vllm.mm_ext").addFilter(keep)
    active = [status.name for status in register() if status.active]
    loaded = list(warnings)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        allowed_local_media_path=str(clip.parent),
        **(SCHEDULER | DEVICE_TIER),
    )
    part = {"type": "video_url", "video_url": {"url": clip.as_uri()}}
    text = {"type": "text", "text": "What is this?"}
    (answer,) = llm.chat(
        [{"role": "user", "content": [part, text]}], SamplingParams(temperature=0, max_tokens=8)
    )
    core = llm.llm_engine.engine_core.engine_core
    print(
        json.dumps(
            {
                "active": active,
                "features": [feature.name for feature in FEATURES],
                "loaded": loaded,
                "later": [text for text in warnings[len(loaded) :] if text not in loaded],
                "changed": vllm_patches.ledger(),
                "tokens": len(answer.outputs[0].token_ids),
                "scheduler": type(core.scheduler).__module__,
                "encoder_cache": type(core.scheduler.encoder_cache_manager).__module__,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
