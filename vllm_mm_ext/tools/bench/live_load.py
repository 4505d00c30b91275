"""Parts of ``bench live`` with many sessions: in time beside text, dropped, and fed nonsense."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.testing.memory import Role, cpu_seconds
from vllm_mm_ext.testing.server import Server
from vllm_mm_ext.tools.bench.harness import Row, percentile
from vllm_mm_ext.tools.bench.live_feed import Feed, made_feed, play
from vllm_mm_ext.tools.bench.live_nonsense import messages
from vllm_mm_ext.tools.bench.live_sides import Study, omni_server
from vllm_mm_ext.tools.bench.live_timing import ANSWERED, first_token_at, options
from vllm_mm_ext.tools.bench.long_video_client import requests_in_engine
from vllm_mm_ext.tools.bench.long_video_text import Texts
from vllm_mm_ext.tools.bench.mixed_engine import TEXT_EVERY_TOKENS
from vllm_mm_ext.tools.cli.live_client import LiveError, LiveSession, live_session, socket_url

MIB = 1 << 20
SESSIONS = 32
_FEEDS = 8
_TALK_S = 60.0
_TURN_S = 6.0
# Sessions whose CPU is measured: so few that appends do not wait for each other.
_FEW = 4
_WINDOW_S = 12.0
_GROWN_S = 24.0
# What an operator asks for who wants no gap between tokens twice as long as without sessions.
_TARGET = 1.5
_DROPPED, _WARM, _AT_ONCE = 1000, 100, 16
_BACK_S = 60.0
_CONNECTIONS, _MESSAGES = 100, 100
_REFUSING = frozenset({1000, 1003, 1007, 1008, 1009})


@dataclass(frozen=True)
class Held:
    """What a server holds.

    Attributes:
        memory: Bytes of all its processes, each shared page counted once.
        files: Open file descriptors of all its processes.
        sessions: Live sessions, as it counts them.
        pinned: Of these, those whose KV is pinned.
        requests: Requests in the engine.
    """

    memory: int
    files: int
    sessions: int
    pinned: int
    requests: int

    @classmethod
    def by(cls, server: Server) -> Held:
        """What a server holds now."""
        live = live_stats(server)
        return cls(
            sum(process.pss for process in server.memory()),
            _files(server.pid),
            int(live["sessions"]),
            int(live["pinned"]),
            requests_in_engine(server.get("/metrics")),
        )


@dataclass
class Talk:
    """What sessions were answered.

    Attributes:
        first_ms: Milliseconds from each commit to the first token.
        failed: Answers that the server began and did not bring to an end.
    """

    first_ms: list[float] = field(default_factory=list)
    failed: int = 0

    async def ask(self, session: LiveSession) -> None:
        """Commit what a session was sent, ask for an answer, and note it."""
        await session.commit()
        answer = await session.respond()
        if answer.status not in ANSWERED:
            self.failed += 1
            return
        assert answer.asked is not None
        self.first_ms.append(1e3 * (first_token_at(answer) - answer.asked))

    def rows(self, name: str) -> list[Row]:
        """How many answers there were, and how long they took where any did not fail."""
        count = len(self.first_ms) + self.failed
        rows = [Row.of(f"{name}: answers, failed", "count", stock=[count], plugin=[self.failed])]
        for word, part in (("median", 50), ("p99", 99)) if self.first_ms else ():
            value = percentile(self.first_ms, part)
            rows.append(Row.of(f"{name}: commit to first token, {word}", "ms", plugin=[value]))
        return rows


def live_stats(server: Server) -> Mapping[str, Any]:
    """The server's own counters of live sessions."""
    found: Mapping[str, Any] = json.loads(server.get("/mm_ext/stats"))["live"]
    return found


def _files(pid: int) -> int:
    root = psutil.Process(pid)
    count = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            count += process.num_fds()
    return count


def sessions(study: Study) -> list[Row]:
    """Sessions at real-time speed: units that are late, and the text of another client."""
    alone: list[float] = []
    beside: list[float] = []
    worst: list[float] = []
    late: list[float] = []
    total: list[float] = []
    answers = Talk()
    texts = Texts(study.omni, 0)
    every_s = TEXT_EVERY_TOKENS * texts.alone()[0]
    target_ms = _TARGET * 1e3 * percentile(texts.stream(every_s), 99)
    settings = {"scheduler": {"target_itl_ms": target_ms}}
    with omni_server(settings=settings, logged=False) as server:
        with _talking(server, _FEW):
            # The scheduler learns what steps cost.
            time.sleep(10)
        cpu = _unit_cpu(server)
        for repeat in range(study.context.repeats):
            texts = Texts(server, 1 + repeat)
            every_s = TEXT_EVERY_TOKENS * texts.alone()[0]
            alone.append(1e3 * percentile(texts.stream(every_s), 99))
            before = live_stats(server)
            with _talking(server, SESSIONS) as talk:
                # Until all have begun.
                time.sleep(_TURN_S)
                beside.append(1e3 * percentile(texts.stream(every_s), 99))
            after = live_stats(server)
            total.append(after["units"] - before["units"])
            late.append(after["late_units"] - before["late_units"])
            worst.append(after["worst_late_s"])
            answers.first_ms += talk.first_ms
            answers.failed += talk.failed
    study.notes.append(
        f"sessions: {SESSIONS} of a tiny Omni, each with sound and 1 picture a second in real "
        f"time, a turn of {_TURN_S:g} s after another; late: a unit that was in KV later than one "
        "unit's time (2 s) after it was complete, as the server counts; target_itl_ms "
        f"{target_ms:.0f}: {_TARGET:g}x the p99 of texts alone; CPU of a unit: of {_FEW} sessions "
        f"without texts, answers included, stock column: from {_TURN_S:g} s on, plugin column: "
        f"{_WINDOW_S + _GROWN_S:g} s later"
    )
    name = f"{SESSIONS} sessions"
    return [
        Row.of(f"{name}: units appended, late", "count", stock=total, plugin=late),
        Row.of(f"{name}: the latest unit, behind its end", "s", plugin=[max(worst)]),
        *answers.rows(name),
        Row.of("text ITL p99: alone, beside them", "ms", stock=alone, plugin=beside),
        *cpu,
    ]


def _unit_cpu(server: Server) -> list[Row]:
    """CPU milliseconds of a unit by process, early in conversations and once they have grown."""
    early: dict[Role, float] = {}
    late: dict[Role, float] = {}
    with _talking(server, _FEW):
        for wait_s in (_TURN_S, _GROWN_S):
            time.sleep(wait_s)
            units, spent = live_stats(server)["units"], cpu_seconds(server.pid)
            time.sleep(_WINDOW_S)
            now = cpu_seconds(server.pid)
            units = live_stats(server)["units"] - units
            late = {role: 1e3 * (now[role] - spent[role]) / units for role in now}
            early = early or late
    names: dict[Role, str] = {"api": "API server", "engine": "engine"}
    return [
        Row.of(f"CPU of a unit: {name}", "ms", stock=[early[role]], plugin=[late[role]])
        for role, name in names.items()
    ]


@contextmanager
def _talking(server: Server, count: int) -> Iterator[Talk]:
    """So many sessions while the block runs, and what they are answered."""
    talk = Talk()
    feeds = [made_feed(_TALK_S, 1.0, 200 + seed) for seed in range(_FEEDS)]
    over: list[bool] = []

    async def one(number: int) -> None:
        await asyncio.sleep(_TURN_S * number / count)
        async with live_session(server.url, None) as session:
            await session.update(**options())
            feed, turn = feeds[number % len(feeds)], 0
            while not over:
                start = turn * _TURN_S % _TALK_S
                # Sessions that share a feed are a few seconds of it apart.
                await play(session, feed, start, start + _TURN_S, offset=turn * _TURN_S - start)
                turn += 1
                await talk.ask(session)

    async def everyone() -> None:
        await asyncio.gather(*(one(number) for number in range(count)))

    with ThreadPoolExecutor(1) as pool:
        talking = pool.submit(asyncio.run, everyone())
        try:
            yield talk
        finally:
            over.append(True)
            talking.result()


def dropped(study: Study) -> list[Row]:
    """Sessions whose connections break: what the server holds before and after."""
    server = study.omni
    feed = made_feed(4.0, 1.0, 5)
    asyncio.run(_drop(server, feed, _WARM))
    _settled(server)
    before = Held.by(server)
    began = time.perf_counter()
    answered = asyncio.run(_drop(server, feed, _DROPPED))
    took = time.perf_counter() - began
    back = _settled(server)
    after = Held.by(server)
    study.notes.append(
        f"dropped: each of {_DROPPED} sessions sends 2 s of sound and pictures or more, every "
        f"third one commits and asks, {answered} began to answer; then its connection is cut "
        f"without a close; {took:.0f} s in all, {_AT_ONCE} at a time, after {_WARM} others of the "
        "same kind; stock column: before, plugin column: after"
    )
    name = f"{_DROPPED} dropped sessions"
    return [
        Row.of(
            f"{name}: memory of all processes",
            "MiB",
            stock=[before.memory / MIB],
            plugin=[after.memory / MIB],
        ),
        Row.of(f"{name}: file descriptors", "count", stock=[before.files], plugin=[after.files]),
        Row.of(f"{name}: sessions left", "count", stock=[before.sessions], plugin=[after.sessions]),
        Row.of(
            f"{name}: sessions with pinned KV",
            "count",
            stock=[before.pinned],
            plugin=[after.pinned],
        ),
        Row.of(
            f"{name}: requests in the engine",
            "count",
            stock=[before.requests],
            plugin=[after.requests],
        ),
        Row.of(f"{name}: back to none after", "s", plugin=[back]),
    ]


def _settled(server: Server) -> float:
    """Wait until no session and no request is left, for a while at most; how long that took."""
    began = time.perf_counter()
    while time.perf_counter() - began < _BACK_S:
        if not live_stats(server)["sessions"] and not requests_in_engine(server.get("/metrics")):
            break
        time.sleep(0.1)
    took = time.perf_counter() - began
    # Memory is given back behind the last session.
    time.sleep(3)
    return took


async def _drop(server: Server, feed: Feed, count: int) -> int:
    """Open so many sessions, use them, cut their connections; how many began to answer."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> bool:
        async with gate, aiohttp.ClientSession() as client:
            socket = await client.ws_connect(socket_url(server.url, None), max_msg_size=0)
            session = LiveSession(socket)
            await session.until(lambda: bool(session.session), _BACK_S)
            await session.update(**options(answer=64))
            await play(session, feed, 0.0, 2.0 + 2.0 * (number % 5) / 4, speed=40.0)
            if number % 3 == 0:
                await session.send("input_audio_buffer.commit")
                await session.send("response.create")
                await session.until(lambda: bool(session.answers), _BACK_S)
            begun = bool(session.answers)
            assert socket._response.connection is not None
            # Without WebSocket's own goodbye, as when a phone loses its network.
            transport = socket._response.connection.transport
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            with suppress(LiveError):
                await session.until(lambda: False, 5.0)
            return begun

    return sum(await asyncio.gather(*(one(number) for number in range(count))))


def fuzz(study: Study) -> list[Row]:
    """Random events and malformed messages: answered by errors or closes, nothing breaks."""
    server = study.omni
    _settled(server)
    before, logged = Held.by(server), server.log.stat().st_size
    tally: Counter[str] = Counter()
    for start in range(0, _CONNECTIONS, _AT_ONCE):
        seeds = range(start, min(start + _AT_ONCE, _CONNECTIONS))
        for found in asyncio.run(_all_nonsense(server, seeds)):
            tally.update(found)
    _settled(server)
    after = Held.by(server)
    broken = server.log.read_text(errors="replace")[logged:].count("Traceback")
    alive = server.alive() and asyncio.run(_still_works(server))
    sent, malformed, refused = (tally[key] for key in ("sent", "malformed", "errors"))
    closes = ", ".join(f"{key} {n}" for key, n in sorted(tally.items()) if key.startswith("close"))
    study.notes.append(
        f"fuzz: {_CONNECTIONS} connections, {sent:,} messages of which {malformed:,} are no valid "
        f"events; {refused:,} error events; {closes or 'no closes'}; memory "
        f"{before.memory / MIB:.0f} -> {after.memory / MIB:.0f} MiB, descriptors {before.files} -> "
        f"{after.files}"
    )
    return [
        Row.of(
            "fuzz: malformed messages, error events", "count", stock=[malformed], plugin=[refused]
        ),
        Row.of("fuzz: messages of the server that are no JSON", "count", plugin=[tally["bad"]]),
        Row.of(
            "fuzz: closes that blame the server, or without a code",
            "count",
            plugin=[sum(n for key, n in tally.items() if key.startswith("close!"))],
        ),
        Row.of("fuzz: tracebacks in the server's log", "count", plugin=[broken]),
        Row.of(
            "fuzz: sessions and requests left", "count", plugin=[after.sessions + after.requests]
        ),
        Row.of("fuzz: a session works afterwards", "count", plugin=[float(alive)]),
    ]


async def _all_nonsense(server: Server, seeds: range) -> list[dict[str, int]]:
    return list(await asyncio.gather(*(_nonsense(server, seed) for seed in seeds)))


async def _nonsense(server: Server, seed: int) -> dict[str, int]:
    """One connection; counts of what was sent and of what came back."""
    tally = {"sent": 0, "malformed": 0, "errors": 0, "bad": 0}
    async with aiohttp.ClientSession() as client:
        socket = await client.ws_connect(socket_url(server.url, None), max_msg_size=0)

        async def read() -> None:
            async for message in socket:
                try:
                    tally["errors"] += json.loads(message.data)["type"] == "error"
                except (ValueError, TypeError, KeyError):
                    tally["bad"] += 1

        reader = asyncio.create_task(read())
        for data, valid in messages(random.Random(seed), _MESSAGES):
            if socket.closed:
                break
            with suppress(aiohttp.ClientError, ConnectionError):
                await (socket.send_str(data) if isinstance(data, str) else socket.send_bytes(data))
                tally["sent"] += 1
                tally["malformed"] += not valid
            await asyncio.sleep(0)
        # An answer to the last message, before this side closes.
        await asyncio.wait({reader}, timeout=3.0)
        if not socket.closed:
            await socket.close()
        else:
            code = socket.close_code
            tally[f"close{'' if code in _REFUSING else '!'} {code}"] = 1
        await reader
    return tally


async def _still_works(server: Server) -> bool:
    async with live_session(server.url, None) as session:
        await session.update(**options())
        await session.say("what")
        return (await session.respond()).status in ANSWERED
