"""Client events as the official client writes them, and malformed ones."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_sessions import LiveDriver, error_of, kinds
from openai._utils import maybe_transform
from openai.types import realtime as official
from openai.types.realtime import RealtimeClientEventParam
from openai.types.realtime.realtime_audio_formats import AudioPCM
from openai.types.realtime.realtime_audio_input_turn_detection import ServerVad

from vllm_mm_ext.live.client_events import (
    AudioAppend,
    AudioClear,
    AudioCommit,
    AudioContent,
    ClientEvent,
    ImageContent,
    ItemCreate,
    ItemDelete,
    ItemReference,
    ItemRetrieve,
    ItemTruncate,
    NewItem,
    ResponseCancel,
    ResponseCreate,
    ResponseRequest,
    SessionUpdate,
    TextContent,
    VideoAppend,
    media_contents,
)
from vllm_mm_ext.live.event_codec import read_event, write_event
from vllm_mm_ext.live.wire_error import WireError

SOUND = base64.b64encode(b"\x01\x02\x03").decode()
IMAGE = "data:image/png;base64," + base64.b64encode(b"PNG").decode()


def written(event: Any) -> str:
    """The event as the official client puts it on the wire."""
    if isinstance(event, dict):
        return json.dumps(maybe_transform(event, RealtimeClientEventParam))
    return str(event.to_json(use_api_names=True, exclude_unset=True))


@pytest.mark.parametrize(
    ("event", "read"),
    [
        (
            {"type": "input_audio_buffer.append", "audio": SOUND, "event_id": "e"},
            AudioAppend("e", b"\x01\x02\x03"),
        ),
        ({"type": "input_audio_buffer.commit"}, AudioCommit(None)),
        (
            official.InputAudioBufferClearEvent(type="input_audio_buffer.clear", event_id="e"),
            AudioClear("e"),
        ),
        (
            {"type": "conversation.item.retrieve", "item_id": "i"},
            ItemRetrieve(None, "i"),
        ),
        ({"type": "conversation.item.delete", "item_id": "i"}, ItemDelete(None, "i")),
        (
            {
                "type": "conversation.item.truncate",
                "item_id": "i",
                "content_index": 0,
                "audio_end_ms": 1200,
            },
            ItemTruncate(None, "i", 1200, None),
        ),
        ({"type": "response.cancel"}, ResponseCancel(None, None)),
        ({"type": "response.cancel", "response_id": "r"}, ResponseCancel(None, "r")),
        ({"type": "response.create"}, ResponseCreate(None, ResponseRequest())),
        (
            official.ResponseCreateEvent(
                type="response.create",
                response=official.RealtimeResponseCreateParams(
                    conversation="none",
                    instructions="Short.",
                    max_output_tokens="inf",
                    metadata={"topic": "x"},
                    output_modalities=["text"],
                ),
            ),
            ResponseCreate(
                None,
                ResponseRequest(
                    in_conversation=False,
                    instructions="Short.",
                    max_output_tokens="inf",
                    metadata={"topic": "x"},
                ),
            ),
        ),
        (
            {
                "type": "response.create",
                "response": {"input": [{"type": "item_reference", "id": "i"}]},
            },
            ResponseCreate(None, ResponseRequest(input=(ItemReference("i"),))),
        ),
        (
            {
                "type": "conversation.item.create",
                "previous_item_id": "root",
                "item": {
                    "type": "message",
                    "role": "user",
                    "id": "mine",
                    "object": "realtime.item",
                    "status": "completed",
                    "content": [
                        {"type": "input_text", "text": "Hi"},
                        {"type": "input_image", "image_url": IMAGE, "detail": "auto"},
                        {"type": "input_audio", "audio": SOUND, "transcript": "hum"},
                    ],
                },
            },
            ItemCreate(
                None,
                "root",
                NewItem(
                    "mine",
                    "user",
                    (
                        TextContent("Hi"),
                        ImageContent(b"PNG"),
                        AudioContent(b"\x01\x02\x03", "hum"),
                    ),
                ),
            ),
        ),
        (
            {
                "type": "conversation.item.create",
                "item": {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Yes"}],
                },
            },
            ItemCreate(None, None, NewItem(None, "assistant", (TextContent("Yes"),))),
        ),
        (
            {"type": "session.update", "session": {"type": "realtime", "instructions": "Hi"}},
            SessionUpdate(None, {"type": "realtime", "instructions": "Hi"}),
        ),
    ],
)
def test_an_event_of_the_official_client_is_read(event: Any, read: ClientEvent) -> None:
    assert read_event(written(event)) == read
    assert read_event(written(event).encode()) == read


def test_a_session_update_of_the_official_models_is_taken() -> None:
    session = official.RealtimeSessionCreateRequest(
        type="realtime",
        instructions="Hi",
        output_modalities=["text"],
        max_output_tokens=50,
        tool_choice="auto",
        tools=[],
        tracing=None,
        truncation="disabled",
        audio=official.RealtimeAudioConfig(
            input=official.RealtimeAudioConfigInput(
                format=AudioPCM(type="audio/pcm", rate=24000),
                noise_reduction=None,
                transcription=None,
                turn_detection=ServerVad(type="server_vad", threshold=0.7, create_response=False),
            )
        ),
    )
    event = official.SessionUpdateEvent(type="session.update", session=session)
    driver = LiveDriver()
    (updated,) = driver.send(json.loads(written(event)))
    assert updated["type"] == "session.updated"
    shown = updated["session"]
    assert shown["max_output_tokens"] == 50
    assert shown["truncation"] == "disabled"
    assert shown["audio"]["input"]["turn_detection"] == {
        "type": "server_vad",
        "threshold": 0.7,
        "prefix_padding_ms": 300,
        "silence_duration_ms": 500,
        "idle_timeout_ms": None,
        "create_response": False,
        "interrupt_response": True,
    }


def test_a_frame_comes_with_its_time_on_the_clients_clock() -> None:
    event = {"type": "mm_ext.video.append", "image": SOUND, "time_s": 2.5}
    assert read_event(json.dumps(event)) == VideoAppend(None, b"\x01\x02\x03", 2.5)


@pytest.mark.parametrize(
    "url", [IMAGE, IMAGE.replace(";", ';name="a,b";'), IMAGE.upper()[:22] + IMAGE[22:]]
)
def test_media_of_items_are_listed_in_their_order(url: str) -> None:
    content = [{"type": "input_image", "image_url": url}, {"type": "input_audio", "audio": SOUND}]
    item = {"type": "message", "role": "user", "content": content}
    create = read_event(json.dumps({"type": "conversation.item.create", "item": item}))
    media = ImageContent(b"PNG"), AudioContent(b"\x01\x02\x03", None)
    names = "content[0].image_url", "content[1].audio"
    assert media_contents(create) == tuple(
        (f"item.{name}", one) for name, one in zip(names, media, strict=True)
    )
    response = {"input": [{"type": "item_reference", "id": "i"}, item]}
    event = read_event(json.dumps({"type": "response.create", "response": response}))
    assert media_contents(event) == tuple(
        (f"response.input[1].{name}", one) for name, one in zip(names, media, strict=True)
    )


def message(*content: dict[str, Any], role: str = "user", **fields: Any) -> dict[str, Any]:
    item = {"type": "message", "role": role, "content": list(content), **fields}
    return {"type": "conversation.item.create", "item": item}


TEXT = {"type": "input_text", "text": "Hi"}


@pytest.mark.parametrize(
    ("event", "code", "param"),
    [
        ({}, "missing_required_parameter", "type"),
        ({"type": 7}, "invalid_type", "type"),
        ({"type": "session.delete"}, "invalid_value", "type"),
        ({"type": "output_audio_buffer.clear"}, "unsupported_event", "type"),
        ({"type": "response.cancel", "event_id": "x" * 600}, "string_above_max_length", "event_id"),
        ({"type": "response.cancel", "response": "r"}, "unknown_parameter", "response"),
        ({"type": "session.update"}, "missing_required_parameter", "session"),
        ({"type": "session.update", "session": []}, "invalid_type", "session"),
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "invalid_value", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "é"}, "invalid_value", "audio"),
        ({"type": "mm_ext.video.append", "image": "", "time_s": -1}, "invalid_value", "time_s"),
        ({"type": "mm_ext.video.append", "image": "", "fps": 1}, "unknown_parameter", "fps"),
        (
            {"type": "conversation.item.create", "item": {"type": "function_call"}},
            "unsupported_parameter",
            "item.type",
        ),
        (message(), "invalid_value", "item.content"),
        (message(*[TEXT] * 1025), "array_above_max_length", "item.content"),
        (message(TEXT, role="tool"), "invalid_value", "item.role"),
        (message(TEXT, role="assistant"), "invalid_value", "item.content[0].type"),
        (
            message(TEXT, {"type": "input_text"}),
            "missing_required_parameter",
            "item.content[1].text",
        ),
        (message(TEXT | {"audio": "AAAA"}), "unknown_parameter", "item.content[0].audio"),
        (
            message({"type": "input_image", "image_url": "https://example.org/a.png"}),
            "invalid_value",
            "item.content[0].image_url",
        ),
        (
            message({"type": "input_image", "image_url": IMAGE, "detail": "low"}),
            "invalid_value",
            "item.content[0].detail",
        ),
        (message(TEXT, name="Ann"), "unknown_parameter", "item.name"),
        (
            {
                "type": "conversation.item.truncate",
                "item_id": "i",
                "content_index": 1,
                "audio_end_ms": 0,
            },
            "invalid_value",
            "content_index",
        ),
        (
            {"type": "response.create", "response": {"output_modalities": ["audio"]}},
            "unsupported_parameter",
            "response.output_modalities",
        ),
        (
            {"type": "response.create", "response": {"max_output_tokens": 0}},
            "invalid_value",
            "response.max_output_tokens",
        ),
        (
            {"type": "response.create", "response": {"metadata": {"a": 1}}},
            "invalid_type",
            "response.metadata.a",
        ),
        (
            {"type": "response.create", "response": {"conversation": "other"}},
            "invalid_value",
            "response.conversation",
        ),
        (
            {"type": "response.create", "response": {"input": [{}] * 1025}},
            "array_above_max_length",
            "response.input",
        ),
        (
            {
                "type": "response.create",
                "response": {"input": [message(*[TEXT] * 600)["item"]] * 2},
            },
            "array_above_max_length",
            "response.input",
        ),
        (
            {"type": "response.create", "response": {"temperature": 1}},
            "unknown_parameter",
            "response.temperature",
        ),
    ],
)
def test_a_wrong_event_is_refused_with_the_name_of_its_field(
    event: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(WireError) as refused:
        read_event(json.dumps({"event_id": "e1", **event}))
    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.event_id == (None if param == "event_id" else "e1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"type": NaN}',
        b"\xff\xfe\x00",
        b"\x00\x01" * 480,
        '{"a": ' + "9" * 5000 + "}",
        '{"type": "response.cancel", "event_id": "\\ud800"}',
    ],
)
def test_what_is_no_json_is_refused_as_such(text: str | bytes) -> None:
    with pytest.raises(WireError) as refused:
        read_event(text)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize("text", ["null", "[]", "7", '"session.update"'])
def test_what_is_no_object_is_refused_as_such(text: str) -> None:
    with pytest.raises(WireError) as refused:
        read_event(text)
    assert refused.value.code == "invalid_type"


def test_a_pair_of_escaped_surrogates_is_one_character() -> None:
    event = read_event('{"type": "response.cancel", "event_id": "\\ud83d\\ude00"}')
    assert event.event_id == "😀"


def test_unsupported_fields_of_the_protocol_are_refused_by_name_and_none_is_ignored() -> None:
    """Every field of the official models is either taken or named in an error."""
    given = {
        "audio": {"output": {"voice": "marin"}},
        "include": ["item.input_audio_transcription.logprobs"],
        "model": "another",
        "output_modalities": ["audio"],
        "parallel_tool_calls": True,
        "prompt": {"id": "p"},
        "reasoning": {"effort": "low"},
        "tool_choice": "required",
        "tools": [{"type": "function", "name": "f"}],
        "tracing": "auto",
    }
    taken = {"type", "instructions", "max_output_tokens", "truncation"}
    assert given.keys() | taken == official.RealtimeSessionCreateRequest.model_fields.keys()
    driver = LiveDriver()
    for name, value in given.items():
        param = error_of(driver.update(**{name: value}))["param"]
        assert param.startswith(f"session.{name}")
    answers = given.keys() - {"include", "model", "tracing"}
    known = {"conversation", "input", "instructions", "max_output_tokens", "metadata"}
    assert answers | known == official.RealtimeResponseCreateParams.model_fields.keys()
    for name in answers:
        param = error_of(driver.respond(**{name: given[name]}))["param"]
        assert param.startswith(f"response.{name}")


def test_a_client_that_wants_no_parallel_tool_calls_asks_for_nothing() -> None:
    driver = LiveDriver()
    assert "error" not in str(driver.update(parallel_tool_calls=False))
    driver.say("Hello")
    assert "error" not in kinds(driver.respond(parallel_tool_calls=False))


@pytest.mark.parametrize("name", ["transcription", "noise_reduction"])
def test_what_is_not_done_to_sound_is_refused_by_name(name: str) -> None:
    driver = LiveDriver()
    error = error_of(driver.update(audio={"input": {name: {"type": "near_field"}}}))
    assert error["param"] == f"session.audio.input.{name}"
    assert "error" not in str(driver.update(audio={"input": {name: None}}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "session", "audio", "image", "time_s", "item", "item_id", "previous_item_id", "response",
    "response_id", "content_index", "audio_end_ms", "mm_ext", "event_id",
]  # fmt: skip
TYPES = [
    "session.update", "input_audio_buffer.append", "input_audio_buffer.commit",
    "conversation.item.create", "conversation.item.truncate", "conversation.item.delete",
    "response.create", "response.cancel", "mm_ext.video.append", "output_audio_buffer.clear",
]  # fmt: skip


@settings(max_examples=200)
@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_no_json_makes_the_codec_fail_otherwise(kind: str, fields: dict[str, Any]) -> None:
    LiveDriver(strict=False).send({"type": kind, **fields})


@settings(max_examples=200)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_or_bytes_make_the_codec_fail_otherwise(data: str | bytes) -> None:
    with pytest.raises(WireError):
        read_event(data)


def test_a_server_event_is_written_with_a_name_of_its_own() -> None:
    first, second = (json.loads(write_event({"type": "error"})) for _ in range(2))
    assert first["event_id"] != second["event_id"]
    assert first["type"] == "error"
