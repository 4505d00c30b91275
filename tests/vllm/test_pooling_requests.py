"""Requests for pooling, which vLLM renders on threads, are known as other requests are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from front import Front, opened
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.renderers.chat_utils import ChatTemplateConfig

from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.sight.request_log import RequestLog
from vllm_mm_ext.sight.running_requests import RunningRequests
from vllm_mm_ext.testing.media import make_clip


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "short.mp4", duration=2, seed=1)
    with opened(files, additional_config={"mm_ext": {"sight": {"page": True}}}) as made:
        yield made


def pooling(front: Front, kind: type[PoolingIOProcessor] = PoolingIOProcessor) -> Any:
    """What renders requests for pooling."""
    return kind(front.renderer.config, front.renderer, ChatTemplateConfig())


def params_of(front: Front, name: str) -> dict[str, Any]:
    """vLLM's parameters by which a question about a clip is rendered for pooling."""
    request = ChatCompletionRequest(model="m", messages=front.messages(name))
    return {
        "conversations": request.messages,
        "chat_params": request.build_chat_params(None, "auto"),
        "tok_params": request.build_tok_params(front.renderer.model_config),
        **dict.fromkeys(("prompt_extras", "params", "lora_requests", "priorities")),
        "skip_mm_cache": False,
    }


async def test_what_became_of_a_file_is_known(front: Front) -> None:
    trace = enter_request(RequestContext()).trace
    await pooling(front).render_async(params_of(front, "short.mp4"))
    ((item, video),) = trace.videos
    assert (video.frames, trace.tokens["video"] > 0) == (4, True)
    assert set(trace.stages) >= {"fetch", "video", "preprocess"}
    seen = runtime_of(front.renderer).seen
    assert seen is not None
    hashes = {made.mm_hash for made in trace.items}
    assert hashes
    assert seen.hashes_of([item.known_digest]) == hashes


async def test_a_refusal_has_its_status_and_is_counted(front: Front) -> None:
    trace = enter_request(RequestContext()).trace
    with pytest.raises(VLLMUnprocessableEntityError, match="does not exist"):
        await pooling(front).render_async(params_of(front, "missing.mp4"))
    assert trace.refused == "unreachable"


async def test_a_fault_keeps_its_traceback(front: Front) -> None:
    class Faulty(PoolingIOProcessor):
        def render(self, _: Any) -> Any:
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError) as raised:
        await pooling(front, Faulty).render_async({})
    assert "a fault" in str(raised.traceback[-1].statement)


async def test_a_request_that_is_ended_ends_when_its_thread_is_done(front: Front) -> None:
    begun, goes_on, done = threading.Event(), threading.Event(), threading.Event()

    class Slow(PoolingIOProcessor):
        def render(self, _: Any) -> Any:
            begun.set()
            goes_on.wait(30)
            done.set()

    running = RunningRequests()
    running.follow(RequestLog(10), server=0)
    requests = []

    async def serve() -> None:
        context = enter_request(RequestContext())
        requests.append(running.begin("/pooling", context.trace))
        # As vLLM has it: in a task of its own.
        await asyncio.gather(pooling(front, Slow).render_async({}))

    serving = asyncio.create_task(serve())
    try:
        assert await asyncio.to_thread(begun.wait, 30)
        (request,) = requests
        request.end()
        await asyncio.wait([serving], timeout=0.05)
        assert not serving.done()
    finally:
        goes_on.set()
    await asyncio.wait([serving])
    assert done.is_set()
    assert serving.cancelled()
