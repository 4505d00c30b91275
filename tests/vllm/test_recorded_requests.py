"""A request with bare items is sent once more with whole ones if an output is missing, and once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_mm_ext.adapters.serving.encoder_asks import EncoderAsks, Job
from vllm_mm_ext.adapters.serving.recorded_requests import answered, rendered
from vllm_mm_ext.media.recorded import RecordError
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.request.media_items import MediaItem

RENDERED = (["conversation"], ["whole prompt"])


def new_job() -> Job:
    asks = EncoderAsks((), {}, 1.0)
    job = asks.job({"messages": [{"content": [{"type": "video_url"}]}]}, b"", {}, None)
    assert job is not None
    return job


def output(*tokens: int, ends: str | None = None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, finish_reason=ends)])


class Engine:
    """Answers each prompt with given outputs."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = iter(answers)
        self.prompts: list[Any] = []
        self.closed = 0

    async def generate(self, prompt: Any) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        try:
            for one in next(self.answers):
                yield one
        finally:
            self.closed += 1


async def outputs_of(engine: Engine, job: Job) -> list[Any]:
    return [one async for one in answered(job, engine.generate, "bare prompt")]


async def whole_prompt(job: Job) -> None:
    async def again() -> Any:
        return RENDERED

    job.whole = lambda: asyncio.get_running_loop().create_task(again())


async def test_a_request_that_ends_before_its_first_token_is_sent_again_with_whole_items() -> None:
    job, answer = new_job(), [output(1), output(2, ends="stop")]
    await whole_prompt(job)
    engine = Engine([output(), output(ends="error")], answer)
    assert await outputs_of(engine, job) == [output(), *answer]
    assert engine.prompts == ["bare prompt", "whole prompt"]
    assert engine.closed == 2


@pytest.mark.parametrize(
    "answer",
    [[output(1), output(2, ends="stop")], [output(1), output(ends="error")], [output(ends="stop")]],
)
async def test_any_other_answer_goes_to_the_client_as_it_is(answer: list[Any]) -> None:
    job = new_job()
    await whole_prompt(job)
    engine = Engine(answer)
    assert await outputs_of(engine, job) == answer
    assert engine.prompts == ["bare prompt"]


async def test_a_request_that_fails_with_whole_items_too_fails() -> None:
    job = new_job()
    await whole_prompt(job)
    engine = Engine([output(ends="error")], [output(ends="error")])
    assert await outputs_of(engine, job) == [output(ends="error")]


async def test_a_client_that_leaves_ends_the_engine_s_request() -> None:
    job = new_job()
    await whole_prompt(job)
    engine = Engine([output(1), output(2)])
    stream: Any = answered(job, engine.generate, "bare prompt")
    await anext(stream)
    await stream.aclose()
    assert engine.closed == 1


async def test_a_conversation_whose_records_do_not_fit_is_rendered_without_them() -> None:
    job, taken = new_job(), []
    context = RequestContext(elsewhere=job)
    context.add([MediaItem("video", "http://host/a.mp4")])
    enter_request(context)

    async def render() -> Any:
        taken.append(job.takes_records)
        item = context.claim("video", "http://host/a.mp4")
        assert item is context.items[0]
        if job.takes_records:
            job.used_records += 1
            raise RecordError("other segments")
        return RENDERED

    assert await rendered(render) == RENDERED
    assert taken == [True, False]
    assert (job.used_records, job.whole) == (0, None)


async def test_what_renders_a_request_again_is_kept_only_while_the_request_lives() -> None:
    job = new_job()
    enter_request(RequestContext(elsewhere=job))

    async def render() -> Any:
        job.used_records = int(job.takes_records)
        return RENDERED

    assert await rendered(render) == RENDERED
    assert job.whole is not None
    assert await job.whole() == RENDERED
    assert not job.takes_records
    job.whole = lambda: None  # type: ignore[assignment]
    job.end()
    assert job.whole is None
