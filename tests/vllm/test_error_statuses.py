"""What clients are answered when a request about media fails: the status, the body, Retry-After."""

from __future__ import annotations

import asyncio
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from front import Front, opened
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.pooling.embed.api_router import router as embed_router
from vllm.entrypoints.pooling.pooling.api_router import router as pooling_router
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import (
    QueueOverflowError,
    VLLMClientError,
    VLLMError,
    VLLMUnprocessableEntityError,
)
from vllm.multimodal.media import MediaConnector, VideoMediaIO
from vllm.multimodal.media.image import ImageMediaIO
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.serving.requests import OptionError
from vllm_mm_ext.errors import (
    BusyError,
    DecodeCrashError,
    InternalMediaError,
    MediaError,
    MediaTooLargeError,
    NoSuchStreamError,
    UnreachableMediaError,
    UnreadableMediaError,
    UnsupportedFormatError,
)
from vllm_mm_ext.media.decode import wire
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.decode.worker import _as_reply
from vllm_mm_ext.media.fetch.source import MediaChangedError
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.request.context import current_request
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.video.grid_times import grid_times

# The status for each error, by its code.
STATUSES = {
    "media_error": 400,
    "option": 400,
    "over_budget": 400,
    "unheld": 400,
    "forbidden": 400,
    "pairing": 409,
    "taken_down": 410,
    "too_large": 413,
    "too_long": 413,
    "unsupported_format": 415,
    "unreadable": 422,
    "unreachable": 422,
    "no_stream": 422,
    "encode_only": 421,
    "decode_timeout": 422,
    "decode_crash": 422,
    "internal": 500,
    "changed": 502,
    "origin_error": 502,
    "busy": 503,
    "origin_timeout": 504,
}


def errors_of(base: type[MediaError]) -> Iterator[type[MediaError]]:
    """The class and all that derive from it, but for those that never leave their module."""
    if not base.__name__.startswith("_"):
        yield base
    for derived in base.__subclasses__():
        yield from errors_of(derived)


EVERY = sorted(set(errors_of(MediaError)), key=lambda error: error.__name__)


@pytest.mark.parametrize("error", EVERY)
def test_each_error_has_its_status_which_the_docs_list(error: type[MediaError]) -> None:
    assert error.status == STATUSES[error.code]
    docs = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    assert f"\n| {error.status.value} | " in docs


@pytest.mark.parametrize("error", EVERY)
def test_errors_cross_processes(error: type[MediaError]) -> None:
    sent = error("what is wrong", parameter="video_url", value=7)
    got = pickle.loads(pickle.dumps(sent))
    assert type(got) is error
    assert (got.message, got.parameter, got.value) == ("what is wrong", "video_url", 7)


# --- vLLM's routes, with its handlers and the plugin's middleware ---------------------------------


class Failing:
    """In the place of every part that serves a route: fails as the plugin's code fails."""

    def __init__(self) -> None:
        self.error: Exception = MediaError("unset")

    async def __call__(self, *_: Any, **__: Any) -> Any:
        with client_errors():
            raise self.error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self.__call__


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TRANSCRIPTION = {"files": {"file": ("a.wav", b"RIFF")}, "data": {"model": "m"}}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"json": CHAT},
    "/v1/chat/completions#stream": {"json": {**CHAT, "stream": True}},
    "/v1/completions": {"json": {"model": "m", "prompt": "hi"}},
    "/v1/responses": {"json": {"model": "m", "input": "hi"}},
    "/v1/messages": {"json": {**CHAT, "max_tokens": 1}},
    "/v1/embeddings": {"json": {"model": "m", "input": "hi"}},
    "/pooling": {"json": {"model": "m", "input": "hi"}},
    "/tokenize": {"json": {"model": "m", "prompt": "hi"}},
    "/v1/chat/completions/render": {"json": CHAT},
    "/v1/audio/transcriptions": TRANSCRIPTION,
}


@pytest.fixture(scope="module")
def failing() -> Failing:
    return Failing()


@pytest.fixture(scope="module")
def client(failing: Failing) -> Iterator[TestClient]:
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    register_api_routers(app.state.args, app, ("generate", "render", "transcription"))
    # vLLM adds these for models that have the task.
    app.include_router(embed_router)
    app.include_router(pooling_router)
    plugin.endpoint_plugin().attach_router(app)
    init_exception_handler(app)
    openai_parts = ("chat", "chat_batch", "completion", "responses", "transcription")
    for name in (
        *(f"openai_serving_{part}" for part in openai_parts),
        "anthropic_serving_messages",
        "serving_embedding",
        "serving_pooling",
        "serving_tokenization",
        "serving_render",
    ):
        setattr(app.state, name, failing)
    with TestClient(app, raise_server_exceptions=False) as made:
        yield made


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "error",
    [
        OptionError("what is wrong", parameter="mm_ext.fps"),
        MediaTooLargeError("what is wrong", parameter="mm_ext.fps"),
        UnsupportedFormatError("what is wrong", parameter="mm_ext.fps"),
        UnreadableMediaError("what is wrong", parameter="mm_ext.fps"),
        InternalMediaError("what is wrong", parameter="mm_ext.fps"),
        MediaChangedError("what is wrong", parameter="mm_ext.fps"),
        BusyError("what is wrong", parameter="mm_ext.fps"),
    ],
    ids=lambda error: error.code,
)
def test_every_route_answers_by_the_cause(
    client: TestClient, failing: Failing, route: str, error: MediaError
) -> None:
    failing.error = error
    response = client.post(route.partition("#")[0], **ROUTES[route])
    assert response.status_code == STATUSES[error.code]
    assert response.headers.get("retry-after") == ("1" if error.code == "busy" else None)
    told = response.json()["error"]
    assert told["message"].startswith("what is wrong")
    assert told["type"]
    if route != "/v1/messages":  # Anthropic's errors have neither.
        assert (told["code"], told["param"]) == (STATUSES[error.code], "mm_ext.fps")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OptionError("wrong"), openai.BadRequestError),
        (UnreachableMediaError("gone"), openai.UnprocessableEntityError),
        (MediaTooLargeError("large"), openai.APIStatusError),
        (BusyError("full"), openai.InternalServerError),
        (InternalMediaError(), openai.InternalServerError),
    ],
    ids=lambda value: getattr(value, "code", None),
)
def test_the_openai_client_raises_the_class_of_the_status(
    client: TestClient, failing: Failing, error: MediaError, raised: type[openai.APIStatusError]
) -> None:
    failing.error = error
    made = openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=client
    )
    with pytest.raises(raised, match=error.message) as caught:
        made.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert caught.value.status_code == error.status
    assert caught.value.param == "media"


def test_vllms_own_busy_answer_says_when_to_come_again(
    client: TestClient, failing: Failing
) -> None:
    failing.error = QueueOverflowError()
    response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


# --- whose fault it is ----------------------------------------------------------------------------


def fault_of_the_plugin() -> None:
    """The plugin's own code, given what it never should be."""
    grid_times((2.0, 1.0), temporal_patch=2, step=None)


def fault_of_the_plugin_inside_vllm() -> None:
    """As vLLM wraps what a processor raises."""
    try:
        fault_of_the_plugin()
    except ValueError as error:
        raise ValueError("Failed to apply Processor on data={'secret': 1}") from error


@pytest.mark.parametrize("fault", [fault_of_the_plugin, fault_of_the_plugin_inside_vllm])
def test_a_fault_of_the_plugin_is_a_500_without_its_internals(
    client: TestClient,
    failing: Failing,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[], None],
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - whatever it says
        fault()
    failing.error = raised.value
    response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == InternalMediaError().message
    (record,) = [r for r in caplog.records if r.name == "vllm.mm_ext"]
    assert record.exc_info is not None
    assert "ascend" in caplog.text


def test_what_vllms_code_refuses_stays_vllms_answer(client: TestClient, failing: Failing) -> None:
    with pytest.raises(ValueError, match="HTTP, data or file") as raised:
        MediaConnector().load_from_url("ftp://host/clip.mp4", VideoMediaIO(ImageMediaIO()))
    failing.error = raised.value
    response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == str(raised.value)


def test_a_media_error_that_vllm_wraps_is_answered_as_itself(
    client: TestClient, failing: Failing
) -> None:
    failing.error = ValueError("Failed to apply Processor")
    failing.error.__cause__ = MediaTooLargeError("too many bytes")
    response = client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["message"]) == (413, "too many bytes")


def test_offline_refusals_are_vllms_client_errors_and_failures_are_not() -> None:
    for error in (OptionError("a"), UnreadableMediaError("b"), MediaTooLargeError("c")):
        with pytest.raises(VLLMClientError), client_errors():
            raise error
    for error in (BusyError("a"), InternalMediaError(), MediaChangedError("c")):
        with pytest.raises(VLLMError) as caught, client_errors():
            raise error
        assert not isinstance(caught.value, VLLMClientError)


@pytest.mark.parametrize("error", [error for error in EVERY if error.status == 422])
def test_only_media_that_are_not_there_or_not_readable_are_value_errors(
    error: type[MediaError],
) -> None:
    with pytest.raises(VLLMUnprocessableEntityError) as caught, client_errors():
        raise error("what is wrong", parameter="video_url")
    none = issubclass(error, NoSuchStreamError | UnreadableMediaError)
    assert isinstance(caught.value, ValueError) is none


async def test_a_fault_in_the_decode_worker_is_no_fault_of_the_file(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", duration=1, seed=1).path
    fd = os.open(path, os.O_RDONLY)
    pool = DecodePool(workers=1)
    sampling = SamplingSpec(max_frames=2)
    try:
        with pytest.raises(InternalMediaError, match="server's log"):
            await pool.run(fd, DecodeRequest(sampling, SizeRule(kind="qwen_vl", factor=0)))
        # The worker is well.
        result = await pool.run(fd, DecodeRequest(sampling))
        assert len(result.frames) == 2
    finally:
        pool.close()
        os.close(fd)


def test_a_decoder_that_cannot_cope_is_the_files_fault() -> None:
    import av

    with pytest.raises(ValueError) as raised:  # noqa: PT011 - whatever it says
        av.VideoFrame(16, 16, "yuv420p").reformat(format="no such format")
    reply = _as_reply(raised.value)
    assert isinstance(reply, wire.Failed)
    error = reply.error()
    assert type(error) is UnreadableMediaError
    assert "no such" not in error.message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://host/a.ts\n", 415),
        ("text.mp4", b"1\n00:00:00,000 --> 00:00:01,000\nsubtitles\n\n" * 5, 415),
        ("noise.mp4", bytes(range(256)) * 64, 422),
        ("empty.mp4", b"", 422),
    ],
)
def test_a_format_that_is_not_taken_is_told_from_a_damaged_file(
    tmp_path: Path, name: str, content: bytes, expected: int
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableMediaError) as raised:
        probe(str(tmp_path / name), DecodeLimits())
    assert raised.value.status == expected


def test_a_decoder_crash_is_the_files_fault() -> None:
    assert DecodeCrashError("twice").status == 422


# --- inputs that get lost between vLLM's processor caches -----------------------------------------


def output_of_a_request(**output: Any) -> RequestOutputCollector:
    """What ``AsyncLLM.generate`` finds after the engine sent an output for its request."""
    plugin.register()
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    sampling = SamplingParams(detokenize=False)
    request = EngineCoreRequest("r", [1], None, sampling, None, 0.0, None, None, None)
    request.external_req_id = "r"
    queue = RequestOutputCollector(sampling.output_kind, "r")
    processor.add_request(request, None, queue=queue)
    processor.process_outputs([EngineCoreOutput("r", [], **output)])
    return queue


async def test_media_that_the_engine_has_lost_may_be_sent_again() -> None:
    queue = output_of_a_request(finish_reason=FinishReason.ERROR, mm_cache_miss_hashes=["video"])
    with pytest.raises(VLLMError, match="Send it again") as raised:
        await queue.get()
    assert raised.value.status_code == raised.value.http_status == 503  # type: ignore[attr-defined]


async def test_other_errors_of_the_engine_stay_vllms() -> None:
    queue = output_of_a_request(finish_reason=FinishReason.ERROR)
    output = await queue.get()
    assert output.outputs[0].finish_reason == "error"  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "clip.mp4", duration=2, seed=1)
    with opened(files) as made:
        yield made


def test_media_forgotten_while_it_is_preprocessed_may_be_sent_again(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.render("clip.mp4")
    processor = front.renderer.mm_processor
    preprocess = processor._apply_hf_processor_main

    def forget_and_preprocess(*args: Any, **kwargs: Any) -> Any:
        front.renderer.mm_processor_cache.clear_cache()
        return preprocess(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(processor, "_apply_hf_processor_main", forget_and_preprocess)
        with pytest.raises(VLLMError, match="Send it again") as raised:
            front.render("clip.mp4")
    assert raised.value.status_code == 503  # type: ignore[attr-defined]
    assert front.render("clip.mp4").video_tokens


async def test_hashes_are_known_before_the_inputs_that_have_them_are_made(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("in the middle of it")

    front.renderer.mm_processor_cache.clear_cache()
    monkeypatch.setattr(front.renderer.mm_processor, "_apply_hf_processor_main", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        await front.rendered(front.messages("clip.mp4"), None, None)
    context = current_request()
    assert context is not None
    assert context.trace.hashes
    assert not context.trace.items


def test_failed_assertions_elsewhere_are_not_taken_for_it(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.render("clip.mp4")

    def fail(*_: Any) -> Any:
        raise AssertionError("something else")

    with monkeypatch.context() as patch:
        patch.setattr(front.renderer.mm_processor_cache, "get_and_update_item", fail)
        with pytest.raises(AssertionError, match="something else"):
            asyncio.run(front.rendered(front.messages("clip.mp4"), None, None))
