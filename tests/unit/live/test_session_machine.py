"""The state machine of live sessions: what a client sees, and what the engine is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from live_sessions import (
    FAMILY,
    LIMITS,
    USAGE,
    LiveDriver,
    error_of,
    kinds,
    samples_of,
    stretches_of,
)

from vllm_mm_ext.live.effects import Abort, Append, Close, Respond, TurnEnd
from vllm_mm_ext.live.prompt import Generated, Stretch, Text
from vllm_mm_ext.live.session_items import Item

ANSWER = [
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_text.delta",
]
ANSWER_END = [
    "response.output_text.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
    "rate_limits.updated",
]


def manual(**limits: Any) -> LiveDriver:
    """A session whose client commits turns itself."""
    driver = LiveDriver(limits=replace(LIMITS, **limits))
    driver.detect(None)
    return driver


def paused(driver: LiveDriver) -> int:
    """Let the user pause in speech; the pause that the model is asked about."""
    driver.speak(0.3, 0.0)
    (append,) = [x for x in driver.effects if isinstance(x, Append)]
    assert append.pause is not None
    return append.pause


def test_a_typed_question_is_answered_in_the_order_of_the_official_api() -> None:
    driver = manual()
    assert kinds(driver.say("What is this?")) == [
        "conversation.item.added",
        "conversation.item.done",
    ]
    assert kinds(driver.respond()) == ["response.created"]
    (respond,) = [x for x in driver.effects if isinstance(x, Respond)]
    assert respond.prompt.messages[-1].parts == (Text("What is this?"),)
    assert kinds(driver.write("A ", "cat")) == [*ANSWER, "response.output_text.delta"]
    events = driver.end()
    assert kinds(events) == ANSWER_END
    done = events[-2]["response"]
    assert done["status"] == "completed"
    assert done["output"][0]["content"] == [{"type": "output_text", "text": "A cat"}]
    assert done["usage"]["total_tokens"] == 35
    assert done["usage"]["input_token_details"]["cached_tokens"] == 20


def test_an_answer_is_shown_to_the_model_by_its_own_tokens() -> None:
    driver = manual()
    driver.say("One")
    driver.respond()
    driver.write("two", "three")
    driver.end()
    driver.say("Four")
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert prompt.messages[1].parts == (Generated((3, 5), "twothree"),)


def test_what_is_heard_is_appended_unit_by_unit_and_answered_after_the_commit() -> None:
    driver = manual()
    driver.speak(1.5, 0.0)
    assert driver.appended is None
    driver.speak(1.0, 0.0)
    assert driver.appended is not None
    assert driver.appended.open
    assert samples_of(driver.appended) == list(range(32_000))
    driver.speak(2.0, 0.0)
    assert samples_of(driver.appended) == list(range(64_000))
    events = driver.commit()
    assert kinds(events) == [
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    assert events[1]["item"]["content"] == [{"type": "input_audio", "transcript": None}]
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert samples_of(prompt) == list(range(72_000))


def test_a_commit_needs_a_tenth_of_a_second_of_sound_or_a_frame() -> None:
    driver = manual()
    driver.speak(0.05, 0.0)
    assert error_of(driver.commit())["code"] == "input_audio_buffer_commit_empty"
    driver.speak(0.06, 0.0)
    assert "error" not in kinds(driver.commit())
    assert error_of(driver.commit())["code"] == "input_audio_buffer_commit_empty"
    driver.show(7)
    assert driver.commit()[1]["item"]["content"] == [
        {"type": "input_image", "mm_ext": {"frames": 1}}
    ]


def test_cleared_sound_and_frames_are_not_shown_to_the_model() -> None:
    driver = manual()
    driver.speak(3.0, 0.0)
    driver.show(7)
    assert kinds(driver.send({"type": "input_audio_buffer.clear"})) == [
        "input_audio_buffer.cleared"
    ]
    driver.speak(1.0, 0.0)
    driver.commit()
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert samples_of(prompt) == list(range(48_000, 64_000))


def test_frames_that_were_seen_come_before_the_question_about_them() -> None:
    driver = manual()
    for grey in (10, 90, 170):
        driver.show(grey, after_s=1.0)
    events = driver.say("What did you see?")
    assert kinds(events) == ["conversation.item.added", "conversation.item.done"] * 2
    assert events[0]["item"]["content"] == [{"type": "input_image", "mm_ext": {"frames": 3}}]
    driver.respond()
    (prompt,) = driver.prompts.values()
    (message,) = prompt.messages
    stretch, question = message.parts
    assert isinstance(stretch, Stretch)
    assert question == Text("What did you see?")


def test_speech_is_committed_and_answered_by_itself() -> None:
    driver = LiveDriver()
    driver.speak(1.0, 0.0)
    events = driver.speak(1.0, 0.9)
    assert kinds(events) == ["input_audio_buffer.speech_started"]
    # The first window of speech begins at 992 ms; the padding is 300 ms.
    assert events[0]["audio_start_ms"] in range(690, 702)
    events = driver.speak(1.0, 0.0)
    assert kinds(events) == [
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
    ]
    assert events[0]["item_id"] == events[1]["item_id"] == events[2]["item"]["id"]
    assert events[0]["audio_end_ms"] in range(2480, 2502)
    (prompt,) = driver.prompts.values()
    heard = samples_of(prompt)
    assert heard == list(range(heard[0], heard[-1] + 1))
    assert heard[0] in range(11_000, 11_300)
    # Sound ends 200 ms after speech.
    assert heard[-1] in range(34_900, 35_300)


def test_a_pause_lets_the_engine_compute_the_very_prompt_that_is_then_answered() -> None:
    driver = LiveDriver()
    driver.speak(3.0, 0.9)
    driver.speak(0.3, 0.0)
    prepared = driver.appended
    assert prepared is not None
    assert not prepared.open
    driver.speak(0.3, 0.0)
    (respond,) = [x for x in driver.effects if isinstance(x, Respond)]
    assert len(prepared.messages) == len(respond.prompt.messages) == 1
    before, after = stretches_of(prepared), stretches_of(respond.prompt)
    assert [stretch.units for stretch in before] == [stretch.units for stretch in after]


def test_frames_of_the_silence_that_ends_a_turn_come_after_its_answer() -> None:
    driver = LiveDriver()
    driver.speak(3.0, 0.9)
    driver.show(10)
    driver.speak(0.3, 0.0)
    prepared = driver.appended
    assert prepared is not None
    driver.show(200)
    events = driver.speak(0.3, 0.0)
    (respond,) = [x for x in driver.effects if isinstance(x, Respond)]
    before, after = stretches_of(prepared), stretches_of(respond.prompt)
    assert [stretch.units for stretch in before] == [stretch.units for stretch in after]
    assert kinds(events).count("conversation.item.added") == 1
    driver.write("Fine")
    driver.wait(3.0)
    driver.end()
    assert driver.appended is not None
    assert [x.role for x in driver.appended.messages] == ["user", "assistant", "user"]
    (later,) = driver.appended.messages[-1].parts
    assert isinstance(later, Stretch)
    assert later.units[0].frames[0].pixels.max() == 200


def test_a_pause_within_speech_loses_no_sound() -> None:
    driver = LiveDriver()
    driver.speak(1.0, 0.9)
    driver.speak(0.3, 0.0)
    assert driver.appended is not None
    driver.speak(1.0, 0.9)
    driver.speak(0.7, 0.0)
    (prompt,) = driver.prompts.values()
    heard = samples_of(prompt)
    assert heard == list(range(heard[0], heard[-1] + 1))
    assert len(heard) > 2.4 * 16_000


def test_speech_during_a_response_cancels_it_and_keeps_what_was_sent() -> None:
    driver = LiveDriver()
    driver.say("Tell me a story")
    driver.respond()
    driver.write("Once ", "upon ")
    (response_id,) = driver.prompts
    events = driver.speak(0.2, 0.9)
    assert kinds(events) == ["input_audio_buffer.speech_started", *ANSWER_END]
    assert [x for x in driver.effects if isinstance(x, Abort)] == [Abort(response_id)]
    done = events[-2]["response"]
    assert done["status"] == "cancelled"
    assert done["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
    assert done["output"][0]["status"] == "incomplete"
    assert driver.take(driver.machine.wrote(response_id, (1,), "a time", USAGE, driver.now)) == []
    driver.speak(1.0, 0.9)
    assert kinds(driver.speak(1.0, 0.0))[-1] == "response.created"
    (prompt,) = driver.prompts.values()
    assert prompt.messages[1].parts == (Generated((5, 5), "Once upon "),)
    error = error_of(driver.send({"type": "response.cancel", "response_id": response_id}))
    assert error["code"] == "response_cancel_not_active"
    driver.write("Well")
    assert driver.end()[-2]["response"]["status"] == "completed"


def test_a_response_that_was_cancelled_before_its_first_token_leaves_no_item() -> None:
    driver = LiveDriver()
    driver.say("Hello")
    driver.respond()
    events = driver.send({"type": "response.cancel"})
    assert kinds(events) == ["response.done", "rate_limits.updated"]
    assert events[0]["response"]["status_details"]["reason"] == "client_cancelled"
    assert events[0]["response"]["output"] == []
    assert len(driver.protocol.items) == 1


def test_a_late_cancel_is_an_error_and_nothing_else() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    driver.end()
    driver.respond()
    active = driver.protocol.active
    first = next(iter(driver.protocol.statuses))
    events = driver.send({"type": "response.cancel", "event_id": "e", "response_id": first})
    assert error_of(events) == {
        "type": "invalid_request_error",
        "code": "response_cancel_not_active",
        "message": "Cancellation failed: no active response found",
        "param": None,
        "event_id": "e",
    }
    assert driver.protocol.active == active


def test_a_second_response_of_the_conversation_is_refused_and_those_outside_are_not() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond()
    error = error_of(driver.respond())
    assert error["code"] == "conversation_already_has_active_response"
    for _ in range(4):
        events = driver.respond(conversation="none", metadata={"topic": "sort"})
        assert events[0]["response"]["conversation_id"] is None
        assert events[0]["response"]["metadata"] == {"topic": "sort"}
    assert error_of(driver.respond(conversation="none"))["code"] == "too_many_active_responses"
    assert len(driver.protocol.active) == 5


def test_an_answer_outside_the_conversation_is_no_item_of_it() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond(
        conversation="none",
        instructions="Sort it.",
        max_output_tokens=7,
        input=[
            {"type": "item_reference", "id": driver.protocol.items[0]},
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Which topic?"}],
            },
        ],
    )
    (respond,) = [x for x in driver.effects if isinstance(x, Respond)]
    assert respond.options.max_output_tokens == 7
    system, user = respond.prompt.messages
    assert system.parts == (Text("Sort it."),)
    assert user.parts == (Text("Hello"), Text("Which topic?"))
    assert kinds(driver.write("Greeting")) == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
    ]
    driver.end("length")
    assert list(driver.protocol.statuses.values()) == ["incomplete"]
    assert len(driver.protocol.items) == 1


def test_the_usage_of_an_answer_that_was_cancelled_tells_what_was_written() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    events = driver.send({"type": "response.cancel"})
    done = next(event for event in events if event["type"] == "response.done")
    assert done["response"]["usage"]["input_tokens"] == USAGE.input_tokens


def test_an_answer_outside_the_conversation_leaves_what_is_open_as_it_is() -> None:
    driver = manual()
    driver.say("Hello")
    driver.show(10)
    driver.respond(conversation="none")
    (respond,) = [x for x in driver.effects if isinstance(x, Respond)]
    # The engine's side keeps what it made of the conversation, which the next append goes on with.
    assert respond.aside
    assert not respond.in_conversation
    assert len(driver.protocol.items) == 1
    driver.respond()
    assert len(driver.protocol.items) == 2


def test_the_prompt_of_an_answer_with_its_own_instructions_is_not_what_appends_go_on_with() -> None:
    driver = manual()
    driver.say("Hello")
    found = []
    for options in ({"instructions": "Sing it."}, {}):
        driver.respond(**options)
        (respond,) = [x for x in driver.effects if isinstance(x, Respond)]
        found.append((respond.aside, respond.in_conversation))
        driver.end()
    assert found == [(True, True), (False, True)]


def test_what_answers_outside_the_conversation_are_asked_counts_as_the_session_s() -> None:
    driver = manual(max_bytes=20_000)
    driver.say("Hello")
    message = {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "word " * 400}],
    }
    driver.respond(conversation="none", input=[message])
    assert error_of(driver.respond(conversation="none", input=[message, message]))["code"] == (
        "session_too_large"
    )
    assert not driver.closed
    assert len(driver.protocol.items) == 1
    driver.end()
    driver.respond(conversation="none", input=[message, message])
    assert len(driver.protocol.active) == 1


def test_each_item_that_an_answer_is_asked_about_is_counted_once_or_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = 0

    def tokens(item: Item) -> int:
        nonlocal counted
        counted += 1
        return sum(part.tokens for part in item.parts)

    driver = manual()
    empty = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ""}]}
    monkeypatch.setattr(Item, "tokens", property(tokens))
    driver.respond(conversation="none", input=[empty] * 1000)
    assert 1000 <= counted <= 2000


def test_items_without_text_are_bounded_by_the_tokens_of_the_context() -> None:
    driver = manual(prompt_tokens=400)
    for _ in range(150):
        driver.say("")
    assert len(driver.protocol.items) <= 100


def test_what_was_committed_is_computed_if_nobody_asks_about_it_at_once() -> None:
    driver = manual()
    driver.speak(1.3, 0.0)
    driver.commit()
    assert driver.appended is None
    driver.respond()
    driver.write("Yes")
    driver.end()
    driver.speak(1.4, 0.0)
    driver.commit()
    assert driver.appended is None
    driver.wait(0.5)
    assert driver.appends == 1
    # Once is enough.
    driver.wait(5.0)
    assert driver.appends == 1


def test_an_answer_stands_before_what_came_while_it_was_written() -> None:
    driver = manual()
    driver.say("First")
    driver.respond()
    driver.write("Answer")
    driver.speak(3.0, 0.0)
    assert driver.appended is None
    driver.end()
    assert driver.appended is not None
    assert [message.role for message in driver.appended.messages] == ["user", "assistant", "user"]
    driver.respond()
    driver.say("Second")
    driver.write("More")
    driver.end()
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert [message.role for message in prompt.messages] == [
        "user",
        "assistant",
        "assistant",
        "user",
    ]


def test_a_failed_response_is_told_with_its_error_and_the_session_goes_on() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond()
    (response_id,) = driver.prompts
    driver.write("Hi")
    events = driver.take(
        driver.machine.failed(response_id, "server_error", "engine", "No room.", driver.now)
    )
    details = events[-2]["response"]["status_details"]
    assert details["type"] == "failed"
    assert details["error"] == {"type": "server_error", "code": "engine", "message": "No room."}
    assert kinds(driver.respond()) == ["response.created"]


def test_an_answer_is_truncated_to_the_characters_that_were_heard() -> None:
    driver = manual()
    driver.say("Count")
    driver.respond()
    driver.write("One, ", "two, ", "three")
    driver.end()
    answer = driver.protocol.items[-1]
    truncate = {
        "type": "conversation.item.truncate",
        "item_id": answer,
        "content_index": 0,
        "audio_end_ms": 900,
    }
    assert error_of(driver.send(truncate))["param"] == "mm_ext.text_end"
    assert kinds(driver.send(truncate | {"mm_ext": {"text_end": 7}})) == [
        "conversation.item.truncated"
    ]
    retrieved = driver.send({"type": "conversation.item.retrieve", "item_id": answer})
    assert retrieved[0]["item"]["content"] == [{"type": "output_text", "text": "One, tw"}]
    driver.say("Go on")
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert prompt.messages[1].parts == (Generated((5,), "One, "), Text("tw"))
    driver.send({"type": "response.cancel"})
    driver.send(truncate | {"audio_end_ms": 0})
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert [message.role for message in prompt.messages] == ["user"]


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "conversation.item.retrieve"}, "item_retrieve_invalid_item_id"),
        ({"type": "conversation.item.delete"}, "item_delete_invalid_item_id"),
        (
            {"type": "conversation.item.truncate", "content_index": 0, "audio_end_ms": 0},
            "item_truncate_invalid_item_id",
        ),
    ],
)
def test_an_item_that_does_not_exist_is_told_by_the_events_own_code(
    event: dict[str, Any], code: str
) -> None:
    error = error_of(manual().send(event | {"item_id": "nobody", "event_id": "e1"}))
    assert (error["code"], error["param"], error["event_id"]) == (code, "item_id", "e1")


def test_items_go_where_the_client_wants_them() -> None:
    driver = manual()
    driver.say("one")
    driver.say("three")
    first = driver.protocol.items[0]
    driver.say("two", previous_item_id=first)
    driver.say("zero", previous_item_id="root")
    error = error_of(driver.say("lost", previous_item_id="nobody"))
    assert error["param"] == "previous_item_id"
    driver.send({"type": "conversation.item.delete", "item_id": first})
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert prompt.messages[0].parts == (Text("zero"), Text("two"), Text("three"))


def test_an_item_that_is_being_written_is_neither_deleted_nor_truncated() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    event = {"type": "conversation.item.delete", "item_id": driver.protocol.items[-1]}
    assert error_of(driver.send(event))["code"] == "item_in_progress"


def test_names_of_items_are_unique() -> None:
    driver = LiveDriver()
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}
    create = {"type": "conversation.item.create", "item": item | {"id": "mine"}}
    driver.send(create)
    assert error_of(driver.send(create))["param"] == "item.id"
    started = driver.speak(0.2, 0.9)[0]
    taken = {"type": "conversation.item.create", "item": item | {"id": started["item_id"]}}
    assert error_of(driver.send(taken))["code"] == "item_create_duplicate_item_id"


def test_without_interrupt_response_speech_lets_a_response_go_on() -> None:
    driver = LiveDriver()
    driver.detect({"type": "server_vad", "interrupt_response": False})
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    driver.speak(1.0, 0.9)
    events = driver.speak(1.0, 0.0)
    # The turn is committed; its response cannot begin while another one is written.
    assert error_of(events)["code"] == "conversation_already_has_active_response"
    assert len(driver.protocol.active) == 1
    driver.end()
    assert driver.protocol.items[1] == driver.protocol.items[-2]


def test_a_user_who_talks_on_during_an_answer_does_not_lose_the_question() -> None:
    driver = LiveDriver(limits=replace(LIMITS, prompt_tokens=400))
    driver.detect({"type": "server_vad", "interrupt_response": False})
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    events = [event for _ in range(30) for event in driver.speak(1.0, 0.9)]
    assert "mm_ext.truncated" in kinds(events)
    driver.end()
    assert driver.appended is not None
    roles = [message.role for message in driver.appended.messages]
    assert roles == ["user", "assistant", "user"]


def test_without_create_response_a_turn_waits_for_the_client() -> None:
    driver = LiveDriver()
    driver.detect({"type": "server_vad", "create_response": False})
    driver.speak(1.0, 0.9)
    assert kinds(driver.speak(1.0, 0.0))[-1] == "conversation.item.done"
    assert kinds(driver.respond()) == ["response.created"]


def test_a_silent_user_is_spoken_to_after_the_idle_timeout() -> None:
    driver = LiveDriver()
    driver.detect({"type": "server_vad", "idle_timeout_ms": 5000})
    assert driver.wait(60.0) == []
    driver.say("Hello")
    driver.respond()
    driver.end()
    driver.speak(4.9, 0.0)
    events = driver.wait(0.2)
    assert kinds(events)[:2] == [
        "input_audio_buffer.timeout_triggered",
        "input_audio_buffer.committed",
    ]
    assert kinds(events)[-1] == "response.created"
    assert events[0]["audio_end_ms"] - events[0]["audio_start_ms"] == 4900
    (prompt,) = driver.prompts.values()
    # The silence that is kept is as long as the padding.
    assert samples_of(prompt) == list(range(46 * 1600, 49 * 1600))
    driver.end()
    # Nobody sends sound: there is no silence to be heard.
    assert driver.wait(60.0) == []


def test_a_silence_is_heard_where_speech_has_no_padding() -> None:
    driver = LiveDriver()
    idle = {"type": "server_vad", "prefix_padding_ms": 0, "idle_timeout_ms": 5000}
    driver.detect(idle)
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    driver.end()
    # In pieces that end elsewhere than the windows of the detector.
    for _ in range(70):
        driver.speak(0.07, 0.0)
    events = driver.wait(0.2)
    assert kinds(events)[-1] == "response.created"
    (prompt,) = driver.prompts.values()
    assert [message.role for message in prompt.messages] == ["user", "assistant", "user"]
    # The shortest sound that can be committed.
    assert samples_of(prompt) == list(range(48 * 1600, 49 * 1600))


def test_a_silence_that_the_client_cleared_is_not_answered() -> None:
    driver = LiveDriver()
    driver.detect({"type": "server_vad", "idle_timeout_ms": 5000})
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    driver.end()
    driver.speak(4.95, 0.0)
    driver.send({"type": "input_audio_buffer.clear"})
    assert driver.wait(60.0) == []
    assert len(driver.protocol.items) == 2


def test_answers_outside_the_conversation_do_not_make_the_user_silent() -> None:
    driver = LiveDriver()
    driver.detect({"type": "server_vad", "idle_timeout_ms": 5000})
    driver.say("Hello")
    driver.respond(conversation="none")
    driver.end()
    driver.speak(6.0, 0.0)
    # Nobody has been answered yet.
    assert driver.wait(0.1) == []
    driver.respond()
    driver.write("Once ", "upon ")
    driver.respond(conversation="none")
    driver.end()
    driver.speak(6.0, 0.0)
    # The model speaks.
    assert driver.wait(0.1) == []
    driver.end()
    driver.speak(4.0, 0.0)
    driver.respond(conversation="none")
    driver.end()
    driver.speak(0.9, 0.0)
    assert driver.wait(0.05) == []
    # The silence is as long as if nothing had been answered meanwhile.
    assert kinds(driver.wait(0.1))[0] == "input_audio_buffer.timeout_triggered"


@pytest.mark.parametrize(("eagerness", "chance"), [("low", 0.79), ("auto", 0.49), ("high", 0.29)])
def test_semantic_detection_ends_a_turn_when_the_model_thinks_so(
    eagerness: str, chance: float
) -> None:
    driver = LiveDriver()
    driver.detect({"type": "semantic_vad", "eagerness": eagerness})
    driver.speak(1.0, 0.9)
    pause = paused(driver)
    assert driver.take(driver.machine.appended(TurnEnd(pause, chance), driver.now)) == []
    events = driver.take(driver.machine.appended(TurnEnd(pause, chance + 0.02), driver.now))
    assert kinds(events)[0] == "input_audio_buffer.speech_stopped"
    assert kinds(events)[-1] == "response.created"


def test_what_the_model_says_of_a_pause_that_is_over_does_not_end_the_next_one() -> None:
    driver = LiveDriver()
    driver.detect({"type": "semantic_vad"})
    driver.speak(1.0, 0.9)
    first = paused(driver)
    driver.speak(0.5, 0.9)
    assert driver.take(driver.machine.appended(TurnEnd(first, 1.0), driver.now)) == []
    second = paused(driver)
    assert driver.take(driver.machine.appended(TurnEnd(first, 1.0), driver.now)) == []
    events = driver.take(driver.machine.appended(TurnEnd(second, 1.0), driver.now))
    assert kinds(events)[0] == "input_audio_buffer.speech_stopped"


def test_the_question_of_a_pause_stays_when_an_answer_outside_the_conversation_ends() -> None:
    driver = LiveDriver()
    driver.detect({"type": "semantic_vad"})
    driver.say("Hello")
    driver.speak(2.5, 0.9)
    paused(driver)
    driver.respond(conversation="none")
    assert driver.appended is None
    driver.end()
    # Another append would take its place.
    assert driver.appended is None


def test_a_unit_that_a_pause_completes_too_does_not_take_the_place_of_the_pause() -> None:
    driver = LiveDriver()
    driver.speak(1.9, 0.9)
    driver.speak(0.4, 0.0)
    appends = [x.prompt for x in driver.effects if isinstance(x, Append)]
    # Of several appends at once the engine computes the last one only.
    assert not appends[-1].open
    assert samples_of(appends[-1]) == list(range(len(samples_of(appends[-1]))))
    assert len(samples_of(appends[-1])) > 2 * 16_000


def test_semantic_detection_asks_again_while_the_silence_goes_on() -> None:
    driver = LiveDriver()
    driver.detect({"type": "semantic_vad"})
    driver.speak(1.0, 0.9)
    asked = []
    for _ in range(20):
        driver.speak(0.1, 0.0)
        asked += [x.prompt for x in driver.effects if isinstance(x, Append)]
    assert len(asked) == 5
    lengths = [len(samples_of(prompt)) for prompt in asked]
    assert lengths == sorted(set(lengths))


def test_semantic_detection_waits_no_longer_than_its_eagerness_allows() -> None:
    driver = LiveDriver()
    driver.detect({"type": "semantic_vad", "eagerness": "high"})
    driver.speak(1.0, 0.9)
    assert driver.speak(1.9, 0.0) == []
    assert kinds(driver.speak(0.2, 0.0))[0] == "input_audio_buffer.speech_stopped"


def test_a_commit_while_the_user_speaks_ends_the_speech() -> None:
    driver = LiveDriver()
    driver.speak(1.0, 0.9)
    assert kinds(driver.commit())[0] == "input_audio_buffer.committed"
    assert kinds(driver.speak(1.0, 0.9)) == ["input_audio_buffer.speech_started"]
    driver.speak(1.0, 0.0)
    (prompt,) = driver.prompts.values()
    heard = samples_of(prompt)
    assert len(set(heard)) == len(heard)
    assert heard[:16_000] == list(range(16_000))


def test_cleared_speech_begins_anew_under_another_name() -> None:
    driver = LiveDriver()
    first = driver.speak(1.0, 0.9)[0]
    driver.send({"type": "input_audio_buffer.clear"})
    second = driver.speak(1.0, 0.9)[0]
    assert second["type"] == "input_audio_buffer.speech_started"
    assert second["item_id"] != first["item_id"]
    driver.speak(1.0, 0.0)
    (prompt,) = driver.prompts.values()
    # Nothing from before the clear, the padding's sound included.
    assert samples_of(prompt)[0] >= 16_000


def test_turning_detection_off_while_the_user_speaks_keeps_the_sound() -> None:
    driver = LiveDriver()
    driver.speak(1.0, 0.9)
    driver.speak(0.3, 0.0)
    driver.detect(None)
    driver.speak(1.0, 0.0)
    driver.commit()
    driver.detect({"type": "server_vad"})
    driver.speak(1.0, 0.0)
    assert error_of(driver.commit())["code"] == "input_audio_buffer_commit_empty"
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert samples_of(prompt) == list(range(36_800))


def test_a_silence_from_before_detection_was_off_does_not_end_the_turn() -> None:
    driver = LiveDriver()
    driver.speak(1.0, 0.9)
    driver.speak(0.1, 0.0)
    driver.detect(None)
    driver.speak(5.0, 0.9)
    driver.detect({"type": "server_vad"})
    assert driver.speak(0.4, 0.0) == []
    assert kinds(driver.speak(0.2, 0.0))[0] == "input_audio_buffer.speech_stopped"


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    driver = manual(prompt_tokens=400)
    gone: list[str] = []
    truncated = []
    for turn in range(12):
        events = driver.say(f"word{turn} " * 50)
        gone += [event["item_id"] for event in events if event["type"].endswith("deleted")]
        truncated += [event for event in events if event["type"] == "mm_ext.truncated"]
    assert gone
    assert [x for event in truncated for x in event["items"]] == gone
    assert all(event["tokens"] >= 100 for event in truncated)
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert prompt.messages[0].parts[-1] == Text("word11 " * 50)


def test_a_conversation_that_may_not_be_truncated_is_refused_an_answer() -> None:
    driver = manual(prompt_tokens=400)
    driver.update(truncation="disabled")
    for _ in range(8):
        driver.say("word " * 50)
    assert error_of(driver.respond())["code"] == "context_length_exceeded"
    driver.send({"type": "conversation.item.delete", "item_id": driver.protocol.items[0]})
    assert kinds(driver.respond()) == ["response.created"]


def test_a_retention_ratio_keeps_so_much_of_the_clients_own_limit() -> None:
    driver = manual()
    ratio = {
        "type": "retention_ratio",
        "retention_ratio": 0.5,
        "token_limits": {"post_instructions": 400},
    }
    driver.update(instructions="Be brief.", truncation=ratio)
    for _ in range(8):
        driver.say("word " * 50)
    # 8 x 54 tokens are more than 400; half of these stay: 3 messages.
    assert len(driver.protocol.items) == 3


def test_an_endless_open_message_loses_its_oldest_stretches_and_stays_within_the_context() -> None:
    driver = manual(prompt_tokens=400)
    dropped = 0
    for second in range(300):
        events = driver.show(second % 2 * 200, after_s=1.0)
        dropped += "mm_ext.truncated" in kinds(events)
        if driver.appended is not None:
            latest = stretches_of(driver.appended)[-1]
            assert latest.units[-1].frames
    assert 2 <= dropped <= 40


def test_the_latest_frames_stay_whatever_goes() -> None:
    driver = manual(prompt_tokens=400)
    driver.show(10)
    driver.show(200, after_s=1.0)
    driver.commit()
    for _ in range(10):
        driver.say("word " * 50)
    driver.respond()
    (prompt,) = driver.prompts.values()
    assert isinstance(prompt.messages[0].parts[0], Stretch)


@pytest.mark.parametrize("where", [{}, {"conversation": "none"}])
def test_the_oldest_turns_make_room_for_the_instructions_of_an_answer(
    where: dict[str, Any],
) -> None:
    driver = manual(prompt_tokens=400)
    for turn in range(20):
        driver.say(f"word{turn} " * 40)
        before = list(driver.protocol.items)
        driver.respond(instructions="brief " * 60, **where)
        (prompt,) = driver.prompts.values()
        system, user = prompt.messages
        assert system.parts == (Text("brief " * 60),)
        assert user.parts[-1] == Text(f"word{turn} " * 40)
        driver.send({"type": "response.cancel", "response_id": driver.protocol.active[-1]})
        # Those that were left out are there for other answers.
        assert driver.protocol.items == before
    driver.respond(**where)
    (prompt,) = driver.prompts.values()
    assert len(prompt.messages[0].parts) == len(driver.protocol.items)


def test_instructions_of_an_answer_that_leave_no_room_are_refused() -> None:
    driver = manual(prompt_tokens=400)
    for _ in range(8):
        driver.say("word " * 40)
    before = list(driver.protocol.items)
    error = error_of(driver.respond(instructions="brief " * 370))
    assert error["code"] == "context_length_exceeded"
    driver.update(truncation="disabled")
    error = error_of(driver.respond(instructions="brief " * 200))
    assert error["code"] == "context_length_exceeded"
    assert driver.protocol.items == before
    driver.update(truncation="auto")
    assert kinds(driver.respond(instructions="brief " * 200)) == ["response.created"]


def test_what_a_question_is_about_stays_with_it() -> None:
    driver = manual(prompt_tokens=400)
    driver.say("Hello")
    driver.respond()
    driver.write("Hi")
    driver.end()
    driver.speak(13.0, 0.9)
    driver.commit()
    events = driver.say("word " * 60)
    assert "mm_ext.truncated" in kinds(events)
    driver.respond()
    (prompt,) = driver.prompts.values()
    (message,) = prompt.messages
    # The old turn went, and the first of the sound.
    assert samples_of(prompt)[-1] == 13 * 16_000 - 1
    assert message.parts[-1] == Text("word " * 60)


def test_an_item_that_cannot_fit_is_refused_and_changes_nothing() -> None:
    driver = manual(prompt_tokens=400)
    assert error_of(driver.say("word " * 500))["code"] == "context_length_exceeded"
    assert error_of(driver.say("x" * 10_000))["param"] == "item.content[0].text"
    assert error_of(driver.update(instructions="word " * 300))["param"] == "session.instructions"
    assert driver.protocol.items == []
    assert driver.machine.options.instructions == ""


def sound_item(*transcripts: str) -> dict[str, Any]:
    """A message of sounds, with what the client says was spoken."""
    content = [{"type": "input_audio", "audio": "AAAA", "transcript": x} for x in transcripts]
    return {"type": "message", "role": "user", "content": content}


def test_transcripts_that_are_too_long_together_are_refused() -> None:
    driver = manual()
    create = {"type": "conversation.item.create"}
    error = error_of(driver.send(create | {"item": sound_item("x" * 65_537)}))
    assert error["code"] == "string_above_max_length"
    assert error["param"] == "item.content[0].transcript"
    halves = sound_item("x" * 40_000, "x" * 40_000)
    assert error_of(driver.send(create | {"item": halves}))["param"] == "item.content[1].transcript"
    error = error_of(driver.respond(conversation="none", input=[halves]))
    assert error["param"] == "response.input[0].content[1].transcript"
    events = driver.send(create | {"item": sound_item("x" * 65_536)})
    assert kinds(events) == ["conversation.item.added", "conversation.item.done"]


def test_transcripts_count_as_what_the_session_holds() -> None:
    driver = manual(max_bytes=1 << 20)
    for _ in range(8):
        driver.send({"type": "conversation.item.create", "item": sound_item("x" * 60_000)})
    # Each takes more than a quarter of what the session may hold.
    assert len(driver.protocol.items) <= 3


def test_contents_without_text_count_as_what_the_session_holds() -> None:
    driver = manual(max_bytes=1 << 20)
    content = [{"type": "input_text", "text": ""}] * 1000
    item = {"type": "message", "role": "user", "content": content}
    for _ in range(8):
        driver.send({"type": "conversation.item.create", "item": item})
    # Each takes nearly a quarter of what the session may hold.
    assert len(driver.protocol.items) <= 4


def test_a_session_that_holds_too_much_is_told_so_and_closed() -> None:
    driver = manual(max_bytes=1 << 20)
    driver.update(truncation="disabled")
    driver.say("Hello")
    driver.respond()
    events: list[dict[str, Any]] = []
    while not driver.closed:
        events = driver.speak(1.0, 0.0)
    assert kinds(events)[-1] == "error"
    assert error_of(events)["code"] == "session_too_large"
    assert list(driver.protocol.statuses.values()) == ["failed"]
    assert Close(1008, "session_too_large") in driver.effects
    assert driver.machine.deadline() is None
    assert driver.say("Hello") == []


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"idle_timeout_s": 5.0}, "session_idle"), ({"max_session_s": 5.0}, "session_expired")],
)
def test_a_session_ends_when_its_time_is_over(limits: dict[str, float], code: str) -> None:
    driver = manual(**limits)
    assert driver.wait(4.9) == []
    assert error_of(driver.wait(0.2))["code"] == code
    assert driver.closed


def test_a_session_is_not_idle_while_a_response_is_written() -> None:
    driver = manual(idle_timeout_s=5.0)
    driver.say("Hello")
    driver.respond()
    driver.wait(60.0)
    assert not driver.closed
    driver.end()
    driver.wait(6.0)
    assert driver.closed


def test_a_closed_socket_leaves_nothing() -> None:
    driver = manual()
    driver.say("Hello")
    driver.respond()
    driver.respond(conversation="none")
    driver.speak(5.0, 0.0)
    driver.machine.closed()
    assert driver.machine._conversation.nbytes == 0
    assert not driver.machine._responses.any
    driver.machine.closed()
    assert driver.say("Hello") == []


def test_media_that_the_model_does_not_take_are_refused_before_they_are_decoded() -> None:
    deaf = LiveDriver(replace(FAMILY, hears=False, images=False, sees=False))
    assert error_of(deaf.send({"type": "input_audio_buffer.append", "audio": "AAAA"}))["param"] == (
        "audio"
    )
    error = error_of(deaf.send({"type": "mm_ext.video.append", "image": "AAAA"}))
    assert error["param"] == "image"
    content = [
        {"type": "input_text", "text": "See"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
    ]
    item = {"type": "message", "role": "user", "content": content}
    error = error_of(deaf.send({"type": "conversation.item.create", "item": item}))
    assert error["param"] == "item.content[1].image_url"
    error = error_of(deaf.respond(input=[item]))
    assert error["param"] == "response.input[0].content[1].image_url"
    error = error_of(deaf.detect({"type": "server_vad"}))
    assert error["param"] == "session.audio.input.turn_detection"
