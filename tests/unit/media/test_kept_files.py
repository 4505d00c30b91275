"""A worker that keeps files open over spans of them gives what a fresh one gives, and reads on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.decode import pool_queue
from vllm_mm_ext.media.decode.decoders import get_decoder
from vllm_mm_ext.media.decode.decoders.kept_reader import KeptReader
from vllm_mm_ext.media.decode.decoders.pyav_decoder import _Pass
from vllm_mm_ext.media.decode.decoders.reader import Reader
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.open_files import KEEP_S, MOST_FILES, OpenFile, OpenFiles
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.pool_jobs import Lane
from vllm_mm_ext.media.decode.pool_queue import PATIENCE_S, HeldFiles, Place, fitness, next_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import (
    DecodeLimits,
    DecodeRequest,
    DecodeResult,
    SamplingSpec,
    SizeRule,
)
from vllm_mm_ext.testing.media import Tone, make_clip, mutate

SECONDS = 16
SWEEP = [Tone(200.0 + 60 * k, 0.4 * k, 0.4 * k + 0.3) for k in range(40)]
# Windows in order, one out of order, a jump ahead, one that overlaps by more, the end, the start.
STARTS = (0.0, 3.0, 6.0, 2.52, 5.5, 11.0, 12.0, 14.0, 0.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kept")
    made = {}
    for name, more in {
        "long.mp4": {"gop": 250},
        "long.ts": {"gop": 250},
        "short.mkv": {"gop": 25, "open_gop": True},
    }.items():
        made[name] = folder / name
        make_clip(made[name], fps=25, duration=SECONDS, bframes=2, audio=SWEEP, **more)  # type: ignore[arg-type]
    made["raw.h264"] = folder / "raw.h264"
    make_clip(made["raw.h264"], fps=25, duration=SECONDS, bframes=2)
    damaged = folder / "damaged.mp4"
    damaged.write_bytes(mutate(made["long.mp4"].read_bytes(), seed=3))
    made["damaged.mp4"] = damaged
    return made


def job(start: float, policy: str = "uniform", content: str = "") -> DecodeRequest:
    spec = SamplingSpec(policy=policy, fps=4.0, max_frames=12, span=(start, start + 5.0))  # type: ignore[arg-type]
    size = SizeRule("fixed", height=90, width=160)
    return DecodeRequest(spec, size=size, audio="optional", threads=2, content=content)


def outcome(path: str, request: DecodeRequest, kept: OpenFile | None = None) -> DecodeResult | str:
    try:
        return run_job(path, request, kept=kept)
    except MediaError as error:
        return str(error)


def assert_same(one: DecodeResult | str, other: DecodeResult | str) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert one.selection is not None
    assert other.selection is not None
    np.testing.assert_array_equal(one.selection.times, other.selection.times)
    np.testing.assert_array_equal(one.frames, other.frames)
    np.testing.assert_array_equal(one.audio, other.audio)
    assert one.info == other.info


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("long.mp4", "uniform"),
        ("long.mp4", "adaptive"),
        ("long.ts", "adaptive"),
        ("short.mkv", "uniform"),
        ("short.mkv", "keyframe"),
        ("raw.h264", "uniform"),
    ],
)
def test_what_was_read_before_changes_no_frame_and_no_sample(
    clips: dict[str, Path], name: str, policy: str
) -> None:
    with (clips[name]).open("rb") as file, contextlib.closing(OpenFile(file.fileno())) as kept:
        for start in STARTS:
            request = job(start, policy)
            assert_same(run_job(kept.path, request, kept=kept), run_job(str(clips[name]), request))


@pytest.mark.parametrize(
    ("name", "policy"),
    [("long.mp4", "uniform"), ("long.ts", "adaptive"), ("raw.h264", "uniform")],
)
def test_windows_in_their_order_need_no_seek_and_no_picture_twice(
    clips: dict[str, Path], name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int | None] = []
    decode = Reader.decode

    def counted(self: Reader, packet, *, needed=True):  # type: ignore[no-untyped-def]
        if packet is not None:
            fed.append(packet.pos)
        return decode(self, packet, needed=needed)

    monkeypatch.setattr(Reader, "decode", counted)
    monkeypatch.setattr(Reader, "seek", lambda *_: pytest.fail("a seek"))
    monkeypatch.setattr(_Pass, "run", lambda *_: pytest.fail("the file was opened anew"))
    with (clips[name]).open("rb") as file, contextlib.closing(OpenFile(file.fileno())) as kept:
        for start in (0.0, 3.0, 6.0, 9.0, 12.0):
            run_job(kept.path, job(start, policy), kept=kept)
    assert len(fed) == len(set(fed)) <= 25 * SECONDS


def test_windows_leave_out_what_no_wanted_picture_refers_to(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, path = Reader.decode, clips["long.mp4"]
    counts: list[int] = []

    def counted(self: Reader, packet, *, needed=True):  # type: ignore[no-untyped-def]
        counts[-1] += packet is not None
        return decode(self, packet, needed=needed)

    monkeypatch.setattr(Reader, "decode", counted)
    results = []
    for all_of_them in (False, True):
        if all_of_them:
            monkeypatch.setattr(Reader, "left_out", lambda *_: None)
        counts.append(0)
        with path.open("rb") as file, contextlib.closing(OpenFile(file.fileno())) as kept:
            results.append([run_job(kept.path, job(start), kept=kept) for start in (0.0, 3.0, 6.0)])
    assert counts[0] < 0.9 * counts[1]
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_pictures_that_do_not_fit_are_decoded_again(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = KeptReader.begin
    monkeypatch.setattr(KeptReader, "begin", lambda self, span, _: begin(self, span, 400_000))
    path = clips["long.mp4"]
    with path.open("rb") as file, contextlib.closing(OpenFile(file.fileno())) as kept:
        for start in (0.0, 3.0, 6.0):
            request = job(start, "adaptive")
            assert_same(run_job(kept.path, request, kept=kept), run_job(str(path), request))


@pytest.mark.parametrize(("name", "stays_open"), [("long.mp4", True), ("raw.h264", False)])
def test_no_second_pass_is_needed_for_unlikely_frames_where_it_would_be_dear(
    clips: dict[str, Path], name: str, stays_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = str(clips[name]), np.arange(30, 60, 5)
    info, decoder = (
        probe(path, DecodeLimits()),
        get_decoder("pyav", max_pixels=10**7, keep_bytes=10**8),
    )
    with clips[name].open("rb") as file, contextlib.closing(OpenFile(file.fileno())) as kept:
        if stays_open:
            decoder.kept = kept.video(info, job(1.0))
        decoder.thumbnails(path, info, rows, 64, 1, keep=())
        monkeypatch.setattr(Reader, "decode", lambda *_, **__: pytest.fail("a second pass"))
        out = np.empty((len(rows), 90, 160, 3), np.uint8)
        assert len(decoder.decode(path, info, rows, (90, 160), out, 1)) == len(rows)


# --- in a pool ------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    made = DecodePool(workers=2, threads=2)
    yield made
    made.close()


async def ask(pool: DecodePool, path: Path, request: DecodeRequest) -> DecodeResult | str:
    with path.open("rb") as file:
        try:
            return await pool.run(file.fileno(), request)
        except MediaError as error:
            return str(error)


async def test_interleaved_files_and_errors_in_between_change_nothing(
    pool: DecodePool, clips: dict[str, Path]
) -> None:
    too_few = replace(DecodeLimits(), max_output_bytes=1000)
    asked = []
    for number, start in enumerate((0.0, 3.0, 6.0, 20.0, 9.0, 12.0)):
        for name in ("long.mp4", "short.mkv", *(["damaged.mp4"] if start in (3.0, 9.0) else [])):
            request = job(start, ("uniform", "adaptive")[number % 2], name)
            asked.append((name, replace(request, limits=too_few) if start == 6.0 else request))
    for name, request in asked:
        found = await ask(pool, clips[name], request)
        wanted = outcome(str(clips[name]), request)
        if name != "damaged.mp4":
            assert_same(found, wanted)
        # What a decoder makes of damage depends on what it was given before.
        assert isinstance(found, str) == isinstance(wanted, str)
    assert pool.stats()["died"] == 0


async def test_windows_asked_for_at_once_go_to_one_worker(
    pool: DecodePool, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is.
    monkeypatch.setattr(pool_queue, "PATIENCE_S", 600.0)
    path = clips["long.mp4"]
    starts = (3.0, 0.0, 9.0, 6.0, 12.0)
    found = await asyncio.gather(*(ask(pool, path, job(s, content="x")) for s in starts))
    for start, one in zip(starts, found, strict=True):
        assert_same(one, run_job(str(path), job(start)))
    assert pool.stats()["started"] == 1


async def test_a_worker_that_dies_loses_its_files_alone(
    pool: DecodePool, clips: dict[str, Path]
) -> None:
    path = clips["long.ts"]
    await ask(pool, path, job(0.0, content="x"))
    (pid,) = pool.worker_pids()
    os.kill(pid, 9)
    assert_same(await ask(pool, path, job(3.0, content="x")), run_job(str(path), job(3.0)))


async def test_a_job_given_up_before_it_starts_leaves_its_worker_to_the_next(
    pool: DecodePool, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips["long.mp4"]
    await ask(pool, path, job(0.0, content="x"))
    taken, given_up, take = threading.Event(), threading.Event(), pool._next

    def slowly(lane: Lane) -> Any:
        found = take(lane)
        taken.set()
        given_up.wait(60)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(pool, "_next", slowly)
        task = asyncio.create_task(ask(pool, path, job(3.0, content="x")))
        await asyncio.to_thread(taken.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        given_up.set()
    started = time.monotonic()
    assert_same(await ask(pool, path, job(3.0, content="x")), run_job(str(path), job(3.0)))
    assert time.monotonic() - started < PATIENCE_S / 2
    assert pool.stats()["started"] == 1


def test_a_worker_keeps_a_few_files_open_and_no_more(clips: dict[str, Path]) -> None:
    before, files = len(os.listdir("/proc/self/fd")), OpenFiles()
    for number in range(5):
        for path in clips.values():
            with path.open("rb") as file:
                request = job(3.0, content=f"{path}{number}")
                kept = files.of(request, file.fileno())
                assert kept is not None
                outcome(kept.path, request, kept)
        # Of each file its descriptor, and one for each of its readers.
        assert len(os.listdir("/proc/self/fd")) <= before + 3 * MOST_FILES
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_busy_worker_lets_go_of_a_file_that_no_job_is_about(clips: dict[str, Path]) -> None:
    before, files = len(os.listdir("/proc/self/fd")), OpenFiles()
    now = time.monotonic()
    with clips["long.mp4"].open("rb") as file:
        for content in ("x", "y"):
            assert files.of(job(0.0, content=content), file.fileno()) is not None
    files.close_unused(job(0.0, content="y"), now + KEEP_S / 2)
    assert len(files) == 2
    files.close_unused(DecodeRequest(probe_only=True), now + KEEP_S + 1.0)
    assert len(files) == 1
    files.close_unused(job(0.0, content="y"), now + 2 * KEEP_S)
    assert len(files) == 1
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- the queue ------------------------------------------------------------------------------------


def test_others_pass_a_job_that_waits_for_its_worker_for_a_bounded_time() -> None:
    busy, queue = HeldFiles(), [Place("a", 3.0), Place("b"), Place()]
    busy.use(Place("a", 0.0), 100.0)
    assert next_job(queue, [busy], [], 100.0) == (1, 0.0)
    assert next_job(queue[:1], [busy], [], 101.0) == (-1, PATIENCE_S - 1.0)
    assert next_job(queue, [busy], [], 100.0 + PATIENCE_S) == (0, 0.0)
    assert next_job(queue, [busy], [busy], 101.0) == (0, 0.0)
    # What a worker closes by itself is not waited for.
    assert next_job([Place("a", 3.0)], [busy], [], 100.0 + KEEP_S) == (0, 0.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0, 100))
def test_spans_of_one_file_are_read_forwards(starts: list[float], at: float) -> None:
    worker, queue = HeldFiles(), [Place("a", start) for start in starts]
    worker.use(Place("a", at), 0.0)
    read = []
    while queue:
        number, _ = next_job(queue, [worker], [worker], 0.0)
        place = queue.pop(number)
        worker.use(place, 0.0)
        read.append(place.start)
    ahead = sorted(start for start in starts if start >= at)
    assert read == ahead + sorted(start for start in starts if start < at)


def test_a_gpu_is_for_the_jobs_that_may_use_one_and_open_files_are_spared() -> None:
    reading, free = HeldFiles(), HeldFiles()
    reading.use(Place("a"), 100.0)

    def best(with_gpu: bool, now: float) -> tuple[HeldFiles, bool]:
        workers = [(free, False), (reading, False), (reading, True)]
        return max(workers, key=lambda one: fitness(one[0], one[1], with_gpu, now))

    assert best(True, 101.0) == (reading, True)
    assert best(False, 101.0) == (free, False)
    # Files that a worker has closed by itself count no more.
    assert fitness(reading, False, False, 100.0 + KEEP_S) == fitness(free, False, False, 0.0)
