"""What calibration finds in logged steps."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from aiohttp import ClientSession, web

from vllm_mm_ext.planner.estimate import Timing
from vllm_mm_ext.planner.host_work import MediumWork
from vllm_mm_ext.planner.request_tokens import ItemTokens, MediumTokens, RequestTokens, Stages
from vllm_mm_ext.planner.step_costs import StepCosts
from vllm_mm_ext.planner.workload import Video, Workload
from vllm_mm_ext.tools.calibration.asker import Asked, Asker
from vllm_mm_ext.tools.calibration.observations import (
    LoggedStep,
    Observations,
    _cached,
    _engine_threads,
    _Row,
    _steps,
)

VIDEO = Workload((Video(4.0, 1.0, 640, 360, sound=False),))
COSTS = StepCosts(0.01, 0.001, 1e-7, 0.002, 1e-4, 1e-8, 0.001, 0.001, 1e-5, 1e-9, 1e-5)


def steps(seconds: float) -> list[LoggedStep]:
    """Steps of one request that decodes, as a server with one slot logs them."""
    return [
        LoggedStep(at, at + seconds, [("ask-1-", 1, 64 + at, 64, [])]) for at in map(int, range(8))
    ]


def test_one_slot_is_enough_to_tell_how_many_cores_a_step_takes() -> None:
    # Three cores busy of four, and a step that takes all of them: 7 cores are wanted of 4.
    alone = COSTS.step + COSTS.decodes
    seen = Observations([], [], [], [], (steps(alone * 7 / 4), steps(alone)), 0.0, 1.0, cores=4)
    assert _engine_threads(seen, COSTS) == pytest.approx(4.0, rel=0.01)
    # One core: beside a thread, a step that would have it to itself takes twice as long.
    twice = replace(seen, busy_steps=(steps(alone * 2), steps(alone)), cores=1)
    assert _engine_threads(twice, COSTS) == pytest.approx(1.0, rel=0.01)
    # The API server wants the core, too: by itself a step is as fast as was measured all the same.
    thrice = replace(seen, busy_steps=(steps(alone * 3), steps(alone)), cores=1)
    assert _engine_threads(thrice, COSTS) == 1.0
    with pytest.raises(ValueError, match="repeat"):
        _engine_threads(replace(seen, busy_steps=([], steps(alone))), COSTS)


def follow_up(inputs: int, seconds: float) -> _Row:
    medium = MediumWork("h264", 20.0, 2.0, 0.0, inputs, inputs)
    # What took the time does not matter.
    return _Row((medium,), seconds - 0.001, 0.0, 0.0, 0.001)


def test_media_in_caches_cost_what_follow_ups_took_beyond_a_request_without_media() -> None:
    rows = [follow_up(inputs, 0.005 + 0.006 + 2e-7 * inputs) for inputs in (1000, 5000, 15000)]
    assert _cached(rows, request_s=0.005) == pytest.approx([0.006, 2e-7], rel=0.02)
    assert _cached([], request_s=0.005) == []
    # Faster than a request without media: by chance.
    assert max(_cached([follow_up(1000, 0.004)], request_s=0.005)) < 0.001


def test_encoder_inputs_count_in_the_first_step_of_their_request_encoded_or_not() -> None:
    def asked(number: int, workload: Workload) -> Asked:
        return Asked(f"ask-{number}-", workload, Timing(0.0), 110)

    seen = [
        LoggedStep(0.0, 1.0, [("ask-1-", 60, 0, 110, [0])]),
        LoggedStep(1.0, 2.0, [("ask-1-", 50, 60, 110, [1])]),
        LoggedStep(2.0, 3.0, [("ask-2-", 10, 110, 120, []), ("ask-1-", 1, 110, 110, [])]),
        LoggedStep(3.0, 4.0, [("ask-3-", 110, 0, 110, [])]),
    ]
    item = ItemTokens("video", 400, 100, 50)
    medium = MediumTokens(
        "video", 4.0, (640, 360), (140, 140), 0.0, Stages(4, 100, 100, 100, 0, 0), (item,) * 2, 100
    )
    texts = RequestTokens(text=110, output=5)
    counted = {VIDEO: RequestTokens(text=10, output=5, media=(medium,)), Workload(): texts}
    observations = Observations(
        [asked(1, VIDEO)], [asked(2, VIDEO)], [asked(3, Workload())], seen, ([], []), 0.0, 1.0, 2
    )
    found = [contents for contents, _ in _steps(observations, counted.__getitem__)]
    assert [one.inputs for one in found] == [800, 0, 800, 0]
    assert [one.vision for one in found] == [400, 400, 0, 0]


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
