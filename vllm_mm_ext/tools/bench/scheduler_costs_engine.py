"""Times every step of an engine that does all kinds of work at once: for ``scheduler_costs.py``.

Run as a program with ``SIDE MODEL``; prints what was found as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import astuple
from typing import Any

import numpy as np

from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.tools.bench.scheduler_costs import StepContents

# Rounds of traffic; the first ones, with what is only initialised then, do not count.
_ROUNDS = 14
_FIRST = 2
_VIDEOS_MOST = 8
_STEP_TOKENS = 1024
_PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"


def _start(model: str) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    return LLM(
        model,
        dtype="float32" if current_platform.is_cpu() else "auto",
        enforce_eager=True,
        block_size=32,
        max_model_len=8192,
        max_num_seqs=16,
        max_num_batched_tokens=_STEP_TOKENS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        limit_mm_per_prompt={"video": _VIDEOS_MOST, "image": 0},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
    )


def _text(rng: Any, tokens: int) -> Any:
    return {"prompt_token_ids": rng.integers(5, 250, tokens).tolist()}


def _videos(rng: Any, count: int, frames: int) -> Any:
    """A prompt with some videos, each an item, of so many frames."""
    media = []
    for _ in range(count):
        pixels = rng.integers(0, 255, (frames, 224, 448, 3), dtype=np.uint8)
        metadata = {
            "total_num_frames": frames,
            "fps": 2.0,
            "duration": frames / 2,
            "video_backend": "opencv",
            "frames_indices": list(range(frames)),
            "do_sample_frames": False,
        }
        media.append((pixels, metadata))
    return {"prompt": f"see {_PLACEHOLDER * count} what", "multi_modal_data": {"video": media}}


class _Watch:
    """An engine whose steps are timed."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._schedule, self._scheduler.schedule = self._scheduler.schedule, self._noted
        self._contents = StepContents()
        self._count = 0
        self.steps: list[tuple[StepContents, float]] = []

    def _noted(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self._contents = StepContents.of(self._scheduler.requests, output)
        return output

    def add(self, prompt: Any, answer: int) -> None:
        from vllm import SamplingParams

        self._count += 1
        sampling = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        self._engine.add_request(f"r{self._count}", prompt, sampling)

    def run(self, most: int = 1 << 20) -> None:
        """Take steps until nothing is left to do, or so many."""
        for _ in range(most):
            if not self._engine.has_unfinished_requests():
                return
            began = time.perf_counter()
            self._engine.step()
            self.steps.append((self._contents, time.perf_counter() - began))


def _round(watch: _Watch, rng: Any) -> None:
    """Decodes beside prompts and videos of all sizes, then each of these alone."""
    for _ in range(int(rng.integers(1, 10))):
        watch.add(_text(rng, int(rng.choice([32, 400, 1500]))), int(rng.integers(20, 40)))
    watch.run(12)
    watch.add(_text(rng, int(rng.integers(16, 800))), 4)
    watch.run(3)
    watch.add(_videos(rng, int(rng.integers(1, 8)), 2 * int(rng.integers(1, 4))), 4)
    watch.run(4)
    watch.add(_text(rng, int(rng.integers(16, 500))), 4)
    watch.add(_videos(rng, 1, 2 * int(rng.integers(2, 32))), 4)
    watch.run()
    watch.add(_text(rng, int(rng.integers(500, 4000))), 3)
    watch.run()


def main(model: str) -> None:
    """Measure, and print."""
    import vllm
    from vllm.platforms import current_platform

    watch = _Watch(_start(model))
    rng = np.random.default_rng(0)
    for number in range(_ROUNDS):
        if number == _FIRST:
            watch.steps.clear()
        _round(watch, rng)
    steps = [(astuple(contents), seconds) for contents, seconds in watch.steps]
    device = current_platform.get_device_name() or "CPU"
    print(json.dumps({"steps": steps, "vllm": vllm.__version__, "device": device}))


if __name__ == "__main__":
    main(sys.argv[2])
