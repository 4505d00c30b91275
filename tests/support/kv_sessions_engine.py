"""What a session's media keep in an engine that is short of KV, asked as endpoints would ask it.

Run by ``test_kv_engine`` in a process of its own with the model; prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_mm_ext.policies.kv.control import KVClient
from vllm_mm_ext.testing.server import KV_CACHE_BYTES
from vllm_mm_ext.tools.bench.mixed_engine import Prompts

FRAMES = 12
BLOCK = 32
# A video has some 24 of them: there is room for four.
BLOCKS = 96
SESSION = "conversation"


def start(model: Path) -> Any:
    """An engine in a process of its own."""
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=2,
            block_size=BLOCK,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            num_gpu_blocks_override=BLOCKS,
            limit_mm_per_prompt={"video": 1, "image": 0},
            # Rendered ahead: the caches of both processes would not see requests in one order.
            mm_processor_cache_gb=0,
        )
    )


class Asker:
    """Asks about videos, one at a time."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._count = engine, 0

    async def __call__(self, prompt: Any, session: str | None = None) -> int:
        """Tokens of the prompt that were found in KV."""
        self._count += 1
        cached = 0
        sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        name = f"r{self._count}"
        async for output in self._engine.generate(prompt, sampling, name, session_id=session):
            cached = output.num_cached_tokens or 0
        return cached


async def main(model: Path) -> dict[str, Any]:
    engine = start(model)
    try:
        ask, client, prompts = Asker(engine), KVClient(engine), Prompts(engine)
        found: dict[str, Any] = {}

        async def churn() -> None:
            for _ in range(6):
                await ask(await prompts.video(FRAMES))

        prompt = await prompts.video(FRAMES)
        await ask(prompt, SESSION)
        found["tokens"] = len(prompt["prompt_token_ids"])
        found["listed"] = await client.media()
        await client.pin(SESSION)
        await churn()
        found["pinned"] = await ask(prompt)
        await client.unpin(SESSION)
        await client.release(SESSION)
        await churn()
        found["released"] = await ask(prompt)
        return found
    finally:
        engine.shutdown()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
