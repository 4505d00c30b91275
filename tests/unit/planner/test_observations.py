"""What calibration finds in logged steps."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from aiohttp import ClientSession, web

from vllm_mm_ext.planner.step_costs import StepCosts
from vllm_mm_ext.planner.workload import Workload
from vllm_mm_ext.tools.calibration.asker import Asker
from vllm_mm_ext.tools.calibration.observations import LoggedStep, Observations, _engine_threads

COSTS = StepCosts(0.01, 0.001, 1e-7, 0.002, 1e-4, 1e-8, 0.001, 0.001, 1e-5, 1e-9, 1e-5)


def steps(seconds: float) -> list[LoggedStep]:
    """Steps of one request that decodes, as a server with one slot logs them."""
    return [
        LoggedStep(at, at + seconds, [("ask-1-", 1, 64 + at, 64, [])]) for at in map(int, range(8))
    ]


def test_one_slot_is_enough_to_tell_how_many_cores_a_step_takes() -> None:
    # Three cores busy of four, and a step that takes all of them: 7 cores are wanted of 4.
    alone = COSTS.step + COSTS.decodes
    seen = Observations([], [], [], (steps(alone * 7 / 4), steps(alone)), 0.0, 1.0, cores=4)
    assert _engine_threads(seen, COSTS) == pytest.approx(4.0, rel=0.01)
    with pytest.raises(ValueError, match="repeat"):
        _engine_threads(replace(seen, busy_steps=([], steps(alone))), COSTS)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (429, b"too many", "429: too many"),
        (200, b'data: {"error": {"message": "engine died"}}\n\n', "broke off"),
    ],
)
def test_an_answer_that_is_refused_or_breaks_off_is_told(
    status: int, body: bytes, words: str, tmp_path
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async def asked() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with ClientSession() as session:
                asker = Asker(session, f"http://127.0.0.1:{port}", tmp_path)
                await asker.one(Workload(), {"request_id": "ask-1-"})
        finally:
            await runner.cleanup()

    with pytest.raises(RuntimeError, match=words):
        asyncio.run(asked())
