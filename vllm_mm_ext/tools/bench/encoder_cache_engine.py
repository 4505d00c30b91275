"""Twelve conversations about a video each, whose KV is lost between turns, inside an engine.

Run by ``encoder_cache_bench.py`` as a module of its own, with ``SIDE MODEL MEDIA TIERS``; TIERS is
``own`` (vLLM's cache), ``device`` or ``host`` (both tiers).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.engine_arguments import DEVICE_TIER, HOST_TIER
from vllm_mm_ext.testing.step_trace import record_steps
from vllm_mm_ext.tools.bench.chat import conversation
from vllm_mm_ext.tools.bench.inprocess import start

VIDEOS = 12
TURNS = 4
FPS = 2
# A video of 8 s: 16 frames, 8 pairs of 128 tokens.
VIDEO_TOKENS = 1024
CHUNK = 2048


def options(side: str, tiers: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    found: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_batched_tokens": CHUNK,
        "limit_mm_per_prompt": {"video": 1, "image": 0},
        "media_io_kwargs": {"video": {"fps": FPS, "max_frames": 32}},
        # For about four of the twelve.
        "num_gpu_blocks_override": 140,
        "disable_log_stats": False,
    }
    if side == "plugin":
        sampling = {"sampling": {"fps": FPS, "max_frames": 32}}
        found["additional_config"] = {
            "mm_ext": {
                "media": sampling,
                "segments": {"tokens": 512},
                # vLLM's own KV cache on both sides: encoder outputs alone are compared.
                "kv": {"enabled": False},
            }
        }
    if tiers != "own":
        found |= DEVICE_TIER
    if tiers == "host":
        found |= HOST_TIER
    return found


def main(side: str, model: Path, media: Path, tiers: str) -> None:
    """Print, by turn, tokens and items encoded and seconds to the first token, as JSON."""
    from vllm import SamplingParams

    llm = start(model, media, **options(side, tiers))
    greedy = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    turns = []
    for turn in range(1, TURNS + 1):
        first: list[float] = []
        with record_steps(llm) as trace:
            for number in range(VIDEOS):
                messages: Any = conversation((media / f"{number}.mp4").as_uri(), turn)
                (answer,) = llm.chat(messages, greedy, use_tqdm=False)
                first.append(answer.metrics.first_token_ts - answer.metrics.queued_ts)
        encoded = trace.encoded()
        turns.append(
            {
                "items": len(encoded),
                "tokens": sum(item.embeddings for item in encoded),
                "first_s": first,
                "kv_tokens": sum(trace.cached_tokens(number) for number in trace.requests()),
            }
        )
    print(json.dumps(turns))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
