"""Load tiers in a real service with two API servers."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import openai
import psutil
import pytest

from vllm_mm_ext.base.shared_state import SharedState
from vllm_mm_ext.config.quality_settings import TierSettings
from vllm_mm_ext.policies.quality.service_tier import ServiceTier
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.server import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SETTINGS = TierSettings(hold_s=600.0)


def states_of(server: Server) -> dict[int, Path]:
    """The shared state that each process of the service has open, by process id."""
    found = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            if "mm_ext-state-" in str(descriptor.readlink()):
                found[process.pid] = descriptor
    return found


async def _crowd(server: Server, count: int, tier: ServiceTier) -> list[int]:
    """Levels seen while ``count`` requests run, each over a connection of its own."""

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            await client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": "count"}],
                max_tokens=200,
                extra_body={"ignore_eos": True},
            )

    running = asyncio.gather(*(ask() for _ in range(count)))
    levels = []
    while not running.done():
        levels.append(tier.level(time.monotonic()))
        await asyncio.sleep(0.02)
    await running
    return levels


async def _levels(server: Server, urls: list[str]) -> list[int]:
    """Tiers of videos, each asked about over a connection of its own."""
    levels = []
    for url in urls:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(
                model=server.model,
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "video_url", "video_url": {"url": url}}],
                    }
                ],
                max_tokens=1,
            )
        levels.append(answer.model_dump()["mm_ext"]["videos"][0]["level"])
    return levels


# With vLLM's own scheduler the stat logger alone publishes, which takes a server of its own.
@pytest.mark.parametrize("plugin_scheduler", [False, True])
def test_all_api_servers_share_a_tier_that_follows_the_load(
    tmp_path: Path, plugin_scheduler: bool
) -> None:
    urls = []
    for seed in range(9):
        clip = tmp_path / f"{seed}.mp4"
        make_clip(clip, duration=4.0, seed=seed, fps=10)
        urls.append(clip.as_uri())
    first, rest = urls[0], urls[1:]
    with serve(
        checkpoint("qwen2_5_vl"),
        plugin=True,
        args=[
            *("--api-server-count", "2", "--max-num-seqs", "8", "--max-model-len", "2048"),
            *("--allowed-local-media-path", str(tmp_path)),
            *(("--scheduler-cls", "vllm_mm_ext.scheduler.MMExtScheduler") * plugin_scheduler),
        ],
        # Long enough that the tier outlasts the questions about it.
        additional_config={"mm_ext": {"quality": {"tiers": {"hold_s": 600}}}},
    ) as server:
        states = states_of(server)
        assert len(states) == 3
        (file,) = {path.readlink() for path in states.values()}
        # Nothing is left to clean up.
        assert str(file).endswith("(deleted)")
        state = SharedState(os.open(next(iter(states.values())), os.O_RDWR))
        tier = ServiceTier(SETTINGS, state)
        assert tier.level(time.monotonic()) == 0
        assert asyncio.run(_levels(server, [first])) == [0]
        levels = [0]
        for _ in range(5):
            # Where the machine is busy, a crowd may be gone before a load is measured.
            levels += asyncio.run(_crowd(server, 16, tier))
            if max(levels) == 2:
                break
        assert max(levels) == 2
        load = state.load(0)
        assert load is not None
        # The engine's last word before it falls idle says so.
        assert (load.running, load.waiting, load.slots) == (0, 0, 8)
        # API servers publish for engines that do not, and leave alone what an engine publishes.
        assert load.by_engine == plugin_scheduler
        assert tier.level(load.time + 2 * SETTINGS.hold_s) == 0
        # Any API server gives a new video the tier, and one that was asked about before its own.
        assert asyncio.run(_levels(server, rest)) == [2] * len(rest)
        assert asyncio.run(_levels(server, [first] * 4)) == [0] * 4
        state.close()
