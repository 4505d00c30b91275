"""One side's engine under mixed traffic: the measurements of ``mixed-traffic``.

Run by ``mixed_traffic.py`` with ``SIDE MODEL TARGET_MS SLOTS STEP_TOKENS``; asked by lines of JSON.
Prompts are rendered before anything is timed, so only the engine works in between.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mm_ext.testing.engine_arguments import SCHEDULER
from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.tools.bench.inprocess import answer_questions

PROMPT = "see <|vision_start|><|video_pad|><|vision_end|> what"
# Text arrives each time that a lone request would have got so many tokens: often enough that a wait
# for each prompt is more than one gap in a hundred, so p99 sees it. Prompts and answers are of so
# many tokens.
TEXT_EVERY_TOKENS = 78
TEXT_PROMPT = 192
TEXT_ANSWER = 160
VIDEO_EVERY_S = 2.0
# By the first one the text stream is steady: before, there are moments when nothing decodes.
FIRST_VIDEO_S = 2.0
# What a video takes of stock when nothing else is to do.
VIDEO_S = 1.1
VIDEO_HEIGHT, VIDEO_WIDTH = 224, 448
VIDEO_FRAMES = 64
# With the least there is room for text in the second of a video's steps; the most is what stock
# makes room for in its encoder cache.
VIDEO_FRAMES_LEAST, VIDEO_FRAMES_MOST = 30, 64
VIDEO_ANSWER = 8
CALIBRATIONS = 9
PACE_TEXTS = 3
SECONDS = 28.0
# Steps of stock that a video's prompt fills: it takes two, and the second has room for text.
STEPS_PER_VIDEO = 1.4
SEGMENT_TOKENS = 64
BLOCK = 32
QUEUED_VIDEOS = 6
QUEUE_SLOTS = 4


@dataclass(frozen=True)
class Load:
    """What is sent, in terms of how fast stock is on this machine at this time.

    Attributes:
        text_every_s: Mean seconds between texts.
        video_frames: Frames of each video.
        step_tokens: Most tokens of a step.
    """

    text_every_s: float
    video_frames: int
    step_tokens: int

    @classmethod
    def of(cls, token_s: float, video_s: float, video_tokens: float) -> Load:
        """The load for an engine, from what it takes for a token and for ``VIDEO_FRAMES``.

        Args:
            token_s: Seconds of a token.
            video_s: Seconds to the first token of such a video.
            video_tokens: Tokens of its prompt.
        """
        frames = VIDEO_FRAMES * VIDEO_S / video_s
        pairs = round(min(max(frames, VIDEO_FRAMES_LEAST), VIDEO_FRAMES_MOST) / 2)
        tokens = video_tokens * 2 * pairs / VIDEO_FRAMES / STEPS_PER_VIDEO
        return cls(TEXT_EVERY_TOKENS * token_s, 2 * pairs, BLOCK * round(tokens / BLOCK))

    def paced(self, token_s: float) -> Load:
        """The same videos, and texts for an engine that takes so long for a token."""
        return replace(self, text_every_s=TEXT_EVERY_TOKENS * token_s)


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


async def start(side: str, model: Path, target_ms: float, slots: int, step_tokens: int) -> Any:
    """An engine in a process of its own, used from the loop that starts it."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
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
            # Without instructions for bfloat16 a CPU converts operands, in small steps dearly.
            dtype="float32" if current_platform.is_cpu() else "auto",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=8192,
            max_num_seqs=slots,
            max_num_batched_tokens=step_tokens,
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

    async def video(self, count: int = VIDEO_FRAMES) -> Any:
        """A prompt with a video of ``count`` frames, decoded and preprocessed."""
        frames = self._rng.integers(0, 255, (count, VIDEO_HEIGHT, VIDEO_WIDTH, 3), dtype=np.uint8)
        metadata = {
            "total_num_frames": count,
            "fps": 2.0,
            "duration": count / 2,
            "video_backend": "opencv",
            "frames_indices": list(range(count)),
            "do_sample_frames": False,
        }
        prompt = {"prompt": PROMPT, "multi_modal_data": {"video": [(frames, metadata)]}}
        (made,) = await self._engine.renderer.render_cmpl_async([prompt])
        return made


class Traffic:
    """One side's engine, and what is sent to it.

    Args:
        engine: vLLM's ``AsyncLLM``.
    """

    def __init__(self, engine: Any) -> None:
        self._driver, self._prompts = Driver(engine), Prompts(engine)

    async def warm_up(self) -> None:
        """Pay for lazy initialisation; the plugin learns what steps cost."""
        prompts = self._prompts
        await self._driver.run(
            [(0.0, await prompts.video(), 40)]
            + [(0.1 * n, await prompts.text(), 20) for n in range(5)]
            + [(1.0, await prompts.video(), 4)]
        )

    async def alone(self) -> dict[str, float]:
        """Seconds of a token, of a text's first token and of a video's, each request alone.

        With them, how many tokens the video's prompt has.
        """
        found: dict[str, list[float]] = {
            name: [] for name in ("token_s", "text_s", "video_s", "video_tokens")
        }
        for _ in range(CALIBRATIONS):
            (text,) = await self._driver.run([(0.0, await self._prompts.text(), TEXT_ANSWER)])
            found["token_s"].append(float(np.median(np.diff(text.tokens))))
            found["text_s"].append(text.tokens[0] - text.sent)
            prompt = await self._prompts.video()
            (video,) = await self._driver.run([(0.0, prompt, 1)])
            found["video_tokens"].append(len(prompt["prompt_token_ids"]))
            found["video_s"].append(video.tokens[0] - video.sent)
        return {name: float(np.median(values)) for name, values in found.items()}

    async def pace(self) -> float:
        """Seconds of a token of a text that is alone, as the machine is now."""
        found = []
        for _ in range(PACE_TEXTS):
            (text,) = await self._driver.run([(0.0, await self._prompts.text(), TEXT_ANSWER)])
            found += np.diff(text.tokens).tolist()
        return float(np.median(found))

    async def mixed(self, load: Load) -> dict[str, Any]:
        """The text stream alone, then with videos."""
        # Steady, but neither in step with the videos nor with how long answers take.
        spaces = np.random.default_rng(1).uniform(0.5, 1.5, int(SECONDS / load.text_every_s))
        times = load.text_every_s * (np.cumsum(spaces) - 0.5)

        async def stream() -> list[tuple[float, Any, int]]:
            return [(float(at), await self._prompts.text(), TEXT_ANSWER) for at in times]

        videos = [
            (float(at), await self._prompts.video(load.video_frames), VIDEO_ANSWER)
            for at in np.arange(FIRST_VIDEO_S, SECONDS, VIDEO_EVERY_S)
        ]
        alone = await self._driver.run(await stream())
        texts = await stream()
        together = await self._driver.run([*texts, *videos])
        return {
            "alone": _described(alone),
            "text": _described(together[: len(texts)]),
            "videos": _described(together[len(texts) :]),
        }

    async def queued(self, load: Load) -> dict[str, Any]:
        """Videos for more than all slots, then a text request."""
        videos = [
            (0.0, await self._prompts.video(load.video_frames), 2 * VIDEO_ANSWER)
            for _ in range(QUEUED_VIDEOS)
        ]
        text = (0.3, await self._prompts.text(), VIDEO_ANSWER)
        *seen, answered = await self._driver.run([*videos, text])
        ends = sorted(one.tokens[-1] for one in seen)
        return {"text_s": answered.tokens[-1], "videos_s": ends}


def _described(requests: Sequence[Timed]) -> dict[str, Any]:
    return {
        "ttft_s": [one.tokens[0] - one.sent for one in requests],
        "itl_s": [float(gap) for one in requests for gap in np.diff(one.tokens)],
        "ends_s": [one.tokens[-1] for one in requests],
    }


def main(side: str, model: Path, target_ms: float, slots: int, step_tokens: int) -> None:
    """Start an engine, and measure what is asked for.

    A question is ``["alone"]``, ``["pace"]``, or ``mixed`` or ``queued`` with a load.
    """
    with asyncio.Runner() as runner:
        engine = runner.run(start(side, model, target_ms, slots, step_tokens))
        traffic = Traffic(engine)
        runner.run(traffic.warm_up())

        def answer(question: list[Any]) -> Any:
            what, *load = question
            return runner.run(getattr(traffic, what)(*(Load(**one) for one in load)))

        answer_questions(answer)
        engine.shutdown()


if __name__ == "__main__":
    side, model, target_ms, slots, step_tokens = sys.argv[1:]
    main(side, Path(model), float(target_ms), int(slots), int(step_tokens))
