"""A request's context: one context variable, media by item, nothing of it in shared work."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from front import opened
from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers import run_batch
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client_from_engine_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_mm_ext
from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.runtime import Runtime, attach_runtime, runtime_of
from vllm_mm_ext.adapters.serving import answers
from vllm_mm_ext.adapters.vllm_compat import is_offline
from vllm_mm_ext.config.options import DEFAULT_OPTIONS
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SamplingSpec, SizeRule
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.media_items import MediaItem
from vllm_mm_ext.testing.checkpoints import checkpoint

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


async def test_requests_of_one_coroutine_share_nothing() -> None:
    opened_before = enter_request(RequestContext())
    answers.begin({"fps": 2}, "s")
    first = current_request()
    assert first is opened_before, "the middleware's"
    enter_request(first.conversation(object(), None)).add([MediaItem("video", "a", plan_of(1))])
    answers.begin(None, None)
    second = current_request()
    assert second is not None
    assert (second.options, second.session, second.trace.media) == (DEFAULT_OPTIONS, None, [])
    assert (first.session, len(first.trace.media)) == ("s", 1)


@pytest.mark.parametrize(
    ("block", "is_told"),
    [(None, False), ({"key": "a"}, False), ({"key": "a", "fps": 2}, True), ({}, True)],
)
async def test_an_answer_without_media_tells_nothing_where_only_routers_were_told_something(
    block: dict[str, Any] | None, is_told: bool
) -> None:
    enter_request(RequestContext())
    answers.begin(block, None)
    response = SimpleNamespace()
    answers.answered(response)
    assert hasattr(response, "mm_ext") == is_told


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


@pytest.mark.parametrize("usage", [None, UsageContext.LLM_CLASS])
def test_media_wait_without_end_only_where_an_engine_has_no_clients(
    usage: UsageContext | None, tmp_path: Path
) -> None:
    with opened(tmp_path, usage) as front:
        wait = runtime_of(front.renderer).budget.max_wait_s
    assert wait == (MMExtConfig().media.cache.max_wait_s if usage is None else math.inf)


async def start_llm(model: str, _: Path) -> None:
    LLM(model)


async def start_batch(model: str, folder: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "in").write_text(json.dumps(line))
    given = ["-i", str(folder / "in"), "-o", str(folder / "out"), "--model", model]
    parser = run_batch.make_arg_parser(FlexibleArgumentParser())
    await run_batch.main(parser.parse_args(given))


async def start_server(model: str, _: Path) -> None:
    async with build_async_engine_client_from_engine_args(AsyncEngineArgs(model=model)):
        pass


class _MadeError(Exception):
    pass


@pytest.mark.parametrize(
    ("start", "expected"), [(start_llm, True), (start_batch, True), (start_server, False)]
)
async def test_engines_of_llm_and_run_batch_are_known_to_have_no_clients(
    start: Callable[[str, Path], Awaitable[None]],
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin.register()
    make, made = EngineArgs.create_engine_config, []

    def make_and_stop(*args: Any, **kwargs: Any) -> Any:
        made.append(make(*args, **kwargs))
        raise _MadeError

    monkeypatch.setattr(EngineArgs, "create_engine_config", make_and_stop)
    with pytest.raises(_MadeError):
        await start(str(checkpoint("qwen2_5_vl")), tmp_path)
    assert is_offline(made[0].model_config) is expected
