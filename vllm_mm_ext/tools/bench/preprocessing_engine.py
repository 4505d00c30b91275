"""Time on the preprocessing thread: what one side's multimodal processor takes per request.

Run by ``preprocessing_bench.py`` as a module of its own, with ``SIDE MEDIA``.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.tools.bench.inprocess import ask, start

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni")
TURNS = 3


def time_processor(llm: Any) -> list[float]:
    """Seconds of every call of the processor from now on: splitting, hashing, HF, prompt."""
    seconds: list[float] = []
    processor = llm.renderer.mm_processor
    original = processor.apply

    def apply(*args: Any, **kwargs: Any) -> Any:
        # vLLM runs it on the one thread of its renderer, and nothing else there.
        started = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    processor.apply = apply
    return seconds


def measure(side: str, family: str, media: Path) -> dict[str, list[float]]:
    """Seconds per turn over all videos, and of audio items where the family hears."""
    omni = family.endswith("omni")
    config = {"mm_ext": {"media": {"audio": {"in_video": "off"}}}}
    llm = start(
        checkpoint(family),
        media,
        max_model_len=16384,
        max_num_batched_tokens=16384,
        limit_mm_per_prompt={"video": 1, "image": 0} | ({"audio": 1} if omni else {}),
        media_io_kwargs={"video": {"fps": 1, "max_frames": 32}},
        additional_config=config if side == "plugin" else {},
    )
    seconds = time_processor(llm)
    files = sorted(media.glob("*.mp4"))
    # The first request pays for lazy imports.
    ask(llm, files[0], max_tokens=1)
    found: dict[str, list[float]] = {f"turn {turn}": [] for turn in range(1, TURNS + 1)}
    for file in files[1:]:
        for turn in range(1, TURNS + 1):
            seconds.clear()
            ask(llm, file, turn, max_tokens=1)
            found[f"turn {turn}"].append(sum(seconds))
    if omni:
        found["audio"] = []
        for number, file in enumerate(sorted(media.glob("*.wav"))):
            seconds.clear()
            hear(llm, file)
            if number:
                found["audio"].append(sum(seconds))
    return found


def hear(llm: Any, file: Path) -> None:
    """Ask about a sound."""
    from vllm import SamplingParams

    content = [{"type": "audio_url", "audio_url": {"url": file.as_uri()}}]
    messages: Any = [{"role": "user", "content": content}]
    llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False)


def main(side: str, media: Path) -> None:
    """Print seconds by family and what was asked."""
    found = {}
    for family in FAMILIES:
        found[family] = measure(side, family, media)
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
