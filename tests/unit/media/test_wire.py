"""What a decode worker sends: whatever it is, the server does not crash, hang or believe it."""

from __future__ import annotations

import fcntl
import math
import os
import resource
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_worker import FakeWorker
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import (
    BusyError,
    DecodeCrashError,
    InternalMediaError,
    MediaError,
    MediaTooLargeError,
    NoSuchStreamError,
)
from vllm_mm_ext.media.decode import pool as pool_module
from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.wire_checks import MalformedMessageError
from vllm_mm_ext.media.types import (
    AudioStream,
    DecodeLimits,
    DecodeRequest,
    FrameSelection,
    MediaInfo,
    PacketTable,
    SamplingSpec,
    VideoStream,
)

SHAPE = (2, 4, 6, 3)
REQUEST = DecodeRequest(sampling=SamplingSpec(max_frames=2), audio="optional")
TABLE = PacketTable(
    pts=np.arange(4),
    time=np.arange(4) / 2,
    size=np.full(4, 9, np.int32),
    is_key=np.array([True, False, True, False]),
    time_base=0.5,
)
VIDEO = VideoStream(0, "h264", 6, 4, 0, 2.0, False, 4, 2.0, "yuv420p")
INFO = MediaInfo("mov", 100, 2.0, VIDEO, (AudioStream(1, "aac", 16000, 1, 2.0),))
PROBED = wire.Probed(replace(INFO, packets=TABLE), {"probe": 0.1})
SELECTION = FrameSelection("uniform", np.array([0, 3]), np.array([0.0, 1.5]), step=1.5)
DECODED = wire.Decoded(INFO, SELECTION, SHAPE, 8, 16000, "pyav", {"decode": 0.2})
REPLIES: list[wire.Reply] = [
    wire.Reserve(1000),
    PROBED,
    DECODED,
    wire.Failed("too_large", "too large", "video_url", 7),
    wire.Broken("KeyError"),
]


def with_(message: Any, **changes: Any) -> Any:
    """A message with other values."""
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    return type(message)(**{**values, **changes})


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
def test_a_reply_arrives_as_it_was_sent(reply: wire.Reply) -> None:
    arrived = wire.decode_reply(wire.encode(reply))
    assert wire.encode(arrived) == wire.encode(reply)
    assert type(arrived) is type(reply)


def test_arrays_arrive_with_the_types_that_their_fields_declare() -> None:
    arrived = wire.decode_reply(wire.encode(PROBED))
    assert isinstance(arrived, wire.Probed)
    table = arrived.info.packets
    assert table is not None
    for name in ("pts", "time", "size", "is_key", "order"):
        column = getattr(table, name)
        np.testing.assert_array_equal(column, getattr(TABLE, name))
        assert column.dtype == getattr(TABLE, name).dtype


def test_a_job_arrives_as_it_was_sent() -> None:
    spec = SamplingSpec("explicit", indices=(1, 5))
    request = replace(REQUEST, sampling=spec, info=PROBED.info)
    arrived = wire.decode_job(wire.encode(wire.Job(request)))
    assert replace(arrived.request, info=None) == replace(request, info=None)
    assert arrived.request.info == PROBED.info


@pytest.mark.parametrize("kind", [MediaError, MediaTooLargeError, NoSuchStreamError])
def test_an_error_about_the_media_arrives_as_what_it_is(kind: type[MediaError]) -> None:
    sent = wire.Failed.of(kind("why", parameter="video_url", value=3))
    arrived = wire.decode_reply(wire.encode(sent))
    assert isinstance(arrived, wire.Failed)
    error = arrived.error()
    assert type(error) is kind
    assert (error.message, error.parameter, error.value) == ("why", "video_url", 3)


def test_a_worker_cannot_claim_an_error_that_is_not_about_its_file() -> None:
    assert wire.Failed.of(BusyError("no")).code == MediaError.code
    with pytest.raises(MalformedMessageError):
        wire.decode_reply(wire.encode(wire.Failed("busy", "no", "media", None)))


def refused(payload: bytes) -> bool:
    """Whether bytes are no message. No other error than the one for that may come."""
    try:
        wire.decode_reply(payload)
    except MalformedMessageError:
        return True
    return False


@settings(max_examples=400)
@given(st.binary(max_size=200))
def test_garbage_is_refused(payload: bytes) -> None:
    assert refused(payload)


@settings(max_examples=800)
@given(
    st.sampled_from(REPLIES),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 600)),
    st.binary(max_size=12),
)
def test_a_damaged_message_is_refused_or_holds_only_values_that_can_be_true(
    reply: wire.Reply, changes: list[tuple[int, int]], end: int | None, tail: bytes
) -> None:
    payload = bytearray(wire.encode(reply))
    for place, value in changes:
        payload[place % len(payload)] = value
    payload[slice(end, None) if end is not None else slice(len(payload), None)] = tail
    if refused(payload):
        return
    arrived = wire.decode_reply(payload)
    if isinstance(arrived, wire.Probed | wire.Decoded):
        assert math.isfinite(arrived.info.duration)
        assert all(math.isfinite(seconds) for seconds in arrived.timings.values())
        table = arrived.info.packets
        assert table is None or np.isfinite(table.time).all()
        for request in (REQUEST, DecodeRequest(probe_only=True)):
            try:
                wire.check_result(arrived, request)
            except MalformedMessageError:
                continue


@pytest.mark.parametrize(
    "claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_a_length_that_is_not_there_takes_no_memory(claim: bytes) -> None:
    # An array, a map, and bytes of 4 GB at every place but in the last number.
    payload = wire.encode(DECODED)
    for at in range(len(payload) - 8):
        assert refused(payload[:at] + claim)


def test_deep_nesting_is_refused() -> None:
    assert refused(b"\x91" * 100_000)
    assert refused(b"\x82\xa4type\xa7Reserve\xa1x" + b"\x91" * 100_000)


NAN = float("nan")


@pytest.mark.parametrize(
    "reply",
    [
        wire.Probed(replace(INFO, duration=NAN), {}),
        wire.Probed(replace(INFO, duration=-1.0), {}),
        wire.Probed(replace(INFO, audio=(replace(INFO.audio[0], duration=-1.0),)), {}),
        wire.Probed(replace(INFO, num_bytes=-1), {}),
        wire.Probed(replace(INFO, container="x" * 1000), {}),
        wire.Probed(replace(INFO, video=replace(VIDEO, width=0)), {}),
        wire.Probed(replace(INFO, video=replace(VIDEO, fps=NAN)), {}),
        wire.Probed(replace(INFO, video=replace(VIDEO, rotation=45)), {}),
        wire.Probed(replace(INFO, video=replace(VIDEO, crop=(0, -1, 0, 0))), {}),
        wire.Probed(replace(INFO, video=replace(VIDEO, sample_aspect=float("inf"))), {}),
        wire.Probed(replace(INFO, audio=(replace(INFO.audio[0], sample_rate=0),)), {}),
        wire.Probed(replace(INFO, audio=INFO.audio * 1001), {}),
        wire.Probed(replace(INFO, packets=replace(TABLE, time=TABLE.time[:3])), {}),
        wire.Probed(replace(INFO, packets=replace(TABLE, time=TABLE.time[::-1])), {}),
        wire.Probed(replace(INFO, packets=replace(TABLE, time=TABLE.time * NAN)), {}),
        wire.Probed(replace(INFO, packets=replace(TABLE, order=TABLE.order - 1)), {}),
        wire.Probed(replace(INFO, video=None, packets=TABLE), {}),
        wire.Probed(INFO, {"probe": -1.0}),
        wire.Probed(INFO, dict.fromkeys(map(str, range(100)), 1.0)),
        wire.Failed("too_large", "x" * 10_000, "media", None),
        wire.Failed("unknown", "x", "media", None),
    ],
)
def test_values_that_cannot_be_true_are_refused(reply: wire.Reply) -> None:
    assert refused(wire.encode(reply))


def test_a_table_whose_columns_are_no_whole_elements_is_refused() -> None:
    payload = wire.encode(PROBED)
    column = TABLE.pts.tobytes()
    assert refused(payload.replace(b"\xc4\x20" + column, b"\xc4\x1f" + column[:-1]))


@pytest.mark.parametrize(
    "answer",
    [
        PROBED,
        with_(DECODED, info=PROBED.info),
        with_(DECODED, frames=None),
        with_(DECODED, selection=None),
        with_(DECODED, frames=None, selection=None),
        with_(DECODED, frames=(3, *SHAPE[1:])),
        with_(DECODED, frames=(2, 4, 6, 4)),
        with_(DECODED, frames=(2, -4, -6, 3)),
        with_(DECODED, frames=(2, 1 << 40, 1 << 40, 3)),
        with_(DECODED, samples=0),
        with_(DECODED, samples=1 << 40),
        with_(DECODED, audio_rate=0),
        with_(DECODED, decoder="other"),
        with_(DECODED, selection=replace(SELECTION, indices=np.array([0, 4]))),
        with_(DECODED, selection=replace(SELECTION, indices=np.array([-1, 3]))),
        with_(DECODED, selection=replace(SELECTION, indices=np.array([3, 0]))),
        with_(DECODED, selection=replace(SELECTION, times=np.array([0.0, NAN]))),
        with_(DECODED, selection=replace(SELECTION, times=np.array([0.0]))),
        with_(DECODED, selection=replace(SELECTION, step=0.0)),
        with_(DECODED, info=replace(INFO, video=None)),
    ],
)
def test_a_result_that_does_not_answer_the_request_is_refused(answer: Any) -> None:
    wire.check_result(DECODED, REQUEST)
    with pytest.raises(MalformedMessageError):
        wire.check_result(answer, REQUEST)


def test_results_are_held_against_the_limits_of_the_request() -> None:
    for limits in (DecodeLimits(max_frames=1), DecodeLimits(max_output_bytes=31)):
        with pytest.raises(MalformedMessageError):
            wire.check_result(DECODED, replace(REQUEST, limits=limits))
    with pytest.raises(MalformedMessageError):
        wire.check_result(DECODED, replace(REQUEST, audio="none"))
    with pytest.raises(MalformedMessageError):
        wire.check_result(with_(DECODED, samples=None), replace(REQUEST, audio="required"))


# --- the socket -----------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("sent", [b"", b"\1", struct.pack("<I", 100), struct.pack("<I", 9) + b"12"])
def test_a_message_that_breaks_off_leaks_no_descriptor(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as file:
        if sent:
            socket.send_fds(theirs, [sent], [file.fileno()])
        theirs.close()
        before = open_descriptors()
        with pytest.raises(EOFError):
            wire.receive(ours, wire.decode_reply)
        assert open_descriptors() == before


def test_a_message_that_is_too_long_is_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", wire.MAX_BYTES + 1))
        with pytest.raises(MalformedMessageError):
            wire.receive(ours, wire.decode_reply)


def test_waiting_for_either_side_ends_at_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", 100) + b"slow")
        with pytest.raises(TimeoutError):
            wire.receive(ours, wire.decode_reply, time.monotonic() + 0.05)
        table = replace(TABLE, pts=np.zeros(1 << 20, np.int64))
        request = replace(REQUEST, info=replace(INFO, packets=table))
        with pytest.raises(TimeoutError):
            wire.send(ours, wire.Job(request), (), time.monotonic() + 0.05)


def test_a_process_without_descriptors_is_busy_and_the_worker_is_not_at_fault() -> None:
    ours, theirs = socket.socketpair()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs, open(os.devnull) as file:
        wire.send(theirs, wire.Reserve(1), [file.fileno(), file.fileno()])
        wire.send(theirs, wire.Reserve(2))
        before = open_descriptors()
        lowest = os.dup(0)
        os.close(lowest)
        # Room for one of the two.
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
        try:
            with pytest.raises(BusyError):
                wire.receive(ours, wire.decode_reply)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert open_descriptors() == before
        assert wire.receive(ours, wire.decode_reply) == (wire.Reserve(2), [])


# --- a worker that a file took over ---------------------------------------------------------------


def memory(num_bytes: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def framed(reply: wire.Reply) -> bytes:
    payload = wire.encode(reply)
    return struct.pack("<I", len(payload)) + payload


def hostile(reply: Callable[[], tuple[list[bytes], list[int]]]) -> type:
    """A worker that takes its job, says what it likes, and then nothing any more."""

    class Hostile(FakeWorker):
        def talk(self, sock: socket.socket, _request: DecodeRequest) -> None:
            parts, fds = reply()
            socket.send_fds(sock, parts, fds)
            for fd in fds:
                os.close(fd)

    return Hostile


async def answered(monkeypatch: pytest.MonkeyPatch, worker: type) -> Any:
    """What a pool of such workers makes of a job."""
    monkeypatch.setattr(pool_module, "WorkerProcess", worker)
    pool = DecodePool(workers=1, threads=1)
    before = open_descriptors()
    with open(os.devnull) as media:
        try:
            return await pool.run(media.fileno(), REQUEST)
        finally:
            assert pool.stats()["busy"] == 0
            pool.close()
            assert open_descriptors() <= before + 1


LIES: dict[str, Callable[[], tuple[list[bytes], list[int]]]] = {
    "garbage": lambda: ([struct.pack("<I", 9), b"not a msg"], []),
    "endless": lambda: ([b"\xff" * 1000], []),
    "too long for a result": lambda: ([struct.pack("<I", wire.MAX_RESULT_BYTES + 1)], []),
    "pickle": lambda: ([struct.pack("<I", 5), b"\x80\x04N.."], []),
    "a probe": lambda: ([framed(PROBED)], []),
    "an endless note": lambda: (
        [framed(msgspec.structs.replace(DECODED, decoder_note="x" * 5000))],
        [memory(144), memory(32)],
    ),
    "no memory": lambda: ([framed(DECODED)], []),
    "half of the memory": lambda: ([framed(DECODED)], [memory(144)]),
    "memory of nothing": lambda: ([framed(wire.Broken("x"))], [memory(144)]),
    "too little memory": lambda: ([framed(DECODED)], [memory(144), memory(31)]),
    "memory that may shrink": lambda: ([framed(DECODED)], [memory(144, 0), memory(32)]),
    "no memory file": lambda: ([framed(DECODED)], [os.open(os.devnull, os.O_RDWR), memory(32)]),
    "past the limits": lambda: ([framed(wire.Reserve(1 << 50))], []),
    "less than nothing": lambda: ([framed(wire.Reserve(-1))], []),
    "room twice": lambda: ([framed(wire.Reserve(9)), framed(wire.Reserve(9))], []),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_worker_that_lies_counts_as_dead(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DecodeCrashError):
        await answered(monkeypatch, hostile(LIES[lie]))


async def test_a_true_answer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = hostile(lambda: ([framed(DECODED)], [memory(144), memory(32)]))
    result = await answered(monkeypatch, worker)
    assert (result.frames.shape, result.audio.shape, result.decoder) == (SHAPE, (8,), "pyav")


async def test_a_fault_of_the_decoder_is_not_blamed_on_the_media(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InternalMediaError) as raised:
        await answered(monkeypatch, hostile(lambda: ([framed(wire.Broken("KeyError"))], [])))
    assert "KeyError" not in str(raised.value)


def test_memory_that_was_handed_over_cannot_shrink() -> None:
    array, fd = shared_array.create((4096,), np.uint8)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 10)
    finally:
        os.close(fd)
    assert not array.any()
