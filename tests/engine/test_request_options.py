"""Options in requests and reports in answers, through a real server and the OpenAI client."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
from PIL import Image
from planned import PlannedServer

pytestmark = pytest.mark.engine

TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}


def ask(
    planned: PlannedServer, *names: str, options: dict[str, Any] | None = None, **more: Any
) -> Any:
    extra = {} if options is None else {"mm_ext": options}
    return planned.client.chat.completions.create(
        model=planned.server.model,
        messages=planned.messages(*names),
        **{"max_tokens": 8, "temperature": 0, "extra_body": extra, **more},
    )


def chunks_of(planned: PlannedServer, *names: str, **more: Any) -> list[dict[str, Any]]:
    return [chunk.model_dump() for chunk in ask(planned, *names, stream=True, **more)]


def check_block(block: dict[str, Any], prompt_tokens: int) -> None:
    assert sum(block["tokens"].values()) == prompt_tokens
    assert block["stages_ms"]["preprocess"] > 0


def test_a_plain_client_gets_its_answer_and_the_report(planned_server: PlannedServer) -> None:
    answer = ask(planned_server, "short.mp4")
    (video,) = answer.mm_ext["videos"]
    assert video["frames"] == len(video["times"]) == 8
    assert video["source_s"] == pytest.approx(4.0, abs=0.1)
    assert (video["level"], video["lowered"]) == (0, [])
    check_block(answer.mm_ext, answer.usage.prompt_tokens)


def test_a_request_without_media_and_options_is_answered_as_by_stock(
    planned_server: PlannedServer,
) -> None:
    assert not hasattr(ask(planned_server), "mm_ext")
    assert not any("mm_ext" in chunk for chunk in chunks_of(planned_server))
    assert ask(planned_server, options={}).mm_ext["videos"] == []


def test_frame_options_are_honoured(planned_server: PlannedServer) -> None:
    slow = ask(planned_server, "short.mp4", options={"fps": 1})
    assert slow.mm_ext["videos"][0]["frames"] == 4
    few = ask(planned_server, "short.mp4", options={"max_frames": 2})
    assert few.mm_ext["videos"][0]["frames"] == 2
    assert few.usage.prompt_tokens < slow.usage.prompt_tokens


def test_resolution_is_honoured(planned_server: PlannedServer) -> None:
    small = ask(planned_server, "short.mp4", options={"resolution": 112}).mm_ext["videos"][0]
    height, width = small["size"]
    assert height * width <= 112**2


def test_reduction_is_honoured(planned_server: PlannedServer) -> None:
    full = ask(planned_server, "short.mp4")
    pooled = ask(planned_server, "short.mp4", options={"reduction": {"pool": 2}})
    assert pooled.mm_ext["videos"][0]["reduction"]["pool"] == 2
    assert pooled.mm_ext["tokens"]["visual"] < full.mm_ext["tokens"]["visual"]
    assert pooled.usage.prompt_tokens < full.usage.prompt_tokens


def test_a_video_too_large_for_its_budget_is_lowered_and_the_answer_says_so(
    planned_server: PlannedServer,
) -> None:
    answer = ask(planned_server, "short.mp4", options={"total_tokens": 60})
    (video,) = answer.mm_ext["videos"]
    assert video["lowered"]
    assert answer.mm_ext["tokens"]["visual"] <= 60


def test_a_video_too_large_for_the_context_is_lowered(planned_server: PlannedServer) -> None:
    answer = ask(planned_server, "long.mp4")
    assert answer.mm_ext["videos"][0]["lowered"]
    assert answer.usage.prompt_tokens < 2048


def test_a_video_below_its_floors_is_refused_before_decoding(
    planned_server: PlannedServer,
) -> None:
    before = json.loads(planned_server.server.get("/mm_ext/stats"))["decode"]
    options = {"total_tokens": 8, "floor": {"frames": 7}}
    with pytest.raises(openai.BadRequestError, match=r"tokens"):
        ask(planned_server, "other.mp4", options=options)
    after = json.loads(planned_server.server.get("/mm_ext/stats"))["decode"]
    assert after["jobs"] - before["jobs"] <= 1, "a probe, no decode"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"reduction": {"pool": 99}}, "mm_ext.reduction.pool"),
        ({"reduction": {"pol": 2}}, "mm_ext.reduction.pol"),
        ({"speed": 1}, "mm_ext.speed"),
        ({"fps": -1}, "mm_ext.fps"),
        ({"min_frames": 9, "max_frames": 3}, "mm_ext"),
        ("fast", "mm_ext"),
    ],
)
def test_wrong_options_are_a_400_that_names_the_key(
    planned_server: PlannedServer, options: Any, key: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(planned_server, "short.mp4", options=options)
    assert error.value.param == key
    assert "mm_ext" in error.value.message


def test_raw_options_stay_closed(planned_server: PlannedServer) -> None:
    for name in ("media_io_kwargs", "mm_processor_kwargs"):
        with pytest.raises(openai.BadRequestError, match=name):
            ask(planned_server, "short.mp4", extra_body={name: {"fps": 1}})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"n": 3, "temperature": 1.0},
        {"tools": [TOOL]},
    ],
    ids=["plain", "usage", "continuous usage", "three choices", "tools"],
)
def test_the_last_chunk_of_a_stream_carries_the_report_and_no_other(
    planned_server: PlannedServer, more: dict[str, Any]
) -> None:
    chunks = chunks_of(planned_server, "short.mp4", **more)
    *others, last = chunks
    assert last["mm_ext"]["videos"][0]["frames"] == 8
    assert not any("mm_ext" in chunk for chunk in others)
    finished = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(finished) == list(range(more.get("n", 1)))


def test_a_stream_says_the_same_as_an_answer(planned_server: PlannedServer) -> None:
    answer = ask(planned_server, "short.mp4")
    chunks = chunks_of(planned_server, "short.mp4")
    text = "".join(c["delta"]["content"] or "" for chunk in chunks for c in chunk["choices"])
    assert text == answer.choices[0].message.content
    volatile = ("stages_ms", "cache")
    streamed = {k: v for k, v in chunks[-1]["mm_ext"].items() if k not in volatile}
    ask_again = ask(planned_server, "short.mp4")
    assert streamed == {k: v for k, v in ask_again.mm_ext.items() if k not in volatile}


def test_a_follow_up_reports_what_each_cache_held(planned_server: PlannedServer) -> None:
    options = {"fps": 1.5}
    first = ask(planned_server, "other.mp4", options=options).mm_ext
    again = ask(planned_server, "other.mp4", options=options).mm_ext
    assert not first["videos"][0]["decoded_cache"]
    assert again["videos"][0]["decoded_cache"]
    counts = again["cache"]["video"]
    assert counts["items"] > 1, "the video is segmented"
    assert counts["processor"] == counts["items"]
    assert 0 < counts["prefix"] <= counts["items"]
    assert first["cache"]["video"]["processor"] == 0
    assert again["cache"]["prompt_tokens"] > first["cache"]["prompt_tokens"]


def test_several_videos_are_reported_in_the_order_of_the_message(
    planned_server: PlannedServer,
) -> None:
    answer = ask(planned_server, "other.mp4", "short.mp4", options={"max_frames": 4})
    durations = [round(video["source_s"]) for video in answer.mm_ext["videos"]]
    assert durations == [6, 4]


def test_the_responses_route_checks_options_and_reports(planned_server: PlannedServer) -> None:
    client = planned_server.client
    asked: dict[str, Any] = {"model": planned_server.server.model, "max_output_tokens": 8}
    with pytest.raises(openai.BadRequestError, match=r"mm_ext\.fps"):
        client.responses.create(input="hi", extra_body={"mm_ext": {"fps": -1}}, **asked)
    answer: Any = client.responses.create(input="hi", extra_body={"mm_ext": {}}, **asked)
    assert answer.mm_ext["tokens"]["text"] == answer.usage.input_tokens
    plain = client.responses.create(input="hi", **asked)
    assert not hasattr(plain, "mm_ext")
    events: Any = client.responses.create(
        input="hi", stream=True, extra_body={"mm_ext": {}}, **asked
    )
    last = list(events)[-1]
    # At the token limit vLLM 0.32 completes a stream, 0.33 says that it is incomplete.
    assert last.type in {"response.completed", "response.incomplete"}
    assert last.response.mm_ext["tokens"]["text"] == answer.usage.input_tokens


def picture() -> str:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode()


def test_the_messages_route_streams_its_own_events(planned_server: PlannedServer) -> None:
    client = anthropic.Anthropic(base_url=planned_server.server.url, api_key="none", max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": picture()}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "hi"}]
    asked: Any = {
        "model": planned_server.server.model,
        "max_tokens": 8,
        # The client has no argument for it any more (anthropic 2); vLLM's route takes it.
        "extra_body": {"temperature": 0},
        "messages": [{"role": "user", "content": content}],
    }
    answer = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert events[-1] == "message_stop"
    assert [block.text for block in streamed.content] == [block.text for block in answer.content]
    assert streamed.usage.output_tokens == answer.usage.output_tokens == 8


def test_routes_without_options_refuse_them(planned_server: PlannedServer) -> None:
    model = planned_server.server.model
    asked = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/tokenize"):
        for options, status in (({}, 200), ({"mm_ext": {"fps": 1}}, 400)):
            answer = httpx.post(f"{planned_server.server.url}{path}", json={**asked, **options})
            assert answer.status_code == status, answer.text
            assert (f"{path} takes no mm_ext" in answer.text) == (status == 400)


def test_completions_take_no_media_and_so_no_options(planned_server: PlannedServer) -> None:
    client = planned_server.client
    asked: dict[str, Any] = {"model": planned_server.server.model, "prompt": "hi", "max_tokens": 2}
    assert not hasattr(client.completions.create(**asked), "mm_ext")
    with pytest.raises(openai.BadRequestError, match="/v1/completions takes no mm_ext"):
        client.completions.create(**asked, extra_body={"mm_ext": {"fps": 1}})
