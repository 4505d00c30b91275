"""``fleet``, part `routing`: conversations about videos by the media key, and in turn."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_mm_ext.fleet.key_headers import route_headers
from vllm_mm_ext.fleet.rendezvous import ranked
from vllm_mm_ext.fleet.route_key import route_key
from vllm_mm_ext.testing.routers import router
from vllm_mm_ext.testing.server import MODEL_NAME, Server
from vllm_mm_ext.tools.bench.chat import conversation
from vllm_mm_ext.tools.bench.conversations_engine import (
    BLOCK,
    VIDEO_TOKENS,
    kv_blocks,
    schedule,
)
from vllm_mm_ext.tools.bench.fleet_study import REPLICAS, FleetStudy, encoder_tokens
from vllm_mm_ext.tools.bench.harness import Row

CONVERSATIONS = 40
TURNS = 5
CLIENTS = 2
"""Requests in flight: each client sends the next one of the schedule when its last is answered."""
ANSWER_TOKENS = 4
# The caches of all replicas together hold the conversations, those of one do not.
KV_BLOCKS = kv_blocks(2 * 26)
"""KV blocks of a replica: for 26 of the conversations."""
ROUTINGS = ("round-robin", "media-key")
# Without the key: the same Envoy, in turn.
_IN_TURN = {"lb_policy": "ROUND_ROBIN"}


@dataclass(frozen=True)
class Record:
    """One request as the client saw it.

    Attributes:
        conversation: Its number, which is also that of its video.
        turn: From 1.
        sent_s, first_token_s, end_s: When, in seconds since the first request was sent.
        prompt_tokens, media_tokens: Of the prompt, and of the video in it.
        cached_tokens: Of the prompt, how many the prefix cache held.
        answer_tokens: Of the answer.
        replica: Name of the replica that answered.
    """

    conversation: int
    turn: int
    sent_s: float
    first_token_s: float
    end_s: float
    prompt_tokens: int
    media_tokens: int
    cached_tokens: int
    answer_tokens: int
    replica: str

    @property
    def ttft_s(self) -> float:
        """Seconds from sending the request to its first token."""
        return self.first_token_s - self.sent_s


@dataclass(frozen=True)
class RoutingRun:
    """All conversations by one routing.

    Attributes:
        routing: Of ``ROUTINGS``.
        records: The requests, in the order in which they were sent.
        encoded: Tokens that went through the encoder of each replica.
    """

    routing: str
    records: tuple[Record, ...]
    encoded: dict[str, float]

    def follow_ups(self) -> list[Record]:
        """The requests after the first of each conversation."""
        return [record for record in self.records if record.turn > 1]

    def hit_share(self) -> float:
        """Share of the prompt tokens of follow-ups that prefix caches held."""
        later = self.follow_ups()
        return sum(r.cached_tokens for r in later) / sum(r.prompt_tokens for r in later)


def routing(study: FleetStudy) -> list[Row]:
    """Tokens encoded and first tokens of follow-ups, in turn (as stock) and by the media key."""
    in_turn, by_key = (study.routing[name] for name in ROUTINGS)

    def row(name: str, unit: str, value: Callable[[RoutingRun], float]) -> Row:
        return Row.of(
            f"routing: {name}",
            unit,
            stock=[value(run) for run in in_turn],
            plugin=[value(run) for run in by_key],
        )

    def ttft_ms(records: Sequence[Record]) -> float:
        return 1e3 * statistics.median(record.ttft_s for record in records)

    shares = ", ".join(
        f"{sum(record.replica == name for record in by_key[0].records)} to {name}"
        for name in REPLICAS
    )
    study.notes.append(
        f"routing: {len(REPLICAS)} replicas with the plugin; {CONVERSATIONS} conversations of "
        f"{TURNS} turns, each about its own video of {VIDEO_TOKENS} tokens, {CLIENTS} requests at "
        f"a time; {KV_BLOCKS} KV blocks of {BLOCK} tokens a replica, for 26 conversations; `stock` "
        f"is round robin, `plugin` the media key ({shares})"
    )
    return [
        row("encoder tokens computed", "tokens", lambda run: sum(run.encoded.values())),
        row("TTFT p50 of follow-ups", "ms", lambda run: ttft_ms(run.follow_ups())),
        row("share of follow-ups' prompts from KV", "share", RoutingRun.hit_share),
        row(
            "TTFT p50 of first turns",
            "ms",
            lambda run: ttft_ms([record for record in run.records if record.turn == 1]),
        ),
    ]


def played(study: FleetStudy) -> dict[str, list[RoutingRun]]:
    """The same conversations by each routing, each time on replicas with cold caches."""
    runs: dict[str, list[RoutingRun]] = {name: [] for name in ROUTINGS}
    for name in study.in_orders(ROUTINGS):
        runs[name].append(_played_by(study, name))
    return runs


def _played_by(study: FleetStudy, name: str) -> RoutingRun:
    """The conversations by one routing, on replicas with cold caches."""
    with study.context.scratch() as media:
        videos = study.videos(media, 0, CONVERSATIONS)
        with (
            study.replicas(media, KV_BLOCKS) as servers,
            routed(study, servers, name) as ask_at,
        ):
            return play(name, servers, videos, ask_at)


@contextlib.contextmanager
def routed(
    study: FleetStudy, servers: Sequence[Server], name: str
) -> Iterator[Callable[[dict[str, Any]], Server]]:
    """Where a request is sent: to Envoy, or without Envoy to the replica that it would choose.

    Args:
        study: What runs.
        servers: The replicas.
        name: Of ``ROUTINGS``.
    """
    if study.has_envoy:
        changed = _IN_TURN if name == "round-robin" else None
        with router("envoy", [server.url for server in servers], changed=changed) as envoy:
            yield lambda _: envoy
        return
    by_name = dict(zip(REPLICAS, servers, strict=True))
    turns = itertools.cycle(servers)
    if name == "round-robin":
        yield lambda _: next(turns)
    else:
        yield lambda body: by_name[ranked(route_key(body) or "", REPLICAS)[0]]


def play(
    routing: str,
    servers: Sequence[Server],
    videos: Sequence[Path],
    ask_at: Callable[[dict[str, Any]], Server],
) -> RoutingRun:
    """Have the conversations, each about its own video.

    Args:
        routing: What to call it.
        servers: The replicas.
        videos: Of the conversations.
        ask_at: Where the request with such a body is sent.
    """
    before = encoder_tokens(servers)
    records = _records(videos, ask_at)
    after = encoder_tokens(servers)
    return RoutingRun(routing, records, {name: after[name] - before[name] for name in after})


def _records(
    videos: Sequence[Path], ask_at: Callable[[dict[str, Any]], Server]
) -> tuple[Record, ...]:
    left = schedule(len(videos), TURNS)
    taking = threading.Lock()
    began = time.perf_counter()

    def client() -> list[Record]:
        done: list[Record] = []
        with contextlib.ExitStack() as stack:
            connections: dict[str, http.client.HTTPConnection] = {}
            while True:
                with taking:
                    number, turn = next(left, (None, 0))
                if number is None:
                    return done
                body = request_body(videos[number], turn)
                server = ask_at(body)
                if server.url not in connections:
                    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
                    connections[server.url] = connection
                    stack.callback(connection.close)
                done.append(answered(connections[server.url], body, number, turn, began))

    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(client) for _ in range(CLIENTS)]
        records = [record for future in futures for record in future.result()]
    return tuple(sorted(records, key=lambda record: record.sent_s))


def request_body(video: Path, turn: int) -> dict[str, Any]:
    """Body of the request of a turn, from 1, of the conversation about a video."""
    return {
        "model": MODEL_NAME,
        "messages": conversation(video.as_uri(), turn),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def answered(
    connection: http.client.HTTPConnection,
    body: dict[str, Any],
    number: int,
    turn: int,
    began: float,
) -> Record:
    """Send a request and read its answer, with as little work as can be: cores are the servers'.

    Args:
        connection: To the server or the router.
        body: The request's.
        number: Of its conversation.
        turn: Of that, from 1.
        began: When the run began, on the clock of ``time.perf_counter``.

    Raises:
        RuntimeError: It was refused, or its answer broke off.
    """
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **route_headers(body)}
    sent = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", content, headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read(500).decode(errors='replace')}")
    first, lines = 0.0, []
    while line := response.readline():
        # vLLM sends its first chunk when the first token is there.
        first = first or time.perf_counter()
        lines.append(line)
    # So that the connection can be used again.
    response.close()
    ended = time.perf_counter()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    usage = next((chunk["usage"] for chunk in chunks if chunk.get("usage")), None)
    if usage is None:
        raise RuntimeError("an answer broke off before its end; the server's log says why")
    report = next(chunk["mm_ext"] for chunk in chunks if "mm_ext" in chunk)
    return Record(
        conversation=number,
        turn=turn,
        sent_s=sent - began,
        first_token_s=first - began,
        end_s=ended - began,
        prompt_tokens=usage["prompt_tokens"],
        media_tokens=report["tokens"]["visual"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        answer_tokens=ANSWER_TOKENS,
        replica=chunks[0]["model"],
    )
