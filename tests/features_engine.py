"""Greedy answers with every feature on, with one of them off at a time, and without the plugin.

Run by ``test_features_engine.py`` in a process of its own, JSON on the last line of output:
``python features_engine.py stock|plugin MEDIA_DIRECTORY``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import (
    BOTH_TIERS,
    HOST_TIER,
    SCHEDULER,
)
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

FILES = ("shapes.mp4", "pan.mp4")
TOKENS = 8
# Stock's own frames at native size, so that answers can be compared; what changes pixels apart.
EVERYTHING: dict[str, Any] = {
    **SCHEDULER,
    **BOTH_TIERS,
    "additional_config": {
        "mm_ext": {
            "media": {"sampling": {"policy": "stock"}, "resize": "native"},
            "segments": {"tokens": 64},
            "compression": {"encoder_max_patches": 256},
        }
    },
}


def variants() -> dict[str, dict[str, Any]]:
    """Arguments of the engine by what is off."""
    found = {"nothing": EVERYTHING}
    for name, keys in {
        "scheduler": SCHEDULER,
        "host tier": HOST_TIER,
        "encoder cache": BOTH_TIERS,
    }.items():
        found[name] = {key: value for key, value in EVERYTHING.items() if key not in keys}
    for name, section, settings in (
        ("KV blocks", "kv", {"enabled": False}),
        ("segments", "segments", {"tokens": 0}),
        ("encoder batches", "compression", {"encoder_max_patches": 0}),
        ("quality", "quality", {"enabled": False}),
    ):
        options = deepcopy(EVERYTHING)
        options["additional_config"]["mm_ext"][section] = settings
        found[name] = options
    return found


def make_media(directory: Path) -> None:
    """Two clips."""
    make_clip(directory / FILES[0], duration=6.5, seed=1, fps=12, width=168, height=112)
    make_clip(directory / FILES[1], duration=9, scene="pan", seed=2, fps=15, width=168, height=112)


def answers(media: Path, options: dict[str, Any]) -> list[list[int]]:
    """Tokens for two videos and a text at once, then for a second turn about each video."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(checkpoint("qwen2_5_vl")),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=2048,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        block_size=32,
        limit_mm_per_prompt={"video": 1, "image": 0},
        allowed_local_media_path=str(media),
        **options,
    )
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    first = [
        *([turn(media / name, "What happens?")] for name in FILES),
        [{"role": "user", "content": "Say something."}],
    ]
    found = engine.chat(first, greedy, use_tqdm=False)
    second = [
        [
            *messages,
            {"role": "assistant", "content": "Something."},
            {"role": "user", "content": "And then?"},
        ]
        for messages in first[: len(FILES)]
    ]
    found += engine.chat(second, greedy, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    return [list(answer.outputs[0].token_ids) for answer in found]


def turn(file: Path, text: str) -> dict[str, Any]:
    """A message about a video."""
    content = [
        {"type": "video_url", "video_url": {"url": file.as_uri()}},
        {"type": "text", "text": text},
    ]
    return {"role": "user", "content": content}


def main(mode: str, media: Path) -> None:
    chosen = variants() if mode == "plugin" else {"plugin": {}}
    found = {}
    for name, options in chosen.items():
        found[name] = answers(media, options)
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "mm_ext" if sys.argv[1] == "plugin" else ""
    main(sys.argv[1], Path(sys.argv[2]))
