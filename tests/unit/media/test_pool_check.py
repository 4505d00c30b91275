"""A health check finds a pool whose workers cannot work, and takes a busy one for sound."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vllm_mm_ext.media.decode import pool_check
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.pool_check import PoolCheck
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(workers=1)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_check, "_FRESH_S", 0.0)


async def test_a_pool_whose_workers_work_has_no_problem(pool: DecodePool) -> None:
    check = PoolCheck(pool)
    assert await check.problem() is None
    assert len(pool.worker_pids()) == 1
    descriptors = psutil.Process().num_fds()
    assert await check.problem() is None
    assert len(pool.worker_pids()) == 1
    assert psutil.Process().num_fds() == descriptors


async def test_however_many_ask_a_worker_is_asked_once(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_check, "_FRESH_S", 60.0)
    check = PoolCheck(pool)
    assert await asyncio.gather(*(check.problem() for _ in range(20))) == [None] * 20
    assert await check.problem() is None
    assert pool.stats()["jobs"] == 1


async def test_workers_that_cannot_start_are_a_problem_until_they_can(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = PoolCheck(pool)
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nowhere/python")
        assert await check.problem() == "A worker cannot start (No such file or directory)."
    assert await check.problem() is None


async def test_workers_that_end_at_once_are_a_problem(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "decode_crash" in (await PoolCheck(pool).problem() or "")


async def test_a_worker_that_does_not_answer_is_a_problem_and_ends(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "hangs"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(
        pool_check, "_REQUEST", DecodeRequest(probe_only=True, limits=DecodeLimits(timeout_s=0.2))
    )
    monkeypatch.setattr(pool_check, "_WAIT_S", 60.0)
    assert "decode_timeout" in (await PoolCheck(pool).problem() or "")
    assert pool.worker_pids() == []


async def test_a_pool_whose_workers_all_have_jobs_has_no_problem(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A probe of a pipe that nobody writes into takes as long as it may.
    reading, writing = os.pipe()
    job = asyncio.create_task(pool.run(reading, DecodeRequest(probe_only=True)))
    while not pool.stats()["busy"]:
        await asyncio.sleep(0.01)
    monkeypatch.setattr(pool_check, "_WAIT_S", 0.1)
    check = PoolCheck(pool)
    assert await check.problem() is None
    assert await check.problem() is None
    assert pool.stats()["waiting"] == 1, "one file of the check waits, however often somebody asks"
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    os.close(reading)
    os.close(writing)
    monkeypatch.setattr(pool_check, "_WAIT_S", 60.0)
    assert await check.problem() is None
    assert pool.stats()["waiting"] == 0


async def test_a_closed_pool_says_so(pool: DecodePool) -> None:
    pool.close()
    assert "The server stops" in (await PoolCheck(pool).problem() or "")
