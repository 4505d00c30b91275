"""What a live session's socket and threads are given to do: in order, and bounded."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blake3 import blake3
from live_front import TRAITS
from live_sessions import LIMITS
from PIL import Image

from vllm_mm_ext.adapters.live.lane import Lane
from vllm_mm_ext.adapters.live.outbox import Outbox, SlowReaderError
from vllm_mm_ext.adapters.live.punctuality import AppendClock, Punctuality
from vllm_mm_ext.adapters.live.senses import Senses
from vllm_mm_ext.live.client_events import AudioContent, ImageContent, VideoAppend
from vllm_mm_ext.live.effects import Close
from vllm_mm_ext.live.session_options import default_options
from vllm_mm_ext.live.voice import VoicePool
from vllm_mm_ext.live.wire_error import WireError


async def test_events_are_sent_in_order_and_the_close_comes_last() -> None:
    outbox = Outbox()
    sent: list[str] = []

    async def send(text: str) -> None:
        await asyncio.sleep(0)
        sent.append(text)

    sending = asyncio.create_task(outbox.send_all(send))
    for number in range(3):
        outbox.put(str(number))
        await asyncio.sleep(0)
    outbox.put("last")
    outbox.close(Close(1008, "limit"))
    outbox.close(Close(1000, "later"))
    outbox.put("too late")
    assert await sending == Close(1008, "limit")
    assert sent == ["0", "1", "2", "last"]


async def test_a_client_that_does_not_read_has_a_bounded_number_of_characters_waiting() -> None:
    outbox = Outbox(most=10)
    reads = asyncio.Event()

    async def send(_: str) -> None:
        await reads.wait()

    sending = asyncio.create_task(outbox.send_all(send))
    outbox.put("a long event may always wait alone")
    await asyncio.sleep(0)
    with pytest.raises(SlowReaderError):
        outbox.put("b")
    reads.set()
    while outbox.waiting:
        await asyncio.sleep(0)
    outbox.put("12345")
    outbox.put("67890")
    with pytest.raises(SlowReaderError):
        outbox.put("1")
    outbox.close(Close(1000, ""))
    await sending


async def test_what_is_dropped_is_not_sent_and_the_close_follows_what_is_being_sent() -> None:
    outbox = Outbox()
    sent: list[str] = []
    reads = asyncio.Event()

    async def send(text: str) -> None:
        await reads.wait()
        sent.append(text)

    sending = asyncio.create_task(outbox.send_all(send))
    for number in range(3):
        outbox.put(str(number))
    await asyncio.sleep(0)
    outbox.drop()
    outbox.close(Close(1013, "slow"))
    reads.set()
    assert await sending == Close(1013, "slow")
    assert sent == ["0"]
    assert not outbox.waiting


async def test_an_event_of_any_length_may_follow_one_below_the_bound() -> None:
    outbox = Outbox(most=10)
    # An item that was added is told twice at once: added, and done.
    outbox.put("added 678")
    outbox.put("done 6789")
    with pytest.raises(SlowReaderError):
        outbox.put("1")


async def test_the_lanes_of_a_pool_take_turns_and_each_waits_for_its_own_work() -> None:
    with ThreadPoolExecutor(1) as threads:
        lanes = Lane(threads), Lane(threads)
        done: list[int] = []

        async def work(number: int) -> None:
            for _ in range(3):
                await lanes[number].run(done.append, number)

        await asyncio.gather(work(0), work(1))
    assert sorted(done[:2]) == [0, 1]
    assert sorted(done[2:4]) == [0, 1]


async def test_a_lane_ends_when_no_thread_works_for_it_though_its_caller_was_cancelled() -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def work() -> None:
        goes_on.wait()
        ended.set()
        raise ValueError("nobody is there to see this")

    with ThreadPoolExecutor(1) as threads:
        lane = Lane(threads)
        caller = asyncio.create_task(lane.run(work))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait((caller,))
        ending = asyncio.create_task(lane.end())
        await asyncio.sleep(0)
        assert not ending.done()
        goes_on.set()
        await ending
        assert ended.is_set()


async def test_work_that_fails_keeps_nothing_alive() -> None:
    class Held:
        pass

    def work(_: Held, pixels: object) -> None:
        raise ValueError(str(pixels))

    with ThreadPoolExecutor(1) as threads:
        lane = Lane(threads)
        held = Held()
        watch = weakref.ref(held)
        gc.disable()
        try:
            with pytest.raises(ValueError, match="0"):
                await lane.run(work, held, np.zeros(1))
            # The thread lets go of its last work when it takes the next.
            await lane.run(int)
            del held
            assert watch() is None
        finally:
            gc.enable()


def test_units_are_late_when_their_append_ends_a_unit_later_or_more() -> None:
    counts = Punctuality()
    clock = AppendClock(counts, unit_s=2.0)
    clock.asked(0.0)
    # Two more units come before the first append has ended; one append serves both.
    clock.asked(1.0)
    clock.asked(2.5)
    clock.ended(2.0, 10)
    assert counts == Punctuality(appends=1, late=0, worst_s=2.0, computed=10)
    clock.ended(3.5, 10)
    assert counts == Punctuality(appends=3, late=1, worst_s=2.5, computed=20)
    clock.asked(4.0)
    clock.asked(5.0)
    clock.overtaken()
    clock.ended(4.5, 10)
    clock.ended(9.0, 10)
    assert counts.appends == 4


async def test_small_files_of_large_pictures_are_decoded_up_to_the_sessions_bytes_only() -> None:
    file = io.BytesIO()
    Image.new("RGB", (350, 350), "red").save(file, "WEBP", lossless=True)
    picture = ImageContent(file.getvalue())
    assert len(picture.image) < 200
    with ThreadPoolExecutor(1) as threads:
        lane = Lane(threads)
        options = default_options("model", TRAITS, LIMITS)
        senses = Senses(TRAITS, options, VoicePool(0), lane, 0, 1 << 20)
        assert len(await senses.read(named(picture, AudioContent(bytes(4800), None), picture))) == 3
        # What follows is not looked at: it would be another error.
        with pytest.raises(WireError, match="1 MiB") as refused:
            await senses.read(named(picture, picture, picture, ImageContent(b"no picture")))
        assert refused.value.code == "session_too_large"
        assert refused.value.param == "item.content[2]"


def named(*contents: ImageContent | AudioContent) -> list[tuple[str, ImageContent | AudioContent]]:
    """Media as those of an item."""
    return [(f"item.content[{index}]", content) for index, content in enumerate(contents)]


def picture(grey: int) -> bytes:
    """A small file that no other grey has."""
    file = io.BytesIO()
    Image.new("L", (8, 8), grey).save(file, "PNG")
    return file.getvalue()


def remembers(senses: Senses, file: bytes) -> bool:
    """Whether a takedown of the file would find the session."""
    return senses.has_seen([blake3(file).hexdigest()])


async def test_a_session_remembers_the_files_that_it_could_read() -> None:
    with ThreadPoolExecutor(1) as threads:
        options = default_options("model", TRAITS, LIMITS)
        senses = Senses(TRAITS, options, VoicePool(0), Lane(threads), 0, 1 << 20)
        first, second, damaged = picture(1), picture(2), picture(3)[:40]
        await senses.see(VideoAppend(None, first, 5.0))
        await senses.read(named(ImageContent(second), AudioContent(bytes(4800), None)))
        assert senses.files_seen == 3
        for bad in (damaged, b"", b"no picture"):
            with pytest.raises(WireError):
                await senses.see(VideoAppend(None, bad, None))
            with pytest.raises(WireError) as refused:
                await senses.read(named(ImageContent(second), ImageContent(bad)))
            assert refused.value.param == "item.content[1]"
        with pytest.raises(WireError) as refused:
            await senses.read(named(AudioContent(b"odd", None)))
        assert refused.value.param == "item.content[0]"
        # Known before, it stays so though it comes with a wrong time.
        with pytest.raises(WireError, match="before the last frame's"):
            await senses.see(VideoAppend(None, first, 4.0))
        assert senses.files_seen == 3
        assert remembers(senses, first)
        assert remembers(senses, second)
        assert not remembers(senses, damaged)
        # After a clear it is no wrong time.
        senses.clear()
        await senses.see(VideoAppend(None, first, 4.0))


async def test_a_session_takes_no_more_files_than_it_can_remember() -> None:
    with ThreadPoolExecutor(1) as threads:
        options = default_options("model", TRAITS, LIMITS)
        senses = Senses(TRAITS, options, VoicePool(0), Lane(threads), 0, 4000)
        for grey in range(5):
            await senses.read(named(ImageContent(picture(grey))))
        with pytest.raises(WireError, match="5 different pictures") as refused:
            await senses.see(VideoAppend(None, picture(5), None))
        assert refused.value.code == "session_too_large"
        assert not remembers(senses, picture(5))
        # What is known may come again.
        await senses.see(VideoAppend(None, picture(0), None))
