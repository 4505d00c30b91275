"""Serves a model, asks it what tells costs apart, and returns what was seen."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av

from vllm_mm_ext.adapters.planning.timed_scheduler import LOG_VARIABLE
from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.testing.memory import cpu_seconds
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.calibration.asker import Asked, Asker
from vllm_mm_ext.tools.calibration.media_files import clip
from vllm_mm_ext.tools.calibration.observations import (
    LoggedStep,
    Observations,
    TokensOf,
    busy_threads,
    key_of,
)

_SCHEDULER = "vllm_mm_ext.adapters.planning.timed_scheduler.timed_scheduler"
# What keeps the other cores busy, and what is asked beside that.
_BUSY_CLIP = Video(4.0, width=640, height=360, sound=False)
_BUSY_TEXT = Workload(text=64, output=48, concurrency=2)
# Room for the tokens that a follow-up adds.
_FOLLOW_UP = 96


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        modalities: Media of the model: ``video``, ``audio``, ``image``.
        hears_video: The model hears the sound of videos.
        tokens: Tokens of a request, ``--max-model-len``.
        slots: ``--max-num-seqs``.
    """

    modalities: frozenset[str]
    hears_video: bool
    tokens: int
    slots: int


def alone(limits: Limits) -> list[tuple[Workload, int]]:
    """What is asked one request at a time, and how often."""
    half = limits.tokens // 2
    asked = [(Workload(text=min(n, half), output=8), 3) for n in (32, 512, 2048)]
    if "video" in limits.modalities:
        sound = limits.hears_video
        videos = [
            Video(4.0, width=640, height=360, sound=sound),
            # Other frames chosen of as many decoded tell the cost of both apart.
            Video(8.0, 2.0, width=640, height=360, sound=False),
            Video(6.0, width=1280, height=720, sound=False),
        ]
        codecs = [
            Video(4.0, width=640, height=360, codec=codec, sound=False)
            for codec in ("hevc", "vp9", "av1")
        ]
        asked += [(Workload((one,), text=32, output=4), 3) for one in videos]
        asked += [(Workload((one,), text=32, output=2), 1) for one in codecs]
    if "image" in limits.modalities:
        images = [Image(448, 336), Image(1280, 720)]
        asked += [(Workload(images=(one,), text=32, output=4), 3) for one in images]
    if "audio" in limits.modalities:
        asked += [(Workload(audios=(one,), text=32, output=4), 3) for one in (4.0, 16.0)]
    return asked


def _in_workers(workload: Workload) -> bool:
    """Whether decode workers read all its media, so that follow-ups find them in caches."""
    return bool(workload.videos or workload.audios) and not workload.images


def groups(limits: Limits) -> list[Workload]:
    """Texts that are asked by several clients at a time: each client asks once."""
    half = limits.tokens // 2
    counts = sorted({min(limits.slots, count) for count in (2, 8, 16)})
    found = [Workload(text=64, output=32, concurrency=count) for count in counts]
    return [*found, Workload(text=min(1500, half), output=24, concurrency=min(4, limits.slots))]


@contextmanager
def timed_server(
    model: str,
    folder: Path,
    arguments: Sequence[str],
    additional_config: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    cores: Collection[int] = (),
) -> Iterator[tuple[Server, Path]]:
    """A server that logs its steps; it ends with the block.

    Args:
        model: The model.
        folder: Where media files are, which the server may read.
        arguments: More arguments of ``vllm serve``.
        additional_config: Its ``--additional-config``.
        env: More environment variables.
        cores: Numbers of the cores that it may use; none: all.

    Yields:
        The server and its log.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "steps.jsonl"
        with serve(
            model,
            plugin=True,
            args=[
                *arguments,
                *("--scheduler-cls", _SCHEDULER),
                *("--allowed-local-media-path", str(folder.absolute())),
            ],
            env={**(env or {}), LOG_VARIABLE: str(log)},
            additional_config=additional_config,
            timeout_s=1800,
            enforce_eager=False,
            cores=cores,
        ) as server:
            yield server, log


async def observe(
    server: Server, log: Path, folder: Path, limits: Limits, tokens_of: TokensOf
) -> Observations:
    """Ask a server what tells costs apart.

    Args:
        server: The server, which has nothing else to do.
        log: Its log of steps.
        folder: Where media files are kept.
        limits: What it takes.
        tokens_of: What a request of a workload becomes in the engine.
    """

    def fits(workload: Workload, more: int = 0) -> bool:
        return tokens_of(workload).prompt + workload.output + more <= limits.tokens

    async with Asker.of(server.url, folder) as asker:
        watch = _Watch(server, log, folder, asker)
        single = [one for one in alone(limits) if fits(one[0])]
        follows = [
            one for one, count in single if count > 1 and _in_workers(one) and fits(one, _FOLLOW_UP)
        ]
        beside = replace(_BUSY_TEXT, concurrency=min(_BUSY_TEXT.concurrency, limits.slots))
        return await watch.observe(single, groups(limits), beside, follows)


class _Watch:
    def __init__(self, server: Server, log: Path, folder: Path, asker: Asker) -> None:
        self._server, self._log, self._folder, self._asker = server, log, folder, asker

    async def observe(
        self,
        single: Sequence[tuple[Workload, int]],
        many_at_once: Sequence[Workload],
        beside: Workload,
        followed: Sequence[Workload],
    ) -> Observations:
        """Everything once, unmeasured; then alone, in groups, and beside other work.

        Args:
            single: What is asked alone, and how often.
            many_at_once: What several clients ask.
            beside: What is asked beside other work.
            followed: Of ``single``, what follow-ups are asked about.
        """
        lone = [(each, await self._asker.prepare(each, count + 1)) for each, count in single]
        for workload, bodies in lone:
            await self._asker.one(workload, bodies[0])
            if workload in followed:
                await self._asker.one(workload, self._asker.follow_up(bodies[0]))
        found, later = [], []
        before, media_s = cpu_seconds(self._server.pid)["decode"], 0.0
        for workload, bodies in lone:
            for body in bodies[1:]:
                found.append(await self._asker.one(workload, body))
                stages = found[-1].stages
                media_s += max(stages.get("video", 0.0), stages.get("audio", 0.0))
                media_s += stages.get("probe", 0.0) - stages.get("fetch", 0.0)
                if workload in followed:
                    later.append(await self._asker.one(workload, self._asker.follow_up(body)))
        decode_threads = (
            (cpu_seconds(self._server.pid)["decode"] - before) / media_s if media_s > 0 else 1.0
        )
        spent, many = cpu_seconds(self._server.pid)["api"], []
        for workload in many_at_once:
            many += await self._together(workload)
        tokens = sum(asked.timing.tokens for asked in many)
        token_s = (cpu_seconds(self._server.pid)["api"] - spent) / tokens
        quiet = await self._together(beside)
        cores = os.sched_getaffinity(self._server.pid)
        with _busy_cores(clip(_BUSY_CLIP, self._folder, 0), cores):
            busy = await self._together(beside)
        return Observations(
            found,
            later,
            many,
            self._steps([*found, *later, *many]),
            (self._steps(busy), self._steps(quiet)),
            token_s,
            decode_threads,
            len(cores),
        )

    async def _together(self, workload: Workload) -> list[Asked]:
        bodies = await self._asker.prepare(workload, workload.concurrency)
        return await self._asker.clients(workload, workload.concurrency, bodies)

    def _steps(self, asked: Sequence[Asked]) -> list[LoggedStep]:
        """Logged steps that held these requests and no others."""
        keys = {one.key for one in asked}
        with open(self._log) as lines:
            logged = [LoggedStep(**json.loads(line)) for line in lines]
        return [step for step in logged if keys.issuperset(key_of(part[0]) for part in step.work)]


@contextmanager
def _busy_cores(file: Path, cores: Collection[int]) -> Iterator[None]:
    """Decode a video in ``busy_threads`` on these cores, again and again, until the block ends."""
    ends = threading.Event()

    def decode() -> None:
        # Of this thread alone.
        os.sched_setaffinity(0, cores)
        while not ends.is_set():
            with av.open(str(file)) as container:
                for _ in container.decode(video=0):
                    if ends.is_set():
                        return

    threads = [threading.Thread(target=decode) for _ in range(busy_threads(len(cores)))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()
