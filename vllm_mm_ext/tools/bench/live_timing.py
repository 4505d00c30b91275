"""Parts of ``bench live`` with one session: time to first token, and what a unit costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_mm_ext.testing.server import Server
from vllm_mm_ext.tools.bench.chat import ask
from vllm_mm_ext.tools.bench.harness import Row
from vllm_mm_ext.tools.bench.live_feed import Feed, made_feed, play
from vllm_mm_ext.tools.bench.live_sides import Study, as_messages, omni_server
from vllm_mm_ext.tools.bench.long_video_client import Asker
from vllm_mm_ext.tools.cli.live_client import LiveAnswer, LiveSession, live_session

SECONDS = 40.0
# Seconds at the end that are sent in real time; what lies before is sent faster.
_REAL_TIME_S = 6.0
_FASTER = 4.0
_ANSWER = 8
_RESIDENT = 5
# Until an append that was sent for is in the engine, and its log is written.
_SETTLE_S = 0.5
_UNITS = 6
_SILENCE_MS = 500
_SILENCE_S = 3.0


ANSWERED = frozenset({"completed", "incomplete"})
"""How a response ends whose times mean something: by itself, or by its limit of tokens."""


def options(detection: dict[str, Any] | None = None, answer: int = _ANSWER) -> dict[str, Any]:
    """Options of a session: greedy, short answers; turns end by ``detection`` or by commits."""
    return {
        "output_modalities": ["text"],
        "max_output_tokens": answer,
        "audio": {"input": {"turn_detection": detection}},
        "mm_ext": {"temperature": 0},
    }


def first_token(study: Study) -> list[Row]:
    """End of a turn to the first token: live, with all KV resident, and resent on stock."""
    repeats = study.context.repeats
    # Speech ends within a unit, each time elsewhere; the first feed pays for what is loaded lazily.
    feeds = [
        made_feed(SECONDS + 0.3 + 0.7 * number, 1.0, seed=number, silence_s=_SILENCE_S)
        for number in range(1 + repeats)
    ]
    measured = _measured(study.omni, feeds)
    with omni_server(plugin=False) as stock:
        resent = [_resend(stock, feed) for feed in feeds][1:]
    rows = _rows("tiny Omni", measured, "stock", resent)
    measured = _measured(study.composer, feeds)
    others = [made_feed(feed.seconds, 1.0, seed=100 + n) for n, feed in enumerate(feeds)]
    resent = [_resend(study.composer, feed) for feed in others][1:]
    rows += _rows("composer", measured, "the plugin", resent)
    study.notes.append(
        f"first token: {SECONDS:g} s of speech and 1 picture a second of 224x224, the last "
        f"{_REAL_TIME_S:g} s in real time. By the detector: from the sound that ended the turn, "
        f"{_SILENCE_MS} ms of silence after the speech. By commit: from the last sound of the "
        "speech, commit and response.create right behind it. Resident: the answer deleted and "
        f"asked for again, median of {_RESIDENT}. Resent: the same pictures and sound as one chat "
        "completion that nothing is cached of"
    )
    return rows


@dataclass(frozen=True)
class _Turn:
    """Milliseconds to the first token.

    Attributes:
        live: From the end of the turn.
        speech: From the end of the speech.
        resident: The same prompt again, all of it in KV.
        computed: Tokens of the prompt that were not in KV.
    """

    live: float
    speech: float
    resident: float
    computed: float


_DETECTED, _COMMITTED = "by the detector", "by commit"


def _measured(server: Server, feeds: list[Feed]) -> dict[str, list[_Turn]]:
    return {
        _DETECTED: [asyncio.run(_detected(server, feed)) for feed in feeds][1:],
        # Other feeds, as the first ones are in KV now.
        _COMMITTED: [
            asyncio.run(_committed(server, made_feed(feed.seconds - _SILENCE_S, 1.0, 50 + number)))
            for number, feed in enumerate(feeds)
        ][1:],
    }


def _rows(name: str, turns: dict[str, list[_Turn]], side: str, resent: list[float]) -> list[Row]:
    rows = []
    for how, ones in turns.items():
        live = [one.live for one in ones]
        first = f"{name}, turn ended {how}, first token"
        rows += [
            Row.of(
                f"{first}: all KV resident, live",
                "ms",
                stock=[one.resident for one in ones],
                plugin=live,
            ),
            Row.of(f"{first}: resent to {side}, live", "ms", stock=resent, plugin=live),
            Row.of(
                f"{name}, turn ended {how}: tokens computed then",
                "tokens",
                plugin=[one.computed for one in ones],
            ),
        ]
    return [
        *rows,
        Row.of(
            f"{name}, end of speech to first token, {_SILENCE_MS} ms of silence included",
            "ms",
            plugin=[one.speech for one in turns[_DETECTED]],
        ),
    ]


async def _detected(server: Server, feed: Feed) -> _Turn:
    """A turn that the server ends by itself."""
    sent, stopped = [0.0], [0.0]

    def listen(_: LiveSession, event: Mapping[str, Any], __: float) -> None:
        if event["type"] == "input_audio_buffer.speech_stopped":
            stopped[0] = sent[0]

    speech = feed.seconds - _SILENCE_S
    async with live_session(server.url, None, listener=listen) as session:
        # Low, so that no syllable of the babble passes for its end.
        detection = {
            "type": "server_vad",
            "threshold": 0.2,
            "silence_duration_ms": _SILENCE_MS,
        }
        await session.update(**options(detection))
        quick = speech - _REAL_TIME_S
        await play(session, feed, 0.0, quick, speed=_FASTER)
        await play(session, feed, quick, speech)
        ended = time.perf_counter()
        if session.answers:
            raise RuntimeError("the server ended the turn within the speech")
        silence = asyncio.create_task(play(session, feed, speech, sent=sent))
        if not await session.until(lambda: bool(session.answers), _SILENCE_S + 30.0):
            raise RuntimeError("the server noticed no end of the turn")
        silence.cancel()
        answer = session.answers[-1]
        await session.until(lambda: answer.ended is not None)
        return _Turn(
            1e3 * (first_token_at(answer) - stopped[0]),
            1e3 * (first_token_at(answer) - ended),
            await _resident(session),
            float(answer.prompt_tokens - answer.cached_tokens),
        )


async def _committed(server: Server, feed: Feed) -> _Turn:
    """A turn that the client ends."""
    async with live_session(server.url, None) as session:
        await session.update(**options())
        quick = feed.seconds - _REAL_TIME_S
        await play(session, feed, 0.0, quick, speed=_FASTER)
        await play(session, feed, quick)
        ended = time.perf_counter()
        await session.send("input_audio_buffer.commit")
        answer = await session.respond()
        live = 1e3 * (first_token_at(answer) - ended)
        computed = float(answer.prompt_tokens - answer.cached_tokens)
        return _Turn(live, live, await _resident(session), computed)


async def _resident(session: LiveSession) -> float:
    """Milliseconds to the first token of the last answer's prompt again."""
    found = []
    for _ in range(_RESIDENT):
        await forget_last(session)
        answer = await session.respond()
        assert answer.asked is not None
        found.append(1e3 * (first_token_at(answer) - answer.asked))
    return median(found)


def first_token_at(answer: LiveAnswer) -> float:
    """When the first token came; where that one ended the answer, when the answer ended.

    Raises:
        RuntimeError: The answer failed or was cut off.
    """
    if answer.status not in ANSWERED:
        raise RuntimeError(f"an answer is {answer.status}: {answer.reason or 'no reason given'}")
    moment = answer.ended if answer.first is None else answer.first
    assert moment is not None
    return moment


async def forget_last(session: LiveSession) -> None:
    """Delete the last answer, so that the conversation is as it was before."""
    item = session.items[-1]
    await session.request("conversation.item.deleted", "conversation.item.delete", item_id=item)


def _resend(server: Server, feed: Feed) -> float:
    """Milliseconds to the first token of the same as a chat completion."""
    return 1e3 * ask(server, as_messages(feed), max_tokens=_ANSWER).ttft_s


def units(study: Study) -> list[Row]:
    """Tokens computed for each unit that is appended, beside the tokens that it has."""
    rows = []
    for name, fps in (("sound", 0.0), ("sound and 1 picture a second", 1.0)):
        rows += asyncio.run(_units(study.omni, f"tiny Omni, {name}", 2.0, fps))
    unit_s = composer_unit_s()
    name = f"composer, {unit_s:g} s of sound and 4 pictures a second"
    rows += asyncio.run(_units(study.composer, name, unit_s, 4.0))
    study.notes.append(
        "units: stock column: tokens that a unit adds to the prompt; plugin column: tokens that "
        "the engine computed for its append, as vLLM logs them (a KV block has 16 tokens unless "
        f"--block-size says otherwise); {_UNITS} units each"
    )
    return rows


def composer_unit_s() -> float:
    """Seconds of a unit of the composer that ships with the package."""
    from transformers import AutoConfig

    from vllm_mm_ext.composer.configuration import register_config
    from vllm_mm_ext.tools.cli.demo import shipped_model

    register_config()
    return float(AutoConfig.from_pretrained(shipped_model()).audio_window_s)


async def _units(server: Server, name: str, unit_s: float, fps: float) -> list[Row]:
    short, _ = await _appended(server, 1, unit_s, fps)
    long, computed = await _appended(server, 1 + _UNITS, unit_s, fps)
    own = (long.prompt_tokens - short.prompt_tokens) / _UNITS
    return [
        Row.of(f"{name}: tokens of a unit, computed", "tokens", stock=[own], plugin=computed),
        Row.of(f"{name}: the most of a unit", "tokens", stock=[own], plugin=[max(computed)]),
    ]


async def _appended(
    server: Server, count: int, unit_s: float, fps: float
) -> tuple[LiveAnswer, list[float]]:
    """A response about so many units, and the tokens computed for each but the first one.

    The first one pays for the turn's opening.
    """
    feed = made_feed(count * unit_s, fps, count)
    asker = Asker(server)
    computed = []
    async with live_session(server.url, None) as session:
        await session.update(**options(answer=1))
        for number in range(count):
            mark = asker.mark()
            await play(session, feed, number * unit_s, (number + 1) * unit_s, speed=_FASTER)
            await asyncio.sleep(_SETTLE_S)
            work = await asyncio.to_thread(asker.work_since, mark)
            computed.append(float(work.tokens))
        await session.commit()
        return await session.respond(), computed[1:]
