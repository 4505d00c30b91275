"""A request's context: one context variable, media by item, nothing of it in shared work."""

from __future__ import annotations

import ast
import asyncio
import gc
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_mm_ext
from vllm_mm_ext.adapters.runtime import Runtime, attach_runtime, detach_runtime, runtime_of
from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SamplingSpec, SizeRule
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.media_items import MediaItem

PACKAGE = Path(vllm_mm_ext.__file__).parent


def plan_of(frames: int) -> VideoPlan:
    return VideoPlan(SamplingSpec(max_frames=frames), SizeRule())


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    made = Runtime(MMExtConfig(), ModelTraits())
    yield made
    made.close()


def test_the_package_has_one_context_variable() -> None:
    made = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "ContextVar"
    ]
    assert len(made) == 1, made


def test_items_of_one_url_are_claimed_one_after_the_other() -> None:
    context = RequestContext()
    items = [MediaItem("video", url, plan_of(n)) for n, url in enumerate("aba", 1)]
    context.add(items)
    assert [context.claim("video", url) for url in "baa"] == [items[1], items[0], items[2]]


def test_what_nobody_planned_is_an_item_of_its_own() -> None:
    context = RequestContext()
    context.add([MediaItem("video", "a", plan_of(1))])
    sound = context.claim("audio", "a")
    context.claim("video", "a")
    more = context.claim("video", "a", lambda: plan_of(2))
    assert sound.plan is None
    assert more.plan == plan_of(2)
    assert context.trace.media == context.items
    assert len(context.items) == 3


def test_conversations_of_a_request_share_its_options_and_trace_but_no_items() -> None:
    request = RequestContext(session="s")
    first, second = (request.conversation(object(), salt) for salt in ("x", None))
    first.add([MediaItem("video", "a", plan_of(1))])
    assert second.claim("video", "a").plan is None
    assert (first.session, first.cache_salt, second.cache_salt) == ("s", "x", None)
    assert request.trace.media == first.items + second.items


async def test_work_that_requests_share_carries_the_context_of_none(runtime: Runtime) -> None:
    async def seen() -> RequestContext | None:
        # As a shared flight does it: in a task of its own.
        return await asyncio.create_task(look())

    async def look() -> RequestContext | None:
        return current_request()

    enter_request(RequestContext())
    assert await runtime.run(seen()) is None
    assert await asyncio.to_thread(lambda: runtime.run_blocking(seen())) is None
    assert current_request() is not None


def event_loops() -> int:
    """Event loops of the process that are not closed."""
    found = [o for o in gc.get_objects() if issubclass(type(o), asyncio.AbstractEventLoop)]
    return sum(not loop.is_closed() for loop in found)


def test_fetching_and_decoding_share_one_event_loop(tmp_path: Path) -> None:
    before = event_loops()
    made = Runtime(MMExtConfig(), ModelTraits())
    for domains in ((), ("example.org",)):
        made.fetcher(tmp_path, domains)
    assert event_loops() - before == 1
    made.close()
    assert event_loops() == before


def test_a_front_end_ends_when_its_renderer_is_dropped() -> None:
    class Renderer:
        pass

    renderer = Renderer()
    attach_runtime(MMExtConfig(), ModelTraits(), renderer)
    loop = runtime_of(renderer).loop.loop
    assert loop.is_running()
    del renderer
    gc.collect()
    assert loop.is_closed()


async def test_media_wait_without_end_but_for_clients_over_http() -> None:
    made = attach_runtime(MMExtConfig(), ModelTraits())
    try:
        assert made.budget.max_wait_s == math.inf
        # vLLM calls this for servers, and neither for `vllm run-batch` nor for ``LLM``.
        await MMExtEndpointPlugin().init_state(None, None, Namespace())
        assert made.budget.max_wait_s == made.config.media.cache.max_wait_s
    finally:
        detach_runtime()
