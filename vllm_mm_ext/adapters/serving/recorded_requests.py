"""Requests whose videos another instance decodes, and the same once more with their videos.

A request that goes to the engine with bare items (``recorded_items``) may come back without a
token: an encoder output that it needs is gone, or never came. Then its conversation is rendered
again, with its videos decoded here as if there were no records, and the client notices nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.media.recorded import RecordError
from vllm_mm_ext.request.context import EncodeJob, RequestContext, current_request


async def rendered(render: Callable[[], Awaitable[Any]]) -> Any:
    """A conversation as vLLM renders it, by records of its videos where there are some.

    Args:
        render: Renders the current conversation; may be called again.
    """
    context = current_request()
    job = None if context is None else context.elsewhere
    if context is None or job is None:
        return await render()
    found = None
    try:
        found = await render()
    except RecordError as error:
        _without_records(context, job, str(error))
    if found is None:
        return await render()
    if job.used_records:
        own = contextvars.copy_context()

        async def again() -> Any:
            _without_records(context, job, "an encoder output that a request needs is missing")
            return await render()

        def whole() -> asyncio.Task[Any]:
            return asyncio.get_running_loop().create_task(again(), context=own)

        job.whole = whole
    return found


async def answered(
    job: EncodeJob, generate: Callable[[Any], Any], prompt: Any
) -> AsyncIterator[Any]:
    """vLLM's outputs for a prompt, or for the same with whole items if it fails for lack of one.

    Args:
        job: Of the request, with ``whole``.
        generate: vLLM's outputs for a prompt.
        prompt: With bare items.
    """
    whole = job.whole
    assert whole is not None
    begun = False
    async with aclosing(generate(prompt)) as outputs:
        async for output in outputs:
            begun = begun or any(len(one.token_ids) for one in output.outputs)
            if not begun and any(one.finish_reason == "error" for one in output.outputs):
                break
            yield output
        else:
            return
    task = whole()
    try:
        _, (prompt,) = await task
    finally:
        # Whoever waited for the answer may be gone.
        task.cancel()
    async with aclosing(generate(prompt)) as outputs:
        async for output in outputs:
            yield output


def _without_records(context: RequestContext, job: EncodeJob, why: str) -> None:
    records = runtime_of(context.renderer).records
    if records is not None:
        records.counts["decoded_later"] += job.used_records
        records.warn(why)
    job.takes_records, job.used_records, job.whole = False, 0, None
    context.claim_anew()
