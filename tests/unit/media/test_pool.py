"""The decode pool: right results, bounded, and never taken down by what the media does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from fake_worker import FakeWorker

from vllm_mm_ext.errors import (
    BusyError,
    DecodeCrashError,
    DecodeTimeoutError,
    MediaError,
    MediaTooLargeError,
    MediaTooLongError,
    NoSuchStreamError,
)
from vllm_mm_ext.media.decode import pool as pool_module
from vllm_mm_ext.media.decode import wire, worker_process, worker_talk
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.worker import _SharedAllocator
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import Tone, bunny_path, make_audio, make_clip, mutate, read_stamp

TONE = [Tone(440, 0, 60)]


def wanting(*indices: int, **options) -> DecodeRequest:
    spec = SamplingSpec("explicit", indices=indices, max_frames=1000)
    return DecodeRequest(sampling=spec, **options)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    make_clip(path, width=640, height=360, duration=2, gop=10, bframes=2, stamp=True, audio=TONE)
    return path


@pytest.fixture(scope="module")
def pool():
    pool = DecodePool(workers=2, threads=1)
    yield pool
    pool.close()


@pytest.fixture
def fd(clip):
    descriptor = os.open(clip, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("media")
    os.write(descriptor, data)
    return descriptor


async def test_a_job_returns_the_frames_and_the_sound_it_was_asked_for(pool, fd):
    result = await pool.run(fd, wanting(0, 13, 13, 59, audio="required"))
    assert result.frames.shape == (4, 360, 640, 3)
    assert [read_stamp(frame) for frame in result.frames] == [0, 13, 13, 59]
    assert result.selection.indices.tolist() == [0, 13, 13, 59]
    np.testing.assert_allclose(result.selection.times, [0, 13 / 30, 13 / 30, 59 / 30], atol=1e-6)
    assert result.audio_rate == 48000
    assert len(result.audio) / 48000 == pytest.approx(2, abs=0.05)
    assert result.decoder == "pyav"
    assert set(result.timings) == {"probe", "profile", "decode", "audio"}


async def test_probe_only_returns_the_probe(pool, fd):
    result = await pool.run(fd, DecodeRequest(probe_only=True))
    assert result.info.video.num_frames == 60
    assert result.frames is None
    assert result.audio is None


async def test_in_process_and_pool_agree(pool, clip, fd):
    request = wanting(1, 30, size=SizeRule("max_edge", max_edge=224), audio="optional")
    ours, theirs = run_job(str(clip), request), await pool.run(fd, request)
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    np.testing.assert_array_equal(ours.audio, theirs.audio)
    assert theirs.frames.shape == (2, 126, 224, 3)


@pytest.mark.parametrize("policy", ["uniform", "keyframe", "adaptive"])
async def test_every_policy_runs_in_a_worker(pool, fd, policy):
    result = await pool.run(fd, DecodeRequest(sampling=SamplingSpec(policy, max_frames=8)))
    assert 0 < len(result.frames) <= 8
    assert [read_stamp(frame) for frame in result.frames] == result.selection.indices.tolist()
    # What grows with the file instead of the request stays in the worker.
    assert result.info.packets is None
    assert result.selection.profile is None


async def test_decord_falls_back_where_it_would_be_wrong(pool, tmp_path, fd):
    assert (await pool.run(fd, wanting(0, 31, decoder="decord"))).decoder == "decord"
    path = make_clip(tmp_path / "a.mp4", codec="mpeg4", bframes=2, duration=1, stamp=True).path
    with open(path, "rb") as file:
        result = await pool.run(file.fileno(), wanting(0, 17, decoder="decord"))
    assert result.decoder == "pyav"
    assert [read_stamp(frame) for frame in result.frames] == [0, 17]


def test_several_event_loops_share_a_pool(pool, fd):
    stamps = []

    def work(index):
        stamps.append(read_stamp(asyncio.run(pool.run(fd, wanting(index))).frames[0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stamps) == list(range(6))


def test_a_worker_loads_neither_torch_nor_vllm():
    code = (
        "import vllm_mm_ext.media.decode.worker, vllm_mm_ext.media.sampling, sys\n"
        "import vllm_mm_ext.media.decode.decoders.decord_decoder\n"
        "print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


async def test_missing_streams_are_named(pool, tmp_path):
    silent = make_clip(tmp_path / "a.mp4", duration=0.5).path
    sound = make_audio(tmp_path / "a.wav", duration=0.5).path
    with open(silent, "rb") as file:
        assert (await pool.run(file.fileno(), wanting(0, audio="optional"))).audio is None
        with pytest.raises(NoSuchStreamError, match="no audio"):
            await pool.run(file.fileno(), wanting(0, audio="required"))
    with open(sound, "rb") as file:
        with pytest.raises(NoSuchStreamError, match="no video"):
            await pool.run(file.fileno(), wanting(0))
        assert len((await pool.run(file.fileno(), DecodeRequest(audio="required"))).audio)


async def test_limits_are_refused_before_decoding(pool, fd):
    with pytest.raises(MediaTooLargeError, match="limit of 2"):
        await pool.run(fd, wanting(0, 1, 2, limits=DecodeLimits(max_frames=2)))
    with pytest.raises(MediaTooLargeError, match="limit of 1000"):
        await pool.run(fd, wanting(0, limits=DecodeLimits(max_output_bytes=1000)))
    with pytest.raises(MediaTooLargeError, match="pixels"):
        await pool.run(fd, wanting(0, limits=DecodeLimits(max_pixels=1000)))
    with pytest.raises(MediaTooLongError):
        await pool.run(fd, wanting(0, limits=DecodeLimits(max_duration_s=1)))


async def test_too_little_memory_is_an_error_of_this_job_alone(pool, fd):
    limits = DecodeLimits(memory_bytes=2 << 30)
    request = wanting(*range(60), size=SizeRule("fixed", 3400, 3400), limits=limits)
    before = [pool.stats()[key] for key in ("jobs", "died")]
    with pytest.raises(MediaTooLargeError, match="memory than the limit of 2147483648 bytes"):
        await pool.run(fd, request)
    # No worker is said to have died.
    assert [pool.stats()[key] for key in ("jobs", "died")] == [before[0] + 1, before[1]]
    assert len((await pool.run(fd, wanting(0))).frames) == 1


async def test_a_job_that_finds_a_worker_grown_too_large_is_done_by_a_fresh_one(fd):
    pool = DecodePool(workers=1, threads=1)
    try:
        await pool.run(fd, wanting(0))
        (grown,) = pool.worker_pids()
        pages = int(Path(f"/proc/{grown}/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (8 << 20)
        resource.prlimit(grown, resource.RLIMIT_AS, (room, room))
        request = wanting(*range(40), size=SizeRule("fixed", 1280, 720))
        assert len((await pool.run(fd, request)).frames) == 40
        assert grown not in pool.worker_pids()
        assert pool.stats()["started"] == 2
        # In a fresh worker, it is the job that needs too much.
        pool.renew()
        limits = DecodeLimits(memory_bytes=2 << 30)
        request = wanting(*range(60), size=SizeRule("fixed", 3400, 3400), limits=limits)
        with pytest.raises(MediaTooLargeError, match="memory than the limit"):
            await pool.run(fd, request)
        assert pool.stats()["started"] == 3
        assert pool.worker_pids() == []
    finally:
        pool.close()


async def test_a_job_past_its_time_is_stopped_and_the_next_one_runs(pool, fd):
    before = pool.stats()["timed_out"]
    with pytest.raises(DecodeTimeoutError, match=r"limit of 0\.001 s"):
        await pool.run(fd, wanting(*range(60), limits=DecodeLimits(timeout_s=0.001)))
    assert pool.stats()["timed_out"] == before + 1
    assert len((await pool.run(fd, wanting(0))).frames) == 1


async def test_a_worker_that_a_kill_does_not_end_holds_up_no_request_and_keeps_its_seat(
    fd, monkeypatch
):
    started = []

    class Unending(subprocess.Popen):
        def __init__(self, _command, **options):
            super().__init__(["sleep", "600"], **options)
            started.append(self)

        def kill(self):
            """Has no effect: the process waits in the kernel."""

    monkeypatch.setattr(worker_process.subprocess, "Popen", Unending)
    monkeypatch.setattr(worker_process, "_END_S", 0.05)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pool = DecodePool(workers=1, gpu_sessions=1)
    try:
        with pytest.raises(DecodeTimeoutError):
            await pool.run(fd, wanting(0, limits=DecodeLimits(timeout_s=0.2)))
        assert pool._seats.take() is None
        started[0].send_signal(signal.SIGKILL)
        while (seat := pool._seats.take()) is None:
            await asyncio.sleep(0.01)
        seat.release()
    finally:
        pool.close()


class SilentWorker(FakeWorker):
    """Takes jobs and does nothing."""

    def talk(self, sock, request):
        pass


async def test_a_job_that_ran_out_of_time_beside_others_may_be_sent_again(fd, monkeypatch):
    monkeypatch.setattr(pool_module, "WorkerProcess", SilentWorker)
    pool = DecodePool(workers=2)
    monkeypatch.setattr(pool, "_shared_threads", 2)
    try:
        limits = DecodeLimits(timeout_s=0.3)
        other = asyncio.create_task(pool.run(fd, wanting(0)))
        while not pool.stats()["busy"]:
            await asyncio.sleep(0.01)
        with pytest.raises(BusyError, match=r"limit of 0\.3 s"):
            await pool.run(fd, wanting(0, limits=limits))
        other.cancel()
        while pool.stats()["busy"]:
            await asyncio.sleep(0.01)
        with pytest.raises(DecodeTimeoutError):
            await pool.run(fd, wanting(0, limits=limits))
        assert pool.stats()["timed_out"] == 2
        assert pool.worker_pids() == []
    finally:
        pool.close()


async def test_a_shortage_of_processes_is_busy_and_costs_no_gpu_seat(fd, monkeypatch):
    def short(*_args, **_options):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pool = DecodePool(workers=1, gpu_sessions=1)
    before = psutil.Process().num_fds()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(worker_process.subprocess, "Popen", short)
            with pytest.raises(BusyError):
                await pool.run(fd, wanting(0))
        assert pool._seats.take() is not None
        assert psutil.Process().num_fds() == before
    finally:
        pool.close()


async def test_without_descriptors_for_a_job_the_server_is_busy(pool, fd, monkeypatch):
    def short(_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", short)
        with pytest.raises(BusyError):
            await pool.run(fd, wanting(0))
    assert len((await pool.run(fd, wanting(0))).frames) == 1


async def test_a_job_for_which_no_thread_starts_is_busy_and_leaves_nothing_behind(fd, monkeypatch):
    def short(_):
        raise RuntimeError("can't start new thread")

    pool = DecodePool(workers=1, threads=1)
    before = psutil.Process().num_fds()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", short)
            with pytest.raises(BusyError):
                await pool.run(fd, wanting(0))
        assert psutil.Process().num_fds() == before
        assert pool.stats()["waiting"] == 0
        # One thread for all: none waits for a job that is not there.
        for _ in range(2):
            assert len((await pool.run(fd, wanting(0))).frames) == 1
        assert pool.stats()["jobs"] == 2
    finally:
        pool.close()


def workers_of(pool) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in pool.worker_pids()]


async def busy_worker(pool) -> psutil.Process:
    """The worker of a one-worker pool, once it has begun its job."""
    for _ in range(500):
        await asyncio.sleep(0.01)
        if pool.stats()["busy"] and workers_of(pool):
            return workers_of(pool)[-1]
    raise AssertionError("no worker is busy")


@pytest.fixture
def stuck():
    """Descriptor of a pipe: a job on it blocks for as long as nobody writes."""
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


async def kill_the_worker_of(task: asyncio.Task, pool: DecodePool, how: signal.Signals) -> int:
    """End the process that works on a one-worker pool's job; its process id."""
    worker = await busy_worker(pool)
    worker.send_signal(how)
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.resume()  # A process that is stopped takes no signal.
    while worker.pid in pool.worker_pids() and not task.done():
        await asyncio.sleep(0.01)
    return worker.pid


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
async def test_a_job_whose_worker_dies_is_done_by_a_fresh_one(fd, how):
    pool = DecodePool(workers=1, threads=1)
    try:
        await pool.run(fd, wanting(0))
        (first,) = workers_of(pool)
        first.suspend()  # So that it is in the middle of the next job when it dies.
        task = asyncio.create_task(pool.run(fd, wanting(7)))
        await kill_the_worker_of(task, pool, how)
        assert read_stamp((await task).frames[0]) == 7
        assert [pool.stats()[key] for key in ("died", "started", "jobs", "busy")] == [1, 2, 2, 0]
        assert pool.worker_pids() != [first.pid]
    finally:
        pool.close()


async def test_a_job_past_its_time_is_not_tried_again(stuck):
    pool = DecodePool(workers=1, threads=1)
    try:
        with pytest.raises(DecodeTimeoutError):
            await pool.run(stuck, wanting(0, limits=DecodeLimits(timeout_s=1)))
        assert pool.stats()["started"] == 1
    finally:
        pool.close()


async def test_media_that_two_workers_die_on_are_refused_and_the_pool_goes_on(fd, stuck):
    pool = DecodePool(workers=1, threads=1)
    try:
        doomed = asyncio.create_task(pool.run(stuck, wanting(0)))
        for _ in range(2):
            await kill_the_worker_of(doomed, pool, signal.SIGSEGV)
        with pytest.raises(DecodeCrashError, match="exit status -11") as refused:
            await doomed
        assert refused.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
        assert len((await pool.run(fd, wanting(0))).frames) == 1
        assert pool.stats()["died"] == 2
        assert pool.stats()["started"] == 3
        # One that dies while idle is replaced too, and no job notices.
        (idle,) = workers_of(pool)
        idle.kill()
        idle.wait()
        assert len((await pool.run(fd, wanting(0))).frames) == 1
        assert pool.stats()["busy"] == 0
    finally:
        pool.close()


async def test_cancelling_frees_the_slot_and_stops_the_work(fd, stuck):
    pool = DecodePool(workers=1, threads=1)
    try:
        running = asyncio.create_task(pool.run(stuck, wanting(0)))
        worker = await busy_worker(pool)
        queued = asyncio.create_task(pool.run(fd, wanting(0)))
        await asyncio.sleep(0.05)
        for task in (queued, running):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        result = await asyncio.wait_for(pool.run(fd, wanting(5)), 30)
        assert read_stamp(result.frames[0]) == 5
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert pool.stats()["died"] == 0
        assert pool.stats()["busy"] == 0
    finally:
        pool.close()


async def test_a_job_says_what_it_will_make_before_it_does(fd):
    pool = DecodePool(workers=1, threads=1)
    sized: list[int] = []
    try:
        frames = (await pool.run(fd, wanting(0, 1, 2), sized.append)).frames
        assert sized == [frames.nbytes]
    finally:
        pool.close()


class SizingWorker(FakeWorker):
    """Says that it will make 10 bytes, and ends instead of making them."""

    def talk(self, sock, _request):
        wire.send(sock, wire.Reserve(10))
        sock.close()


async def test_a_job_that_is_tried_again_counts_once(fd, monkeypatch):
    monkeypatch.setattr(pool_module, "WorkerProcess", SizingWorker)
    pool = DecodePool(workers=1, threads=1)
    budget = MediaBudget(100)
    lease = await budget.claim().acquire(50)
    used: list[int] = []

    def sized(num_bytes: int) -> None:
        lease.resize(num_bytes)
        used.append(budget.used)

    try:
        with pytest.raises(DecodeCrashError):
            await pool.run(fd, wanting(0), sized)
        assert used == [10, 10]
        lease.release()
        assert budget.used == 0
    finally:
        pool.close()


async def test_nobody_hears_the_size_of_a_job_that_was_given_up(fd, monkeypatch):
    begun, go_on, sized = threading.Event(), threading.Event(), []

    def late(*_):
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(pool_module, "WorkerProcess", SizingWorker)
    monkeypatch.setattr(worker_talk, "check_reservation", late)
    pool = DecodePool(workers=1, threads=1)
    try:
        job = asyncio.create_task(pool.run(fd, wanting(0), sized.append))
        await asyncio.to_thread(begun.wait, 60)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        go_on.set()
        await turns(pool, lambda stats: stats["busy"] == 0)
        assert sized == []
    finally:
        go_on.set()
        pool.close()


async def turns(pool: DecodePool, until) -> None:
    """Let the event loop turn until a condition holds of the pool's counters."""
    for _ in range(3000):
        if until(pool.stats()):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it never came to that: {pool.stats()}")


async def test_a_probe_does_not_wait_for_decodes(fd, stuck):
    pool = DecodePool(workers=1, threads=1)
    decodes = [asyncio.create_task(pool.run(stuck, wanting(0))) for _ in range(3)]
    try:
        await turns(pool, lambda stats: stats["busy"] == 1)
        for _ in range(3):
            probed = await asyncio.wait_for(pool.run(fd, DecodeRequest(probe_only=True)), 60)
            assert probed.info.video.num_frames == 60
        assert not any(decode.done() for decode in decodes)
    finally:
        for decode in decodes:
            decode.cancel()
        await asyncio.gather(*decodes, return_exceptions=True)
        pool.close()


async def test_jobs_of_a_lane_start_in_the_order_in_which_they_came(fd, stuck):
    pool = DecodePool(workers=1, threads=1)
    order = []

    async def job(number: int) -> None:
        await pool.run(fd, wanting(number))
        order.append(number)

    try:
        first = asyncio.create_task(pool.run(stuck, wanting(0)))
        await turns(pool, lambda stats: stats["busy"] == 1)
        jobs = [asyncio.create_task(job(number)) for number in range(6)]
        await asyncio.sleep(0)
        jobs[2].cancel()
        first.cancel()
        await asyncio.gather(first, *jobs, return_exceptions=True)
    finally:
        pool.close()
    assert order == [0, 1, 3, 4, 5]


async def test_jobs_of_a_closed_pool_are_told_to_come_again(fd, stuck):
    pool = DecodePool(workers=1, threads=1)
    jobs = [asyncio.create_task(pool.run(stuck, wanting(0))) for _ in range(3)]
    await turns(pool, lambda stats: stats["busy"] == 1)
    pool.close()
    assert {type(error) for error in await asyncio.gather(*jobs, return_exceptions=True)} == {
        BusyError
    }
    with pytest.raises(BusyError):
        await pool.run(fd, wanting(0))
    assert pool.worker_pids() == []


async def test_a_worker_knows_nothing_of_the_servers_secrets(fd, monkeypatch):
    secrets = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "VLLM_API_KEY", "HTTPS_PROXY")
    for name in secrets:
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    pool = DecodePool(workers=1, threads=1)
    try:
        await pool.run(fd, DecodeRequest(probe_only=True))
        (worker,) = workers_of(pool)
        environment = worker.environ()
    finally:
        pool.close()
    assert "hidden" not in environment.values()
    assert environment["LC_ALL"] == "C.UTF-8"
    assert environment["PATH"] == os.environ["PATH"]


async def test_no_descriptor_or_memory_leaks_over_many_jobs(pool, fd):
    async def jobs(count):
        for i in range(count):
            await pool.run(fd, wanting(i % 60, audio="optional"))

    await jobs(20)
    gc.collect()
    me = psutil.Process()
    fds, memory, maps = me.num_fds(), me.memory_info().rss, len(me.memory_maps(grouped=False))
    workers = [(w, w.num_fds()) for w in workers_of(pool)]
    await jobs(200)
    gc.collect()
    assert me.num_fds() <= fds
    assert len(me.memory_maps(grouped=False)) <= maps + 5
    assert me.memory_info().rss - memory < 30 << 20
    for worker, before in workers:
        if worker.is_running():
            assert worker.num_fds() <= before + 1


async def test_kept_arrays_stay_valid_and_hold_no_descriptors(pool, fd):
    before = psutil.Process().num_fds()
    kept = [(await pool.run(fd, wanting(i))).frames for i in range(20)]
    assert psutil.Process().num_fds() <= before + 1
    assert [read_stamp(frames[0]) for frames in kept] == list(range(20))


def test_workers_end_with_the_process_that_owns_the_pool(clip):
    code = (
        "import asyncio, os, sys\n"
        "from vllm_mm_ext.media.decode.pool import DecodePool\n"
        "from vllm_mm_ext.media.types import DecodeRequest\n"
        "pool = DecodePool(workers=1)\n"
        "media = os.open(sys.argv[1], os.O_RDONLY)\n"
        "asyncio.run(pool.run(media, DecodeRequest(probe_only=True)))\n"
        "print(*pool.worker_pids(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(clip)], capture_output=True, text=True)
    worker = int(out.stdout)
    for _ in range(500):
        if not psutil.pid_exists(worker):
            return
        if psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    raise AssertionError("the worker outlived its owner")


async def test_mutated_and_truncated_media_never_harm_the_pool(pool, tmp_path):
    options = {"width": 64, "height": 48, "duration": 0.5, "gop": 5, "audio": TONE}
    sources = [
        make_clip(tmp_path / "a.mp4", bframes=2, faststart=True, **options).path,
        make_clip(tmp_path / "a.mkv", open_gop=True, bframes=2, **options).path,
        make_clip(tmp_path / "a.avi", codec="mpeg4", audio_codec="mp2", **(options)).path,
        make_clip(tmp_path / "a.ts", **options).path,
        make_audio(tmp_path / "a.mp3", duration=0.5).path,
    ]
    limits = DecodeLimits(timeout_s=20, max_output_bytes=64 << 20, max_pixels=1 << 22)
    request = DecodeRequest(sampling=SamplingSpec(max_frames=4), audio="optional", limits=limits)
    cases = []
    for source in sources:
        data = source.read_bytes()
        cases += [mutate(data, seed) for seed in range(50)]
        cases += [data[: len(data) * cut // 10] for cut in range(10)]

    async def one(data: bytes) -> bool:
        descriptor = memory_file(data)
        try:
            result = await pool.run(descriptor, request)
        except MediaError:
            return False
        finally:
            os.close(descriptor)
        assert result.frames is not None
        assert len(result.frames) == len(result.selection.indices) > 0
        return True

    served = await asyncio.gather(*(one(data) for data in cases))
    assert 0 < sum(served) < len(cases)
    assert pool.stats()["busy"] == 0


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.m4a", "a.flac", "a.ogg"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_that_of_stock(tmp_path, name, channels):
    from vllm.multimodal.media.audio import load_audio

    path = make_audio(tmp_path / name, tones=TONE, duration=1.3, channels=channels).path
    result = run_job(str(path), DecodeRequest(audio="required"))
    stock, rate = load_audio(io.BytesIO(path.read_bytes()), sr=None, mono=True)
    assert result.audio_rate == rate
    assert result.audio.dtype == np.float32
    assert abs(len(result.audio) - len(stock)) <= (1152 if name == "a.mp3" else 0)
    n = min(len(stock), len(result.audio))
    np.testing.assert_allclose(result.audio[:n], stock[:n], atol=2e-4)


def test_sound_of_a_film_is_that_of_stock_but_for_the_weights_of_its_speakers():
    from vllm.multimodal.media.audio import load_audio_pyav

    result = run_job(str(bunny_path()), DecodeRequest(audio="required"))
    stock, rate = load_audio_pyav(bunny_path(), sr=None, mono=False)
    front, surround = 0.5**0.5, 0.5
    weights = np.array([front, front, 1, 0, surround, surround])  # left, right, centre, LFE, back
    assert (result.audio_rate, len(stock)) == (rate, 6)
    np.testing.assert_allclose(result.audio, weights / weights.sum() @ stock, atol=1e-6)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_is_scaled_to_one(tmp_path, subtype):
    path = tmp_path / "a.wav"
    samples = np.random.default_rng(0).uniform(-1, 1, (4000, 2)).astype(np.float32)
    soundfile.write(path, samples, 16000, subtype=subtype)
    result = run_job(str(path), DecodeRequest(audio="required"))
    expected, rate = soundfile.read(path, dtype="float32")
    assert result.audio_rate == rate
    np.testing.assert_allclose(result.audio, expected.mean(axis=1), atol=1e-6)


def test_long_sound_is_refused_or_cut_as_asked(tmp_path):
    path = str(make_audio(tmp_path / "a.wav", duration=3).path)
    with pytest.raises(MediaTooLongError, match="limit of 1 s"):
        run_job(path, DecodeRequest(audio="required", limits=DecodeLimits(max_audio_s=1)))
    limits = DecodeLimits(max_audio_s=1, truncate_audio=True)
    assert len(run_job(path, DecodeRequest(audio="required", limits=limits)).audio) == 48000


def test_a_sampling_rate_no_one_uses_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(1000, np.float32), 1_000_003)
    with pytest.raises(MediaTooLargeError, match="limit of 768000"):
        run_job(str(path), DecodeRequest(audio="required"))


def test_samples_that_are_no_numbers_are_silence(tmp_path):
    path = tmp_path / "a.wav"
    samples = np.array([0.5, np.nan, np.inf, -np.inf, 3e38, -1.5] * 500, np.float32)
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    audio = run_job(str(path), DecodeRequest(audio="required")).audio
    np.testing.assert_array_equal(audio[:6], np.float32([0.5, 0, 0, 0, 1e6, -1.5]))


async def test_a_warm_pool_does_its_first_job_in_the_worker_it_started(fd):
    pool = DecodePool(workers=2, threads=1)
    try:
        pool.warm()
        while not pool.worker_pids():
            await asyncio.sleep(0.01)
        pool.warm()
        await asyncio.sleep(0.1)
        [pid] = pool.worker_pids()
        await pool.run(fd, DecodeRequest(probe_only=True))
        await pool.run(fd, wanting(3))
        assert pool.worker_pids() == [pid]
        assert pool.stats()["started"] == 1
    finally:
        pool.close()


def test_a_pool_closed_while_it_warms_leaves_no_worker():
    pool = DecodePool(workers=1, threads=1)
    pool.warm()
    pool.close()
    deadline = time.monotonic() + 10
    while pool._probes.threads._threads and any(
        t.is_alive() for t in pool._probes.threads._threads
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pool.worker_pids() == []


def test_an_array_in_place_of_one_that_is_gone_keeps_no_descriptor_of_that_one():
    memory, descriptors = _SharedAllocator(), len(os.listdir("/proc/self/fd"))
    addresses = set()
    for _ in range(20):
        array = memory.allocate((1 << 20,), np.uint8)
        addresses.add(array.ctypes.data)
        os.fstat(memory.fd_of(array))
        del array
    assert len(os.listdir("/proc/self/fd")) == descriptors + len(addresses)
    memory.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
