"""What an encoder instance is asked, and what it takes for a request to encode."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.fleet.encode_request import (
    has_media,
    is_encode_request,
    levels_in,
    takes_records,
)

TEXT = {"type": "text", "text": "What happens?"}
VIDEO = {"type": "video_url", "video_url": {"url": "http://host/a.mp4"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def user(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


def test_media_are_what_is_not_text() -> None:
    assert not has_media([{"role": "user", "content": "text"}])
    assert not has_media(user(TEXT, {"type": "refusal", "refusal": "no"}))
    assert not has_media([{"role": "assistant", "content": None}, {"role": "tool"}])
    assert has_media(user(TEXT, SOUND))
    assert has_media([*user(TEXT), *user(VIDEO)])
    assert has_media(user({"video_url": {"url": "http://host/a.mp4"}}))


@given(st.lists(json_values, max_size=4))
def test_no_messages_make_it_fail(messages: list[object]) -> None:
    has_media(messages)


def test_a_proxy_asks_for_one_token_and_no_stream() -> None:
    assert is_encode_request({"max_tokens": 1, "stream": False})
    assert is_encode_request({"max_tokens": 1, "max_completion_tokens": 1})
    assert not is_encode_request({"max_tokens": 1, "stream": True})
    assert not is_encode_request({"max_tokens": 1, "max_completion_tokens": 20})
    assert not is_encode_request({})


@given(st.lists(st.integers(0, 9), max_size=5), st.text())
def test_levels_are_read_as_they_were_written(levels: list[int], noise: str) -> None:
    assert levels_in(",".join(map(str, levels))) == (tuple(levels) or None)
    assert levels_in(None) is None
    levels_in(noise)
    assert levels_in("9" * 5000) is None


def test_only_plain_requests_are_taken_by_records() -> None:
    plain = {"messages": user(TEXT, VIDEO, SOUND), "n": 1}
    assert takes_records(plain)
    assert takes_records({"messages": user({"video_url": {"url": "http://host/a.mp4"}})})
    for more in ({"n": 2}, {"use_beam_search": True}, {"mm_processor_kwargs": {"fps": 1}}):
        assert not takes_records(plain | more)
    named = {**VIDEO, "uuid": "mine"}
    for part in ({"type": "image_embeds", "image_embeds": "AAAA"}, {"audio_embeds": "AAAA"}, named):
        assert not takes_records({"messages": user(VIDEO, part)})


@given(st.lists(json_values, max_size=4), json_values)
def test_no_body_makes_the_look_at_it_fail(messages: list[object], kwargs: object) -> None:
    takes_records({"messages": messages, "mm_processor_kwargs": kwargs})
