"""One side's engine under mixed traffic: the measurements of ``mixed-traffic``.

Run by ``mixed_traffic.py``: ``python -m vllm_mm_ext.bench.mixed_engine SIDE MODEL TARGET_MS``.
Prompts are rendered before anything is timed, so only the engine works in between.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mm_ext.testing.engine_arguments import SCHEDULER
from vllm_mm_ext.testing.server import KV_CACHE_BYTES

PROMPT = "see <|vision_start|><|video_pad|><|vision_end|> what"
# Text arrives every so many seconds, out of step with the videos; prompts and answers of so many
# tokens.
TEXT_EVERY_S = 0.8
TEXT_PROMPT = 384
TEXT_ANSWER = 80
VIDEO_EVERY_S = 2.0
VIDEO_FRAMES = 64
VIDEO_ANSWER = 8
SECONDS = 30.0
# Prompts of more than this are computed in pieces, by stock too.
BATCHED_TOKENS = 1024
SEGMENT_TOKENS = 64
QUEUED_VIDEOS = 6
QUEUE_SLOTS = 4


@dataclass
class Timed:
    """One request, in seconds since the start of its phase.

    Attributes:
        sent: When it was sent.
        tokens: When each token came.
    """

    sent: float
    tokens: list[float] = field(default_factory=list)


class Driver:
    """Sends rendered prompts at their times.

    Args:
        engine: vLLM's ``AsyncLLM``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._count = 0

    async def run(self, schedule: Sequence[tuple[float, Any, int]]) -> list[Timed]:
        """Send each ``(seconds, prompt, tokens of the answer)`` and wait for all answers."""
        started = time.perf_counter()
        return list(await asyncio.gather(*(self._one(started, *request) for request in schedule)))

    async def _one(self, started: float, at: float, prompt: Any, answer: int) -> Timed:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=answer,
            temperature=0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        self._count += 1
        timed = Timed(time.perf_counter() - started)
        async for output in self._engine.generate(prompt, sampling, f"r{self._count}"):
            now = time.perf_counter() - started
            timed.tokens += [now] * len(output.outputs[0].token_ids)
        return timed


def start(side: str, model: Path, target_ms: float, slots: int) -> Any:
    """An engine in a process of its own."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    extra: dict[str, Any] = {}
    if side == "plugin":
        settings = {
            "segments": {"tokens": SEGMENT_TOKENS},
            "scheduler": {"target_itl_ms": target_ms},
        }
        extra = {**SCHEDULER, "additional_config": {"mm_ext": settings}}
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            enforce_eager=True,
            block_size=32,
            max_model_len=8192,
            max_num_seqs=slots,
            max_num_batched_tokens=BATCHED_TOKENS,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            limit_mm_per_prompt={"video": 1, "image": 0},
            # Rendered ahead: the caches of both processes would not see requests in one order.
            mm_processor_cache_gb=0,
            **extra,
        )
    )


class Prompts:
    """Rendered prompts that never repeat.

    Args:
        engine: vLLM's ``AsyncLLM``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._rng = np.random.default_rng(0)

    async def text(self) -> Any:
        """A text prompt."""
        tokens = self._rng.integers(5, 250, TEXT_PROMPT).tolist()
        (made,) = await self._engine.renderer.render_cmpl_async([{"prompt_token_ids": tokens}])
        return made

    async def video(self) -> Any:
        """A prompt with a video, decoded and preprocessed."""
        shape = (VIDEO_FRAMES, 224, 448, 3)
        frames = self._rng.integers(0, 255, shape, dtype=np.uint8)
        metadata = {
            "total_num_frames": VIDEO_FRAMES,
            "fps": 2.0,
            "duration": VIDEO_FRAMES / 2,
            "video_backend": "opencv",
            "frames_indices": list(range(VIDEO_FRAMES)),
            "do_sample_frames": False,
        }
        prompt = {"prompt": PROMPT, "multi_modal_data": {"video": [(frames, metadata)]}}
        (made,) = await self._engine.renderer.render_cmpl_async([prompt])
        return made


async def mixed(side: str, model: Path, target_ms: float) -> dict[str, Any]:
    """The text stream alone, then with videos."""
    engine = start(side, model, target_ms, slots=16)
    try:
        driver, prompts = Driver(engine), Prompts(engine)

        async def stream() -> list[tuple[float, Any, int]]:
            times = np.arange(0.0, SECONDS, TEXT_EVERY_S)
            return [(float(at), await prompts.text(), TEXT_ANSWER) for at in times]

        videos = [
            (float(at), await prompts.video(), VIDEO_ANSWER)
            for at in np.arange(0.5, SECONDS, VIDEO_EVERY_S)
        ]
        # The first requests pay for lazy initialisation; the plugin learns what steps cost.
        await driver.run(
            [(0.0, await prompts.video(), 40)]
            + [(0.1 * n, await prompts.text(), 20) for n in range(5)]
            + [(1.0, await prompts.video(), 4)]
        )
        alone = await driver.run(await stream())
        texts = await stream()
        together = await driver.run([*texts, *videos])
        return {
            "alone": _described(alone),
            "text": _described(together[: len(texts)]),
            "videos": _described(together[len(texts) :]),
        }
    finally:
        engine.shutdown()


async def queued(side: str, model: Path, target_ms: float) -> dict[str, Any]:
    """Videos for more than all slots, then a text request."""
    engine = start(side, model, target_ms, slots=QUEUE_SLOTS)
    try:
        driver, prompts = Driver(engine), Prompts(engine)
        await driver.run([(0.0, await prompts.video(), 4), (0.0, await prompts.text(), 4)])
        videos = [(0.0, await prompts.video(), 2 * VIDEO_ANSWER) for _ in range(QUEUED_VIDEOS)]
        text = (0.3, await prompts.text(), VIDEO_ANSWER)
        *seen, answered = await driver.run([*videos, text])
        ends = sorted(one.tokens[-1] for one in seen)
        return {"text_s": answered.tokens[-1], "videos_s": ends}
    finally:
        engine.shutdown()


def _described(requests: Sequence[Timed]) -> dict[str, Any]:
    return {
        "ttft_s": [one.tokens[0] - one.sent for one in requests],
        "itl_s": [float(gap) for one in requests for gap in np.diff(one.tokens)],
        "ends_s": [one.tokens[-1] for one in requests],
    }


def main(side: str, model: Path, target_ms: float) -> None:
    """Print what was found as JSON."""
    found = asyncio.run(mixed(side, model, target_ms))
    found["queued"] = asyncio.run(queued(side, model, target_ms))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
