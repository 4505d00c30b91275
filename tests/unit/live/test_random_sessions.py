"""Random sessions: whatever clients and engines do, the machine keeps its promises."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from live_sessions import FAMILY, LIMITS, USAGE, LiveDriver, samples_of

from vllm_mm_ext.live.effects import TurnEnd
from vllm_mm_ext.live.prompt import Prompt, Stretch
from vllm_mm_ext.live.session_items import messages

SESSIONS = 10_000
EVENTS = 7
# Small, so that turns go and limits are met; a unit is 1,600 samples.
SMALL = replace(FAMILY, unit_s=0.1)
TIGHT = replace(LIMITS, prompt_tokens=120, max_bytes=180_000, idle_timeout_s=20.0)
LONGEST_APPEND_BYTES = 120_000
DETECTIONS: list[dict[str, Any] | None] = [
    None,
    {"type": "server_vad", "silence_duration_ms": 320},
    {"type": "server_vad", "idle_timeout_ms": 5000, "interrupt_response": False},
    {"type": "server_vad", "create_response": False, "prefix_padding_ms": 0},
    {"type": "semantic_vad", "eagerness": "high"},
]


class RandomSession:
    """One session with a client and an engine that do anything at any time.

    Args:
        seed: Of what they do.
        strict: As ``LiveDriver``.
    """

    def __init__(self, seed: int, *, strict: bool = False) -> None:
        self.random = random.Random(seed)
        limits = TIGHT if seed % 2 else LIMITS
        self.driver = LiveDriver(SMALL, limits, strict=strict)
        self.most_bytes = limits.max_bytes

    def step(self) -> None:
        """One thing happens."""
        action = self.random.choice(_ACTIONS)
        action(self)
        conversation = self.driver.machine._conversation
        # What one append adds to the open unit is looked at when the unit is complete.
        assert conversation.nbytes <= self.most_bytes + LONGEST_APPEND_BYTES
        items = conversation.items
        assert items.tokens == sum(item.tokens for item in items)
        assert items.nbytes == sum(item.nbytes for item in items)
        assert len(self.driver.protocol.active) <= 5
        assert set(self.driver.prompts) == set(self.driver.protocol.active)

    def item_id(self) -> str:
        """An item that is there, or was, or never."""
        return self.random.choice([*self.driver.protocol.items, "nobody"])

    def response_id(self) -> str:
        """A response that is under way, or was, or never."""
        protocol = self.driver.protocol
        return self.random.choice([*protocol.active, *protocol.statuses, "none"])

    def finish(self) -> None:
        """The client commits what is left, and goes."""
        driver = self.driver
        driver.commit()
        machine = driver.machine
        conversation = machine._conversation
        if not driver.closed:
            shown = [item.item_id for item in conversation.items if item.added]
            assert shown == driver.protocol.items
        heard = np.array(samples_of(Prompt(messages("", conversation.items), False)))
        # No sound is shown twice, and what is shown is in the order in which it came. The samples
        # of items are negative.
        assert np.all(np.diff(heard[heard >= 0]) > 0)
        machine.closed()
        assert conversation.nbytes == 0
        assert len(conversation.items) == 0
        assert machine.deadline() is None
        assert driver.commit() == driver.speak(0.1, 0.9) == driver.show(3) == []
        assert not machine._responses.any


def update(session: RandomSession) -> None:
    session.driver.detect(session.random.choice(DETECTIONS))


def truncation(session: RandomSession) -> None:
    ratio = {"type": "retention_ratio", "retention_ratio": session.random.random()}
    session.driver.update(truncation=session.random.choice(["auto", "disabled", ratio]))


def instructions(session: RandomSession) -> None:
    session.driver.update(instructions="word " * session.random.randrange(80))


def speak(session: RandomSession) -> None:
    seconds = session.random.choice([0.01, 0.05, 0.25, 0.8])
    session.driver.speak(seconds, session.random.choice([0.0, 0.9]))


def show(session: RandomSession) -> None:
    session.driver.show(session.random.randrange(256), after_s=session.random.choice([0.0, 0.7]))


def say(session: RandomSession) -> None:
    extra = {} if session.random.random() < 0.7 else {"previous_item_id": session.item_id()}
    session.driver.say("word " * session.random.choice([0, 1, 20, 70, 200]), **extra)


def add_media(session: RandomSession) -> None:
    content = session.random.choice(
        [
            {"type": "input_audio", "audio": "AAAA"},
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
        ]
    )
    item = {"type": "message", "role": "user", "content": [content]}
    session.driver.send({"type": "conversation.item.create", "item": item})


def add_system(session: RandomSession) -> None:
    content = [{"type": "input_text", "text": "word " * session.random.randrange(30)}]
    item = {"type": "message", "role": "system", "content": content}
    session.driver.send({"type": "conversation.item.create", "item": item})


def touch(session: RandomSession) -> None:
    kind = session.random.choice(["retrieve", "delete", "truncate"])
    event: dict[str, Any] = {"type": f"conversation.item.{kind}", "item_id": session.item_id()}
    if kind == "truncate":
        event |= {"content_index": 0, "audio_end_ms": session.random.choice([0, 500])}
        event["mm_ext"] = {"text_end": session.random.randrange(12)}
    session.driver.send(event)


def respond(session: RandomSession) -> None:
    response: dict[str, Any] = {}
    if session.random.random() < 0.3:
        response["conversation"] = "none"
    if session.random.random() < 0.2:
        response["input"] = [{"type": "item_reference", "id": session.item_id()}]
    if session.random.random() < 0.2:
        response["instructions"] = "word " * session.random.randrange(100)
    session.driver.respond(**response)


def cancel(session: RandomSession) -> None:
    extra = {} if session.random.random() < 0.5 else {"response_id": session.response_id()}
    session.driver.send({"type": "response.cancel", **extra})


def buffer(session: RandomSession) -> None:
    kind = session.random.choice(["commit", "commit", "clear"])
    session.driver.send({"type": f"input_audio_buffer.{kind}"})


def write(session: RandomSession) -> None:
    session.driver.write(
        session.random.choice(["", "a", "five "]), response_id=session.response_id()
    )


def end(session: RandomSession) -> None:
    driver, name = session.driver, session.response_id()
    if session.random.random() < 0.2:
        driver.take(driver.machine.failed(name, "server_error", "engine", "No.", driver.now))
    else:
        reason: Any = session.random.choice(["stop", "length"])
        driver.take(driver.machine.ended(name, reason, USAGE, driver.now))


def appended(session: RandomSession) -> None:
    chance = session.random.choice([None, 0.0, 0.4, 0.9])
    pause = session.driver.machine._conversation.open.pause or session.random.randrange(3)
    turn_end = None if chance is None else TurnEnd(pause, chance)
    session.driver.take(session.driver.machine.appended(turn_end, session.driver.now))


def wait(session: RandomSession) -> None:
    session.driver.wait(session.random.choice([0.1, 1.0, 6.0, 25.0]))


def send_junk(session: RandomSession) -> None:
    pick = session.random.choice
    values: list[Any] = [None, 7, -1.5, "x", [], {}, {"type": "realtime"}, [{}], True]
    names = ["type", "session", "item", "response", "item_id", "audio", "event_id", "junk"]
    kinds = ["session.update", "conversation.item.create", "response.create", "no.event"]
    fields = {pick(names): pick(values) for _ in range(session.random.randrange(4))}
    session.driver.send({"type": pick(kinds), **fields})


_ACTIONS: list[Callable[[RandomSession], None]] = [
    update, truncation, instructions, add_media, add_system, send_junk, touch, touch, appended,
    wait, cancel, *[speak] * 8, *[show] * 3, *[say] * 3, *[respond] * 6, *[buffer] * 2,
    *[write] * 5, *[end] * 4,
]  # fmt: skip


def run(seed: int, events: int, *, strict: bool = False) -> RandomSession:
    session = RandomSession(seed, strict=strict)
    say(session)
    for _ in range(events):
        session.step()
    session.finish()
    return session


def test_ten_thousand_random_sessions_keep_every_promise_of_the_machine() -> None:
    statuses: dict[str, int] = {}
    for seed in range(SESSIONS):
        for status in run(seed, EVENTS).driver.protocol.statuses.values():
            statuses[status] = statuses.get(status, 0) + 1
    # The sessions are about something.
    assert min(statuses.values()) > 100
    assert statuses.keys() == {"completed", "cancelled", "incomplete", "failed"}


def test_every_event_of_random_sessions_is_one_of_the_official_models() -> None:
    for seed in range(40):
        run(seed, 40, strict=True)


def test_long_random_sessions_stay_within_their_limits() -> None:
    for seed in range(12):
        run(seed, 800)


def test_a_session_that_is_over_leaves_nothing_in_memory() -> None:
    run(0, 50)
    gc.collect()
    gc.disable()
    try:
        for seed in range(20):
            run(seed, 50)
        # Reference counts alone free what a session held.
        left = [x for x in gc.get_objects() if isinstance(x, Stretch)]
        assert left == []
    finally:
        gc.enable()
