"""Real routers before two real servers: requests about one video stay together and whole.

Routers whose programs are not on the PATH are left out; the extra `fleet` has three of them.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from vllm_mm_ext.fleet.key_headers import with_route_key
from vllm_mm_ext.fleet.route_key import named_key
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.routers import ROUTERS, missing, router
from vllm_mm_ext.testing.scraped import Scraped
from vllm_mm_ext.testing.server import MODEL_NAME, Server, serve
from vllm_mm_ext.tools.bench.live_load import live_stats

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Past the least number, keys are tried until both servers had some: all of the most go to one
# server once in 30,000 runs.
LEAST_KEYS, MOST_KEYS = 4, 16
TURNS = 3
SOCKETS = {"envoy", "nginx", "haproxy"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(MOST_KEYS):
        make_clip(folder / f"{number}.mp4", width=64, height=48, duration=2.0, seed=number)
    return folder


@pytest.fixture(scope="module")
def servers(media: Path) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                serve(
                    checkpoint("qwen2_5_omni"),
                    plugin=True,
                    args=["--allowed-local-media-path", str(media), "--max-model-len", "4096"],
                    env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
                )
            )
            for _ in range(2)
        ]


@pytest.fixture(scope="module", params=sorted(ROUTERS))
def routed(request: pytest.FixtureRequest, servers: list[Server]) -> Iterator[tuple[str, Server]]:
    if (reason := missing(request.param)) is not None:
        pytest.skip(reason)
    with router(request.param, [server.url for server in servers]) as running:
        yield request.param, running


def body(media: Path, number: int, **part: Any) -> dict[str, Any]:
    url = {"url": (media / f"{number}.mp4").as_uri()}
    video = {"type": "video_url", "video_url": url, **part}
    text = {"type": "text", "text": "What happens?"}
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": [video, text]}],
        "max_tokens": 6,
        "temperature": 0.0,
        "ignore_eos": True,
        "mm_ext": {"max_frames": 2 if number % 2 else 4},
    }


def ask(url: str, asked: dict[str, Any], path: str = CHAT) -> httpx.Response:
    keyed, headers = with_route_key(asked)
    return httpx.post(f"{url}{path}", json=keyed, headers=headers, timeout=120)


def handled(servers: list[Server]) -> list[float]:
    """Chat requests that each server has answered, whatever the status."""
    return [
        Scraped(server.get("/metrics")).sum("http_requests_total", handler=CHAT)
        for server in servers
    ]


def test_requests_about_one_video_go_to_one_server_with_all_their_fields(
    routed: tuple[str, Server], servers: list[Server], media: Path
) -> None:
    places = Counter[int]()
    for number in range(MOST_KEYS):
        if number >= LEAST_KEYS and len(places) == len(servers):
            break
        direct = ask(servers[0].url, body(media, number)).json()
        before = handled(servers)
        for _ in range(TURNS):
            answer = ask(routed[1].url, body(media, number)).json()
            assert answer["choices"][0]["message"] == direct["choices"][0]["message"]
            assert answer["mm_ext"]["videos"][0]["frames"] == (2 if number % 2 else 4)
        counts = [after - was for after, was in zip(handled(servers), before, strict=True)]
        assert sorted(counts) == [0, TURNS]
        places[counts.index(TURNS)] += 1
    assert len(places) == len(servers), "one server got all videos"


def test_a_stream_arrives_with_its_block(routed: tuple[str, Server], media: Path) -> None:
    keyed, headers = with_route_key({**body(media, 0), "stream": True})
    url = f"{routed[1].url}{CHAT}"
    with httpx.stream("POST", url, json=keyed, headers=headers, timeout=120) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3
    assert json.loads(lines[-2].removeprefix("data: "))["mm_ext"]["videos"][0]["frames"] == 4


def test_a_video_named_by_its_uuid_is_found_again(routed: tuple[str, Server], media: Path) -> None:
    name, running = routed
    sent = body(media, 1, uuid=f"clip by {name}")
    del sent["mm_ext"]
    first = ask(running.url, sent).json()
    again = body(media, 1, uuid=f"clip by {name}", video_url=None)
    del again["mm_ext"]
    answer = ask(running.url, again)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"] == first["choices"][0]["message"]
    unknown = ask(running.url, {**body(media, 1, uuid="never sent", video_url=None), "mm_ext": {}})
    assert unknown.status_code == 400
    assert "by uuid alone" in unknown.text


def test_a_refusal_arrives_as_it_is_and_is_not_sent_again(
    routed: tuple[str, Server], servers: list[Server], media: Path
) -> None:
    (media / "no-video.mp4").write_bytes(b"no video" * 100)
    refused = body(media, 0)
    refused["messages"][0]["content"][0]["video_url"]["url"] = (media / "no-video.mp4").as_uri()
    before = sum(handled(servers))
    answer = ask(routed[1].url, refused)
    assert answer.status_code == 422
    assert "video" in answer.text
    assert sum(handled(servers)) == before + 1


def test_megabytes_of_video_pass_in_the_body(routed: tuple[str, Server], media: Path) -> None:
    padded = (media / "0.mp4").read_bytes() + b"\0" * 6_000_000
    asked = body(media, 0)
    url = f"data:video/mp4;base64,{base64.b64encode(padded).decode()}"
    asked["messages"][0]["content"][0]["video_url"]["url"] = url
    answer = ask(routed[1].url, asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["mm_ext"]["videos"][0]["frames"] == 4


async def test_live_sessions_of_one_key_go_to_one_server(
    routed: tuple[str, Server], servers: list[Server]
) -> None:
    name, running = routed
    if name not in SOCKETS:
        pytest.skip(f"{name} passes no WebSocket on")
    address = running.url.replace("http", "ws", 1)
    places = Counter[int]()
    for number in range(MOST_KEYS):
        if number >= LEAST_KEYS and len(places) == len(servers):
            break
        key = named_key(f"room {number}")
        before = [live_stats(server)["opened"] for server in servers]
        for _ in range(2):
            url = f"{address}/v1/realtime?model={MODEL_NAME}&mm_key={key}"
            async with websockets.connect(url) as socket:
                event = json.loads(await asyncio.wait_for(socket.recv(), 30))
                assert event["type"] == "session.created"
        opened = [live_stats(server)["opened"] for server in servers]
        counts = [now - was for now, was in zip(opened, before, strict=True)]
        assert sorted(counts) == [0, 2]
        places[counts.index(2)] += 1
    assert len(places) == len(servers), "one server got all sessions"


def test_what_needs_no_key_or_is_for_operators_is_asked_of_each_server_itself(
    routed: tuple[str, Server],
) -> None:
    name, running = routed
    if name not in SOCKETS:
        pytest.skip(f"{name} refuses no paths")
    for path in ("/metrics", "/mm_ext/sight", "/mm_ext/stats", "/mm%5Fext/media/drop"):
        assert httpx.get(f"{running.url}{path}").status_code == 403
    for path in ("/invocations", "/v1/%2e%2e/invocations", "/tokenize", "/scale_elastic_ep"):
        assert httpx.post(f"{running.url}{path}", json={}).status_code in (403, 404)
    for path in ("/health", "/mm_ext/health", "/v1/models"):
        assert httpx.get(f"{running.url}{path}").status_code == 200
