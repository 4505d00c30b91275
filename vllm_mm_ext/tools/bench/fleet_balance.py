"""``fleet``, part `balance`: one video that half of all requests are about."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from vllm_mm_ext.fleet.key_headers import route_headers
from vllm_mm_ext.testing.routers import router
from vllm_mm_ext.testing.server import MODEL_NAME
from vllm_mm_ext.tools.bench.chat import messages_about, video_part
from vllm_mm_ext.tools.bench.conversations_engine import kv_blocks
from vllm_mm_ext.tools.bench.fleet_study import REPLICAS, FleetStudy, encoder_tokens
from vllm_mm_ext.tools.bench.harness import Row

VIDEOS = 12
HOT_SHARE = 0.5
REQUESTS = 640
CLIENTS = 64
"""Requests in flight. Envoy lets one more in than its bound says: of few, that is a large share."""
ANSWER_TOKENS = 8
HELD = 7
"""Videos that the KV cache of a replica has room for: both have room for all, each for half."""
_KV_BLOCKS = kv_blocks(2 * HELD)
_HEALTH = {"healthy_panic_threshold": {"value": 0}}
# Fields of Envoy's cluster by side: without a bound, in turn, and as shipped.
_SIDES: Mapping[str, Mapping[str, Any]] = {
    "unbounded": {"common_lb_config": _HEALTH},
    "in turn": {"lb_policy": "ROUND_ROBIN", "common_lb_config": _HEALTH},
    "bounded": {},
}


@dataclass(frozen=True)
class Served:
    """A request as the client saw it: when, by which replica, and what it found.

    Attributes:
        sent_s, end_s: Seconds on one clock.
        replica: Name of the replica.
        prompt_tokens: Of the prompt.
        cached_tokens: Of those, how many the prefix cache held.
    """

    sent_s: float
    end_s: float
    replica: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Balanced:
    """All requests by one side.

    Attributes:
        served: The requests.
        encoded: Tokens that went through the encoders of all replicas.
    """

    served: tuple[Served, ...]
    encoded: float

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that prefix caches held."""
        return sum(one.cached_tokens for one in self.served)

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        began = min(one.sent_s for one in self.served)
        return max(one.end_s for one in self.served) - began


def balance(study: FleetStudy) -> list[Row]:
    """Requests in flight of the busiest replica, and hits: without a bound (as stock) and with."""
    if not study.has_envoy:
        return []
    sides: dict[str, list[Balanced]] = {name: [] for name in _SIDES}
    for name in study.in_orders(tuple(_SIDES)):
        sides[name].append(_side(study, _SIDES[name]))
    study.notes.append(
        f"balance: {VIDEOS} videos, one of them in {HOT_SHARE:.0%} of {REQUESTS} requests, "
        f"{CLIENTS} in flight; KV for {HELD} of the videos on each of {len(REPLICAS)} replicas, "
        "which start anew for each side; `stock` is Envoy without a bound, or in turn where the "
        "row says so, `plugin` with the shipped bound of 1.2. Bar: at most 1.3 times the mean, "
        "hits at least 0.8x of those without a bound"
    )

    def row(
        name: str, unit: str, value: Callable[[Balanced], float], stock: str = "unbounded"
    ) -> Row:
        return Row.of(
            f"balance: {name}",
            unit,
            stock=[value(run) for run in sides[stock]],
            plugin=[value(run) for run in sides["bounded"]],
        )

    return [
        row(
            "in flight of the busiest replica / mean, over the run",
            "ratio",
            lambda run: in_flight(run.served, CLIENTS)[0],
        ),
        row(
            "the same at its highest",
            "ratio",
            lambda run: in_flight(run.served, CLIENTS)[1],
        ),
        row("prompt tokens from KV", "tokens", lambda run: run.cached_tokens),
        row(
            "prompt tokens from KV, against in turn",
            "tokens",
            lambda run: run.cached_tokens,
            "in turn",
        ),
        row("encoder tokens computed", "tokens", lambda run: run.encoded),
        row(
            "encoder tokens computed, against in turn", "tokens", lambda run: run.encoded, "in turn"
        ),
        row("seconds for all requests", "s", lambda run: run.seconds),
        row("seconds for all requests, against in turn", "s", lambda run: run.seconds, "in turn"),
    ]


def _side(study: FleetStudy, changed: Mapping[str, Any]) -> Balanced:
    """All requests through an Envoy with changed fields of its cluster, to new replicas."""
    with study.context.scratch() as media, study.replicas(media, _KV_BLOCKS) as servers:
        videos = study.videos(media, 100, VIDEOS)
        with router("envoy", [server.url for server in servers], changed=changed) as envoy:
            before = encoder_tokens(servers)
            served = asyncio.run(_requests(envoy.url, videos))
            after = encoder_tokens(servers)
    return Balanced(tuple(served), sum(after.values()) - sum(before.values()))


def in_flight(served: Sequence[Served], clients: int) -> tuple[float, float]:
    """Requests in flight of the busiest replica over the mean of all replicas.

    Counted while all clients are at work and have been answered once: at the very first, Envoy
    counts no requests, as their connections are not open yet.

    Args:
        served: The requests.
        clients: How many are in flight at a time.

    Returns:
        On the average over time, and at its highest.
    """
    begin = sorted(one.end_s for one in served)[clients - 1]
    end = max(one.sent_s for one in served)
    now = dict.fromkeys(REPLICAS, 0)
    seconds = dict.fromkeys(REPLICAS, 0.0)
    most, last = 0.0, begin
    # At one time, requests end before others are sent.
    changes = [(one.sent_s, 1, one.replica) for one in served]
    changes += [(one.end_s, -1, one.replica) for one in served]
    for at, change, replica in sorted(changes):
        if last < at <= end:
            for name, count in now.items():
                seconds[name] += count * (at - last)
            last = at
            most = max(most, max(now.values()) * len(now) / max(1, sum(now.values())))
        now[replica] += change
    return max(seconds.values()) * len(seconds) / sum(seconds.values()), most


async def _requests(url: str, videos: Sequence[Path]) -> list[Served]:
    """All requests, after each video was asked about once."""
    rng = random.Random(1)
    asked = [
        (videos[0 if rng.random() < HOT_SHARE else rng.randrange(1, len(videos))], number)
        for number in range(REQUESTS)
    ]
    left = iter(asked)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        for number, video in enumerate(videos):
            await _one(session, video, -number)

        async def client() -> list[Served]:
            return [await _one(session, video, number) for video, number in left]

        of_clients = await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return [one for done in of_clients for one in done]


async def _one(session: aiohttp.ClientSession, video: Path, number: int) -> Served:
    messages = messages_about([video_part(video.as_uri())], 1)
    messages[0]["content"].append({"type": "text", "text": f"This is question {number}."})
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        # Under load, videos of one side could have fewer tokens than those of another.
        "mm_ext": {"quality": "fixed"},
    }
    sent = time.perf_counter()
    path = "/v1/chat/completions"
    async with session.post(path, json=body, headers=route_headers(body)) as response:
        text = await response.text()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {text[:500]}")
    answer = json.loads(text)
    usage = answer["usage"]
    return Served(
        sent_s=sent,
        end_s=time.perf_counter(),
        replica=answer["model"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )
