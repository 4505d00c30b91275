"""What one side's engine encodes and keeps: the measurements of ``segments`` inside an engine.

Run by ``segments_bench.py`` as a module of its own, with ``SIDE MODEL MEDIA``.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.encoder_calls import record_encoder_calls
from vllm_mm_ext.testing.step_trace import StepTrace, record_steps
from vllm_mm_ext.tools.bench.inprocess import ask, start

# Frames of the clips at 2 fps, at most; the same for both sides.
FPS = 2
MAX_FRAMES = 128
CONTEXT = 16384
# Tokens of a step where prefill is chunked, and where a whole clip fits into one.
CHUNK = 512
WHOLE = 4096
SEGMENT_TOKENS = 128
ENCODER_PATCHES = 1024
CONFIG = {
    "mm_ext": {
        "media": {"sampling": {"fps": FPS, "max_frames": MAX_FRAMES}},
        "segments": {"tokens": SEGMENT_TOKENS},
        "compression": {"encoder_max_patches": ENCODER_PATCHES},
    }
}


def options(side: str, tokens: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for one side and size of steps."""
    return {
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": tokens,
        "limit_mm_per_prompt": {"video": 1, "image": 0},
        "media_io_kwargs": {"video": {"fps": FPS, "max_frames": MAX_FRAMES}},
        "additional_config": CONFIG if side == "plugin" else {},
    }


def forget(llm: Any) -> None:
    """Empty every cache of the engine and of its processor."""
    llm.reset_mm_cache()
    llm.reset_prefix_cache()
    llm.llm_engine.engine_core.reset_encoder_cache()


@contextmanager
def asked_again(llm: Any, first: Path, second: Path) -> Iterator[dict[str, float]]:
    """Ask about one clip, let the block interfere, ask about another; what the second took."""
    forget(llm)
    ask(llm, first)
    found: dict[str, float] = {}
    yield found
    with record_steps(llm) as trace:
        prompt = ask(llm, second)
    videos = [item for item in trace.encoded() if item.modality == "video"]
    found |= {
        "prompt": prompt,
        "encoded_items": len(videos),
        "encoded_tokens": sum(item.embeddings for item in videos),
        "cached_share": trace.cached_tokens(0) / prompt,
    }


def evict(llm: Any, tokens: int) -> None:
    """Compute prompts of text until so many tokens of KV cache were taken from the oldest."""
    from vllm import SamplingParams

    longest = 2048
    prompts = [
        {"prompt_token_ids": [5 + (i + number) % 200 for i in range(min(longest, tokens - number))]}
        for number in range(0, tokens, longest)
    ]
    for prompt in prompts:
        llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)


def reuse(side: str, model: Path, media: Path) -> dict[str, dict[str, float]]:
    """Clips that grew or were trimmed, and a clip whose last KV blocks are gone."""
    # KV cache for less than two of the clips.
    small = {"max_model_len": WHOLE, "num_gpu_blocks_override": 160}
    llm = start(model, media, **(options(side, WHOLE) | small))
    found = {}
    with asked_again(llm, media / "short.mp4", media / "clip.mp4") as found["extended"]:
        pass
    with asked_again(llm, media / "clip.mp4", media / "trimmed.mp4") as found["trimmed"]:
        pass
    with asked_again(llm, media / "clip.mp4", media / "clip.mp4") as found["partial KV loss"]:
        evict(llm, 3584)
        # Else the encoder's outputs would still be there, and nothing to encode for either side.
        llm.llm_engine.engine_core.reset_encoder_cache()
    return found


def long_video(side: str, model: Path, media: Path, file: str) -> tuple[dict[str, Any], StepTrace]:
    """One video with chunked prefill: sizes of encoder calls, and the steps."""
    llm = start(model, media, **options(side, CHUNK))
    with record_encoder_calls(llm) as calls, record_steps(llm) as trace:
        prompt = ask(llm, media / file)
    return {
        "prompt": prompt,
        "items": len(trace.encoded()),
        "max_patches": max(calls),
        "calls": len(calls),
        "overlapping_steps": trace.overlapping_steps(),
    }, trace


def main(side: str, model: Path, media: Path) -> None:
    """Print what was found as JSON."""
    found: dict[str, Any] = {"reuse": reuse(side, model, media)}
    gc.collect()
    # Stock vLLM takes no video larger than its encoder cache.
    file = "huge.mp4" if side == "plugin" else "long.mp4"
    found["long"], trace = long_video(side, model, media, file)
    found["steps"] = json.loads(trace.to_json())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
