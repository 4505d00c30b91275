"""Keys by which routers send requests about one medium to one server."""

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from vllm_mm_ext.fleet.key_headers import route_headers
from vllm_mm_ext.fleet.media_url import media_name
from vllm_mm_ext.fleet.route_key import (
    is_route_key,
    named_key,
    route_key,
    session_route_key,
    url_route_key,
)

URL = "https://media.example.com/clips/a.mp4"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("content", "messages", "input", "video_url", "url", "uuid", "source", "data"),
                    *("documents", "images", "inputs", "videos"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=16,
)


def video(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **more}


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    text = {"type": "text", "text": "What happens?"}
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, text]}], **more}


def test_keys_are_the_same_in_all_versions() -> None:
    pinned = {
        "mm-b1d1b54523c94bec81f0dcb169e101a2": chat(video(URL)),
        "mm-807db5930a14a37afc7eb36a212759ed": chat(video("data:video/mp4;base64,AAAAIGZ0eXA=")),
        "mm-5b9760ea3e450dcaa33299d5d003bcba": chat(video("file:///media/a%20b.mp4")),
        "mm-af226107922d5dd604c1fec9e6a05fd2": chat(video(URL, uuid="clip-7")),
        "mm-be4e3216f4d9a03553b9c018344b1d87": chat(mm_ext={"key": "asset 7"}),
        "mm-fef28070b358cad2f821d1fe0389523d": chat(session_id="s-1"),
    }
    assert {key: route_key(body) for key, body in pinned.items()} == {key: key for key in pinned}


def test_a_conversation_keeps_the_key_of_its_first_medium_as_it_goes_on() -> None:
    body = chat(video(URL))
    first = route_key(body)
    body["messages"] += [
        {"role": "assistant", "content": "Shapes."},
        {"role": "user", "content": [video("https://elsewhere.example.com/b.mp4")]},
    ]
    assert first == route_key(body) == url_route_key(URL)


def test_video_sound_and_pictures_of_all_routes_have_keys() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    image = {"type": "input_image", "image_url": URL}
    anthropic = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="},
    }
    result = {"type": "tool_result", "tool_use_id": "t", "content": [anthropic]}
    assert route_key(chat(sound)) == url_route_key("data:audio/wav;base64,UklGRg==")
    assert route_key({"input": [{"role": "user", "content": [image]}]}) == url_route_key(URL)
    assert route_key(chat(anthropic)) == url_route_key("data:image/png;base64,iVBORw==")
    assert route_key(chat(result)) == route_key(chat(anthropic))
    assert route_key(chat({**anthropic, "source": {"type": "url", "url": URL}})) == url_route_key(
        URL
    )
    assert route_key({"messages": [chat(video(URL))["messages"]]}) == url_route_key(URL)
    embeds = [chat({"type": "image_embeds", "image_embeds": text}) for text in ("QUJD", "QUJE")]
    assert None not in (keys := {route_key(body) for body in embeds})
    assert len(keys) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"data_1": {"content": [video(URL)]}, "data_2": "text"},
        {"data_1": "text", "data_2": [{"content": [video(URL)]}]},
        {"queries": ["text"], "documents": [{"content": [video(URL)]}]},
        {"queries": "text", "items": {"content": [video(URL)]}},
        {"text_1": {"content": [video(URL)]}, "text_2": "text"},
        {"query": {"content": [video(URL)]}, "documents": ["text"]},
        {"query": "text", "documents": ["text", {"content": [video(URL)]}]},
        {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": URL}}]}]},
        {"images": [URL, "https://elsewhere.example.com/b.png"]},
        {"state": "text", "videos": [URL, "https://elsewhere.example.com/b.mp4"]},
        {"state": "text", "audio": [URL]},
    ],
    ids=str,
)
def test_media_to_score_to_rank_and_to_embed_have_keys(body: dict[str, Any]) -> None:
    assert route_key(body) == url_route_key(URL)


def test_what_a_chat_says_of_its_documents_is_no_medium() -> None:
    documents = [{"text": "x", "source": "a"}, {"content": "y", "source": "b", "image_url": URL}]
    assert route_key(chat(documents=documents)) is None
    assert route_key(chat(session_id="s", documents=documents)) == session_route_key("s")
    assert route_key(chat(video(URL), documents=documents)) == url_route_key(URL)
    assert route_key(chat({"type": "text", "text": "x", "source": "a"})) is None


def test_messages_and_parts_in_tuples_have_the_key_of_those_in_lists() -> None:
    (message,) = chat(video(URL))["messages"]
    tuples = {"messages": ({**message, "content": tuple(message["content"])},)}
    assert route_headers(tuples) == route_headers(chat(video(URL))) != {}


@pytest.mark.parametrize(
    "spelling",
    [
        "HTTPS://Media.Example.com:443/clips/a.mp4#t=10",
        "https://media.example.com/clips/./a.mp4",
        f"{URL}?X-Amz-Algorithm=AWS4&X-Amz-Date=20261130T0200Z&X-Amz-Signature=ab12",
        f"{URL}?X-Goog-Expires=60&X-Goog-Signature=cd34",
        f"{URL}?Expires=1764468000&Signature=xy~&Key-Pair-Id=K2",
        f"{URL}?sv=2024-11-04&se=2026-11-30T03%3A00Z&sr=b&sp=r&sig=zz%3D",
    ],
)
def test_spellings_and_signatures_of_one_url_have_one_key(spelling: str) -> None:
    assert url_route_key(spelling) == url_route_key(URL)


@pytest.mark.parametrize(
    "other",
    [
        "http://media.example.com/clips/a.mp4",
        "https://media.example.com:8443/clips/a.mp4",
        "https://media.example.com/clips/A.mp4",
        f"{URL}?v=2",
        f"{URL}?expires=1",
        f"{URL}?v=2&X-Amz-Signature=ab12",
    ],
)
def test_urls_that_may_lead_elsewhere_have_keys_of_their_own(other: str) -> None:
    assert url_route_key(other) != url_route_key(URL)


def test_the_order_of_query_parameters_stays() -> None:
    assert media_name(f"{URL}?b=1&X-Amz-Signature=f&a=2") == f"{URL}?b=1&a=2"
    assert url_route_key(f"{URL}?a=1&b=2") != url_route_key(f"{URL}?b=2&a=1")


def test_a_validator_makes_another_key() -> None:
    assert len({url_route_key(URL), url_route_key(URL, '"v1"'), url_route_key(URL, '"v2"')}) == 3


def test_a_data_url_is_named_by_the_digest_of_its_text_as_in_the_front_end() -> None:
    text = "AAAAIGZ0eXA="
    assert (
        media_name(f"data:video/mp4;base64,{text}") == f"data:{blake3(text.encode()).hexdigest()}"
    )
    assert url_route_key(f"data:;base64,{text}") == url_route_key(f"data:video/mp4;base64,{text}")


def test_a_uuid_comes_before_the_url_so_that_a_turn_without_the_media_keeps_the_key() -> None:
    sent, named = video(URL, uuid="u"), {"type": "video_url", "video_url": None, "uuid": "u"}
    assert route_key(chat(sent)) == route_key(chat(named)) != route_key(chat(video(URL)))


def test_a_key_in_the_body_wins_and_a_computed_key_stays_as_it_is() -> None:
    computed = route_key(chat(video(URL)))
    assert computed is not None
    other = chat(video("https://elsewhere.example.com/b.mp4"), mm_ext={"key": computed})
    assert route_key(other) == computed == named_key(computed)
    assert route_key(chat(video(URL), mm_ext={"key": "asset 7"})) == named_key("asset 7")


def test_a_body_without_media_has_the_key_of_its_session_or_none() -> None:
    assert route_key(chat()) is None
    assert route_key({"prompt": "Hello"}) is None
    for body in (
        chat(session_id="s"),
        {"prompt": "Hello", "vllm_xargs": {"session_id": "s"}},
        chat(session_params={"session_id": "s"}),
    ):
        assert route_key(body) == session_route_key("s")
    assert route_key(chat(video(URL), session_id="s")) == url_route_key(URL)


@given(
    st.dictionaries(
        st.sampled_from(
            [*("messages", "input", "mm_ext", "session_id", "documents", "images"), "videos"]
        ),
        _JSON,
    )
)
def test_whatever_a_client_sends_has_a_key_or_none(body: dict[str, Any]) -> None:
    key = route_key(body)
    assert key is None or is_route_key(key)


@given(st.text() | st.text().map(lambda rest: f"https://{rest}") | st.text().map("file:".__add__))
def test_any_text_in_the_place_of_a_url_has_a_key(text: str) -> None:
    assert is_route_key(url_route_key(text))


def test_a_text_that_is_no_url_by_its_length_is_named_by_its_digest() -> None:
    assert media_name(f"{URL}?b={'1' * 10_000}").startswith("text:")
    assert media_name(f"{URL}?b={'1' * 8_000}").startswith(URL)
    assert media_name(f"data:video/mp4;base64,{'A' * 10_000}").startswith("data:")


def test_deep_nesting_ends() -> None:
    value: Any = {"video_url": {"url": URL}}
    for _ in range(50_000):
        value = {"content": [value]}
    assert route_key({"messages": [value]}) is None


def test_clients_need_two_packages_of_those_that_the_plugin_depends_on() -> None:
    script = (
        "import sys; before = set(sys.modules); import vllm_mm_ext.fleet.key_headers, "
        "vllm_mm_ext.fleet.key_middleware; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    needs = {Requirement(line).name for line in metadata.requires("vllm-mm-ext") or ()}
    modules = {"decord2": "decord", "pillow": "PIL"}
    found = set(done.stdout.split()) & {modules.get(name, name) for name in (*needs, "vllm")}
    assert found == {"blake3", "urllib3"}
