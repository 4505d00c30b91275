"""``fleet``, part `routing`: conversations about videos by the media key, and in turn."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.fleet.key_headers import route_headers
from vllm_mm_ext.fleet.rendezvous import ranked
from vllm_mm_ext.fleet.route_key import route_key
from vllm_mm_ext.testing.routers import router
from vllm_mm_ext.testing.server import Server
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.conversations_engine import (
    BLOCK,
    VIDEO_TOKENS,
    kv_blocks,
    schedule,
)
from vllm_mm_ext.tools.bench.fleet_study import REPLICAS, FleetStudy, encoder_tokens
from vllm_mm_ext.tools.bench.harness import Row

if TYPE_CHECKING:
    import openai

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
        runs[name].append(played_by(study, name, CLIENTS))
    return runs


def played_by(study: FleetStudy, name: str, clients: int) -> RoutingRun:
    """The conversations by one routing, on replicas with cold caches.

    Args:
        study: What runs.
        name: Of ``ROUTINGS``.
        clients: Requests at a time.
    """
    with study.context.scratch() as media:
        videos = study.videos(media, 0, CONVERSATIONS)
        with (
            study.replicas(media, KV_BLOCKS) as servers,
            routed(study, servers, name) as ask_at,
        ):
            return play(name, servers, videos, ask_at, clients)


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
    clients: int,
) -> RoutingRun:
    """Have the conversations, each about its own video.

    Args:
        routing: What to call it.
        servers: The replicas.
        videos: Of the conversations.
        ask_at: Where the request with such a body is sent.
        clients: Requests at a time.
    """
    before = encoder_tokens(servers)
    records = _records(videos, ask_at, clients)
    after = encoder_tokens(servers)
    return RoutingRun(routing, records, {name: after[name] - before[name] for name in after})


def _records(
    videos: Sequence[Path], ask_at: Callable[[dict[str, Any]], Server], count: int
) -> tuple[Record, ...]:
    left = schedule(len(videos), TURNS)
    taking = threading.Lock()
    began = time.perf_counter()

    def client() -> list[Record]:
        done: list[Record] = []
        with contextlib.ExitStack() as stack:
            clients: dict[str, openai.OpenAI] = {}
            while True:
                with taking:
                    number, turn = next(left, (None, 0))
                if number is None:
                    return done
                messages = conversation(videos[number].as_uri(), turn)
                server = ask_at({"messages": messages})
                if server.url not in clients:
                    clients[server.url] = stack.enter_context(server.client(timeout=600.0))
                sent = time.perf_counter() - began
                answer = ask(
                    server,
                    messages,
                    max_tokens=ANSWER_TOKENS,
                    headers=route_headers({"messages": messages}),
                    client=clients[server.url],
                )
                done.append(
                    Record(
                        conversation=number,
                        turn=turn,
                        sent_s=sent,
                        first_token_s=sent + answer.ttft_s,
                        end_s=sent + answer.total_s,
                        prompt_tokens=answer.prompt_tokens,
                        media_tokens=answer.report["tokens"]["visual"],
                        cached_tokens=answer.cached_tokens,
                        answer_tokens=ANSWER_TOKENS,
                        replica=answer.model,
                    )
                )

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(client) for _ in range(count)]
        records = [record for future in futures for record in future.result()]
    return tuple(sorted(records, key=lambda record: record.sent_s))
