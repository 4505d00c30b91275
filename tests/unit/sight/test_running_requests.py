"""Requests about a file end when the file is taken down, and only those."""

from __future__ import annotations

import asyncio

from vllm_mm_ext.request.media_items import AudioReport, ImageItem, MediaItem
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.request_log import RequestLog
from vllm_mm_ext.sight.running_requests import RunningRequests

A, B = "aa" * 32, "bb" * 32


def watched() -> RunningRequests:
    running = RunningRequests()
    running.follow(RequestLog(10), server=3)
    return running


async def serve(running: RunningRequests, trace: RequestTrace, begun: asyncio.Event) -> bool:
    """A request that ends only if it is cancelled; whether it knows that its media went."""
    request = running.begin("/v1/chat/completions", trace)
    assert request is not None
    begun.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return request.taken_down
    finally:
        running.end(request, 0)
    return False


async def started(running: RunningRequests, trace: RequestTrace) -> asyncio.Task[bool]:
    begun = asyncio.Event()
    task = asyncio.create_task(serve(running, trace, begun))
    await begun.wait()
    return task


def about(digest: str, url: str = "http://h/v") -> RequestTrace:
    return RequestTrace(
        media=[MediaItem("video", url, digest=digest)],
        tokens={"video": 1},
        hashes={f"hash of {digest[:2]}"},
    )


async def test_requests_about_a_file_end_and_others_go_on() -> None:
    running = watched()
    first, other = await started(running, about(A)), await started(running, about(B))
    held = await started(running, RequestTrace(tokens={"text": 1}, held={"http://h/long": A}))
    ended, left, traces = await running.cancel([A], [], [], timeout_s=5.0)
    assert (ended, left) == (2, 0)
    assert set().union(*(trace.hashes for trace in traces)) == {"hash of aa"}
    assert await first
    assert await held
    assert not other.done()
    assert [row["id"] for row in running.now()] == ["3-2"]
    assert running.log is not None
    assert [row["refused"] for row in running.log.summaries()] == ["taken_down"]
    other.cancel()
    assert not await other


async def test_a_request_that_goes_on_in_the_background_ends_with_its_file_and_not_before() -> None:
    running, trace = watched(), about(A)
    background = asyncio.create_task(asyncio.Event().wait())

    async def answered() -> None:
        request = running.begin("/v1/responses", trace)
        assert request is not None
        trace.note_task(background)
        running.end(request, 200)

    await asyncio.create_task(answered())
    assert [row["id"] for row in running.now()] == ["3-1"]
    ended, left, _ = await running.cancel([A], [], [], timeout_s=5.0)
    assert (ended, left) == (1, 0)
    assert background.cancelled()
    assert running.now() == []
    assert running.log is not None
    assert [row["refused"] for row in running.log.summaries()] == ["taken_down"]


async def test_a_request_that_does_not_know_its_media_yet_is_waited_for() -> None:
    running = watched()
    trace = RequestTrace(media=[MediaItem("video", "http://h/v")])
    unknown = await started(running, trace)
    ending = asyncio.create_task(running.cancel([A], [], [], timeout_s=5.0))
    await asyncio.sleep(0.05)
    assert not ending.done()
    trace.media[0].digest, trace.tokens = A, {"video": 1}
    assert (await ending)[:2] == (1, 0)
    assert await unknown


async def test_a_request_that_has_not_got_its_file_ends_by_the_url() -> None:
    running = watched()
    task = await started(running, RequestTrace(media=[MediaItem("video", "http://h/v")]))
    assert (await running.cancel([], ["http://h/v"], [], timeout_s=5.0))[:2] == (1, 0)
    assert await task


async def test_a_request_whose_long_video_is_surveyed_ends_by_the_url_or_is_waited_for() -> None:
    running = watched()
    by_url = await started(running, RequestTrace(held={"http://h/v": ""}))
    assert [row["media"] for row in running.now()] == [1]
    assert (await running.cancel([], ["http://h/v"], [], timeout_s=5.0))[:2] == (1, 0)
    assert await by_url
    trace = RequestTrace(held={"http://h/v": ""})
    unknown = await started(running, trace)
    assert (await running.cancel([A], [], [], timeout_s=0.05))[:2] == (0, 1)
    trace.held["http://h/v"] = A
    assert (await running.cancel([A], [], [], timeout_s=5.0))[:2] == (1, 0)
    assert await unknown


async def test_a_sound_whose_digest_is_never_known_holds_nothing_up() -> None:
    running = watched()
    read = MediaItem("audio", "http://h/a", report=AudioReport(1.0, cached=False))
    task = await started(running, RequestTrace(media=[read], tokens={"audio": 1}))
    assert (await running.cancel([A], [], [], timeout_s=5.0))[:2] == (0, 0)
    task.cancel()
    await task


async def test_a_request_for_an_image_that_is_fetched_ends_or_is_waited_for() -> None:
    running = watched()
    trace = RequestTrace(images=[ImageItem("http://h/p")])
    by_url = await started(running, trace)
    assert (await running.cancel([], ["http://h/p"], [], timeout_s=5.0))[:2] == (1, 0)
    assert await by_url
    trace = RequestTrace(images=[ImageItem("http://h/p")])
    unknown = await started(running, trace)
    assert (await running.cancel([A], [], [], timeout_s=0.05))[:2] == (0, 1)
    trace.images[0].digest = A
    assert (await running.cancel([A], [], [], timeout_s=5.0))[:2] == (1, 0)
    assert await unknown


async def test_a_request_that_names_a_medium_by_its_uuid_alone_ends_by_its_hash() -> None:
    running = watched()
    about_it = await started(running, RequestTrace(named={"of the file"}))
    other = await started(running, RequestTrace(named={"of another"}))
    assert running.naming(["of the file"]) == 1
    assert (await running.cancel([A], [], ["of the file"], timeout_s=5.0))[:2] == (1, 0)
    assert await about_it
    assert running.naming(["of the file"]) == 0
    assert running.naming(["of another"]) == 1
    other.cancel()
    await other


async def test_items_of_requests_that_go_on_are_told() -> None:
    running = watched()
    first, other = await started(running, about(A)), await started(running, about(B))
    assert running.hashes() == {"hash of aa", "hash of bb"}
    await running.cancel([A], [], [], timeout_s=5.0)
    assert running.hashes() == {"hash of bb"}
    assert await first
    other.cancel()
    await other


def test_nothing_is_followed_where_nobody_wants_to_see_it() -> None:
    trace = RequestTrace()
    assert RunningRequests().begin("/v1/chat/completions", trace) is None
    assert not trace.watched
