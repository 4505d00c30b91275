"""What an operator and clients rely on, on a real server with two engines and two API servers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from memory_search import Content
from test_live_server import answered, connected, stream, told, tone
from test_takedown_server import KEY, call, config_file, decoded, noise, overview, pieces, record_of

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.origin import Origin, Resource
from vllm_mm_ext.testing.scraped import Scraped
from vllm_mm_ext.testing.server import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ENGINES = ("0", "1")
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = config_file(tmp_path_factory.mktemp("engines"), {"page": True, "admin": True})
    # vLLM starts as many API servers as engines.
    args = ["--config", path, "--api-key", KEY, "--data-parallel-size", "2"]
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    with serve(checkpoint("qwen2_5_omni"), plugin=True, args=args, env=env) as running:
        assert len(overview(running)["servers"]) == 2
        yield running


def ask(server: Server, url: str, engine: str | None = None, **extra: Any) -> tuple[str, Any]:
    """Answer and usage of a request about a video; by default the plugin chooses the engine."""
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": "What is it?"},
    ]
    message = {"role": "user", "content": content}
    body = {"model": server.model, "messages": [message], "max_tokens": 4, "temperature": 0}
    body["ignore_eos"] = True
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    if engine is not None:
        headers["X-data-parallel-rank"] = engine
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps({**body, **extra}).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=180) as answer:
        told = json.loads(answer.read())
    return told["choices"][0]["message"]["content"], told["usage"]


def cached(usage: Any) -> int:
    """Prompt tokens whose KV was found; vLLM tells of none with null."""
    return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def engines(server: Server) -> dict[str, dict[str, Any]]:
    return {str(engine["number"]): engine for engine in overview(server)["engines"]}


def files(server: Server, part: str = "kv") -> dict[str, set[str]]:
    """URLs of the media in a cache of each engine."""
    return {
        number: {item["url"] for item in engine[part]["items"] if "url" in item}
        for number, engine in engines(server).items()
    }


def sessions(server: Server) -> list[dict[str, bool]]:
    """The KV sessions of each engine, and whether they are pinned."""
    return [
        {one["id"]: one["pinned"] for one in engine["kv"]["sessions"]}
        for engine in engines(server).values()
    ]


def at_rest(server: Server) -> bool:
    """Whether no engine works, and no live session is open or pins anything."""
    seen = overview(server)
    live = [one["live"] for one in seen["servers"]]
    return not any(one["sessions"] or one["pinned"] for one in live) and not any(
        engine["load"]["running"]
        or engine["load"]["waiting"]
        or engine["kv"]["used"]
        or any(one["pinned"] for one in engine["kv"]["sessions"])
        for engine in seen["engines"]
    )


def growth(before: Scraped, after: Scraped, name: str, **labels: str) -> float:
    """By how much a counter has grown between two scrapes."""
    return after.sum(name, **labels) - before.sum(name, **labels)


def test_requests_about_a_video_go_to_one_engine_and_every_scrape_counts_all(
    server: Server, origin: Origin, tmp_path: Path
) -> None:
    urls = []
    for number in range(6):
        name = f"{number}.mp4"
        file = noise(tmp_path / name, 40 + number)
        urls.append(origin.serve(f"/{name}", Resource(file, etag=f'"{number}"')))
    before = Scraped(server.get("/metrics"))
    first = [ask(server, url) for url in urls]
    with ThreadPoolExecutor(4) as clients:
        again = list(clients.map(lambda url: ask(server, url), urls * 2))
    assert [text for text, _ in again] == [text for text, _ in first] * 2
    assert all(cached(usage) > usage["prompt_tokens"] / 2 for _, usage in again)

    held = files(server)
    assert held["0"]
    assert held["1"]
    assert held["0"] | held["1"] == set(urls)
    assert not held["0"] & held["1"]

    usages = [usage for _, usage in first + again]
    prompts = sum(usage["prompt_tokens"] for usage in usages)
    found = sum(map(cached, usages))
    written = sum(usage["completion_tokens"] for usage in usages)
    # Several scrapes, as any API server may answer.
    for _ in range(4):
        scrape = Scraped(server.get("/metrics"))
        grown = partial(growth, before, scrape)
        stages = {"stage": "prefill", "modality": "request"}
        assert grown("mm_ext_stage_seconds_count", **stages) == len(usages)
        assert grown("mm_ext_engine_tokens_total", kind="prefill") == prompts - found
        assert grown("mm_ext_engine_tokens_total", kind="decode") == written - len(usages)
        for engine in ENGINES:
            of = {"engine": engine}
            steps = grown("mm_ext_engine_steps_total", work="decode", **of)
            assert steps > 0
            # A step of an engine computes a token of each request that it decodes.
            assert grown("mm_ext_engine_tokens_total", kind="decode", **of) >= steps
            assert grown("mm_ext_encoder_tokens_total", modality="video", **of) > 0
            kv = engines(server)[engine]["kv"]
            tokens = scrape.sum("mm_ext_kv_media_tokens", modality="video", **of)
            assert tokens == kv["tokens"]["video"] > 0
            blocks = {
                state: scrape.sum("mm_ext_kv_blocks", state=state, **of)
                for state in ("used", "kept", "free")
            }
            assert blocks["used"] == 0
            assert blocks["kept"] == kv["kept"] > 0
            assert sum(blocks.values()) == kv["blocks"]


def test_a_takedown_reaches_every_engine(server: Server, origin: Origin, tmp_path: Path) -> None:
    # Longer than others, so that its frames are told from theirs.
    file, other = noise(tmp_path / "t.mp4", 50, 5.0), noise(tmp_path / "o.mp4", 51)
    url = origin.serve("/taken.mp4", Resource(file, etag='"50"'))
    kept = origin.serve("/kept.mp4", Resource(other, etag='"51"'))
    ask(server, kept)
    for name in ({"url": url}, {"digest": blake3(file).hexdigest()}):
        answers = []
        for engine in ENGINES:
            text, usage = ask(server, url, engine)
            assert cached(usage) < 64
            answers.append(text)
            text, usage = ask(server, url, engine)
            assert cached(usage) > usage["prompt_tokens"] / 2
            answers.append(text)
        assert len(set(answers)) == 1
        assert all(url in held for held in files(server).values())
        medium = record_of(server, overview(server), "taken.mp4")["media"][0]
        height, width = medium["size"]
        frames = decoded(server, medium["frames"] * height * width * 3)
        contents = {"file": Content(file, apart_from=other), "frames": Content(frames)}
        assert all(pieces(server, contents).values())
        status, done = call(server, "/mm_ext/media/drop", name)
        assert (status, done["complete"]) == (200, True), done
        assert pieces(server, contents) == {"file": 0, "frames": 0}
        for part in ("kv", "encoder"):
            held = files(server, part)
            assert not any(url in one for one in held.values())
            assert any(kept in one for one in held.values())
    # Nobody finds it again.
    for engine in ENGINES:
        assert cached(ask(server, url, engine)[1]) < 64


def test_pins_hold_on_every_engine_until_they_are_released(
    server: Server, origin: Origin, tmp_path: Path
) -> None:
    url = origin.serve("/pinned.mp4", Resource(noise(tmp_path / "p.mp4", 60), etag='"60"'))
    for engine in ENGINES:
        ask(server, url, engine, session_id="talk")
    assert call(server, "/mm_ext/sessions/pin", {"session_id": "talk"})[0] == 200
    pinned = call(server, "/mm_ext/media/pin", {"url": url})[1]
    media = f"media:{pinned['digests'][0]}"
    assert pinned["items"] >= 2
    assert all(one["talk"] and one[media] for one in sessions(server))
    command = [sys.executable, "-c", "from vllm_mm_ext.tools.cli.main import app; app()"]
    command += ["top", server.url, "--once"]
    env = {**os.environ, "COLUMNS": "140", "VLLM_API_KEY": KEY}
    top = subprocess.run(command, env=env, capture_output=True, text=True)
    assert top.returncode == 0, top.stderr
    assert all(f"engine {engine}" in top.stdout for engine in ENGINES)
    assert "2 pinned" in top.stdout
    assert call(server, "/mm_ext/media/unpin", {"url": url})[1]["items"] == pinned["items"]
    assert call(server, "/mm_ext/sessions/unpin", {"session_id": "talk"})[0] == 200
    assert all(not one["talk"] and media not in one for one in sessions(server))
    assert call(server, "/mm_ext/sessions/release", {"session_id": "talk"})[0] == 200
    assert not any("talk" in one for one in sessions(server))


async def talk(connection: Any) -> list[tuple[str, Any]]:
    """Three answers: to text, to sound and frames, to text again."""

    async def say(text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": content}
        )

    await say("What do you hear and see?")
    answers = [await answered(connection, mm_ext=GREEDY)]
    await stream(connection, tone(5), frames=5)
    await connection.input_audio_buffer.commit()
    await told(connection, "input_audio_buffer.committed")
    answers.append(await answered(connection, mm_ext=GREEDY))
    await say("And now?")
    answers.append(await answered(connection, mm_ext=GREEDY))
    return answers


async def test_live_sessions_spread_over_engines_and_each_stays_on_one(server: Server) -> None:
    async with AsyncExitStack() as open_sessions:
        connections = [await open_sessions.enter_async_context(connected(server)) for _ in range(4)]
        talks = await asyncio.gather(*map(talk, connections))
        # All heard and saw the same, on whichever engine.
        assert len({tuple(text for text, _ in answers) for answers in talks}) == 1
        for answers in talks:
            usage = answers[-1][1]
            left = usage.input_tokens - usage.input_token_details.cached_tokens
            assert left < usage.input_tokens / 2
        where: dict[str, list[str]] = {}
        for number, engine in (await asyncio.to_thread(engines, server)).items():
            for one in engine["kv"]["sessions"]:
                if one["pinned"] and one["items"]:
                    where.setdefault(one["id"], []).append(number)
        assert len(where) == 4
        assert {tuple(numbers) for numbers in where.values()} == {("0",), ("1",)}
    while not await asyncio.to_thread(at_rest, server):
        pass


async def test_a_paused_server_answers_live_sessions_later_on_all_engines(server: Server) -> None:
    assert call(server, "/pause", {})[0] == 200
    async with AsyncExitStack() as open_sessions:
        connections = [await open_sessions.enter_async_context(connected(server)) for _ in range(2)]
        talks = [asyncio.create_task(talk(one)) for one in connections]
        await asyncio.sleep(1)
        assert not any(one.done() for one in talks)
        assert (await asyncio.to_thread(call, server, "/resume", {}))[0] == 200
        await asyncio.gather(*talks)


def test_clients_that_leave_leave_nothing_in_any_engine(server: Server) -> None:
    body = {"model": server.model, "stream": True, "max_tokens": 10_000, "ignore_eos": True}
    body["messages"] = [{"role": "user", "content": "Go on."}]

    def leave(number: int) -> None:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        headers["X-data-parallel-rank"] = ENGINES[number % 2]
        address = f"{server.url}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()

    with ThreadPoolExecutor(6) as clients:
        list(clients.map(leave, range(6)))
    deadline = time.monotonic() + 30
    while not at_rest(server):
        assert time.monotonic() < deadline, overview(server)["engines"]
    scrape = Scraped(server.get("/metrics"))
    for engine in ENGINES:
        assert scrape.sum("vllm:num_requests_running", engine=engine) == 0
        assert scrape.sum("mm_ext_engine_requests", engine=engine) == 0
