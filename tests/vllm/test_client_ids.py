"""Ids that clients choose: equal ones stay equal, and none is kept longer than a digest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from front import Front, opened
from hypothesis import given
from hypothesis import strategies as st
from kv_harness import Engine, Media, Text, request
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_mm_ext.base.client_ids import MAX_CHARACTERS, MAX_HASH_CHARACTERS, short_id
from vllm_mm_ext.policies.kv.control import UTILITY, KVClient, KVControl, answer
from vllm_mm_ext.testing.media import make_audio, make_clip

LONG = "x" * (1 << 20)
# A name of an item, and what the plugin adds for a segment of a video and its sound.
LONGEST = 71 + len("#") + 64 + len("#audio")

ids = st.text(max_size=2 * MAX_CHARACTERS)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "clip.mp4", duration=4, seed=1)
    make_audio(files / "tone.wav", duration=1.0)
    with opened(files, limit_mm_per_prompt={"video": 2, "image": 2}) as made:
        yield made


def parts(front: Front, video: str, image: str) -> list[Any]:
    pixel = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
        "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    url = (front.files / "clip.mp4").as_uri()
    return [
        {"type": "video_url", "video_url": {"url": url}, "uuid": video},
        {"type": "image_url", "image_url": {"url": pixel}, "uuid": image},
    ]


def rendered(front: Front, content: list[Any]) -> Any:
    """What the engine gets of one user message."""
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": content}])
    made = front.renderer.render_chat_async(
        [request.messages],
        request.build_chat_params(None, "auto"),
        request.build_tok_params(front.renderer.model_config),
    )
    return asyncio.run(made)[1][0]


def request_of(front: Front, made: Any, session: str | None = None) -> Any:
    """The request that goes to the engine."""
    processor = InputProcessor(front.renderer.config, front.renderer)
    return processor.process_inputs(
        "r", made, SamplingParams(max_tokens=1), ("generate",), session_id=session
    )


@given(ids, ids)
def test_ids_are_equal_where_the_client_s_are(one: str, other: str) -> None:
    assert (short_id(one, "media") == short_id(other, "media")) == (one == other)


def test_a_digest_of_one_id_is_no_other_id() -> None:
    digest = short_id(LONG, "media")
    assert short_id(digest, "media") != digest
    assert short_id(LONG, "session") != digest
    assert short_id("\ud800" * 100, "media")


def test_a_short_id_stays_as_it_is(front: Front) -> None:
    made = rendered(front, parts(front, "clip", "pixel"))
    assert made["mm_hashes"]["image"] == ["pixel"]
    assert all(name.startswith("clip#") for name in made["mm_hashes"]["video"])
    assert request_of(front, made, "talk").session_id == "talk"


def test_nothing_that_goes_to_caches_and_engine_has_the_size_of_an_id(front: Front) -> None:
    made = rendered(front, parts(front, f"v{LONG}", f"i{LONG}"))
    names = [name for own in made["mm_hashes"].values() for name in own]
    assert max(map(len, names)) <= LONGEST
    request = request_of(front, made, LONG)
    assert max(len(feature.identifier) for feature in request.mm_features) <= LONGEST
    assert max(len(feature.mm_hash) for feature in request.mm_features) <= LONGEST
    assert len(request.session_id) <= LONGEST
    processor = front.renderer.get_mm_processor()
    assert max(map(len, processor._named)) <= LONGEST
    assert {len(name) for video in processor._named.values() for name in video.names} <= {
        *range(LONGEST + 1)
    }


def test_media_sent_by_a_long_name_alone_are_found_again(front: Front) -> None:
    content = parts(front, f"again{LONG}", f"again{LONG}")
    first = rendered(front, content)
    video, image = content
    again = rendered(front, [{**video, "video_url": None}, {**image, "image_url": None}])
    assert again["mm_hashes"] == first["mm_hashes"]
    assert again["prompt_token_ids"] == first["prompt_token_ids"]


def test_takedowns_are_told_which_media_came_by_their_name_alone(front: Front) -> None:
    video, image = parts(front, "told by name", "told by name")
    first = front.render_messages([{"role": "user", "content": [video, image]}]).trace
    assert not first.named
    bare = {**video, "video_url": None}
    trace = front.render_messages([{"role": "user", "content": [bare, image]}]).trace
    assert trace.hashes == {"told by name"}
    assert trace.named == first.hashes - trace.hashes
    assert trace.named
    # The content that the request brings besides.
    both = front.render_messages([{"role": "user", "content": [bare, video]}]).trace
    assert not both.named
    assert both.hashes == trace.named


def test_media_named_by_a_uuid_that_this_server_never_got_are_a_400_that_says_so(
    front: Front,
) -> None:
    video, image = parts(front, "sent elsewhere", "sent elsewhere")
    for bare, what in (
        ({**video, "video_url": None}, "video"),
        ({**image, "image_url": None}, "image"),
    ):
        with pytest.raises(VLLMValidationError, match=f"names its {what} by uuid alone"):
            rendered(front, [bare])
    with pytest.raises(VLLMValidationError, match="names its video by uuid alone"):
        rendered(front, [{**video, "video_url": None}, image])


@pytest.mark.usefixtures("front")
def test_a_long_hash_of_media_made_elsewhere_is_refused() -> None:
    def asked(name: str) -> GenerateRequest:
        features = {
            "mm_hashes": {"image": [name]},
            "mm_placeholders": {"image": [{"offset": 0, "length": 1}]},
        }
        return GenerateRequest(
            token_ids=[1], sampling_params=SamplingParams(max_tokens=1), features=features
        )

    async def ask(name: str) -> Any:
        return await ServingTokens.serve_tokens(object(), asked(name))

    limit = f"at most {MAX_HASH_CHARACTERS}"
    with pytest.raises(VLLMValidationError, match=limit):
        asyncio.run(ask("x" * (MAX_HASH_CHARACTERS + 1)))
    # One that is no longer goes on to vLLM, which misses its server here.
    with pytest.raises(AttributeError):
        asyncio.run(ask("x" * MAX_HASH_CHARACTERS))


class EngineOf:
    """The engine that answers a client, in this process."""

    def __init__(self, control: KVControl) -> None:
        self._control = control
        self.items: list[int] = []

    async def call_utility_async(self, utility: str, action: str, key: str) -> int:
        assert utility == UTILITY
        self.items.append(answer(self._control, action, key))
        return self.items[-1]


def test_a_session_with_a_long_id_can_be_pinned_and_released(front: Front) -> None:
    session = request_of(front, rendered(front, parts(front, "a", "b")), LONG).session_id
    engine = Engine(64)
    engine.serve(request("video", [Media("a", 40), Text(1, 3)], session=session))
    core = EngineOf(KVControl(engine.pool))
    client = KVClient(SimpleNamespace(engine_core=core))
    for action in (client.pin, client.unpin, client.trim, client.release):
        asyncio.run(action(LONG))
    assert core.items == [1, 1, 1, 1]
