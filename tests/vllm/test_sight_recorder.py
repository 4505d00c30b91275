"""What a request leaves in the metrics and in its timeline, through vLLM's real renderer."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from front import Front, opened
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMError
from vllm.v1.metrics.stats import RequestStateStats

from vllm_mm_ext.adapters.quality.service import state_for
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.answers import observer
from vllm_mm_ext.adapters.serving.middleware import TraceMiddleware
from vllm_mm_ext.adapters.sight import api_server_sight
from vllm_mm_ext.adapters.sight.api_server_sight import ApiServerSight
from vllm_mm_ext.base.engine_figures import FIGURES, EngineBoard, EngineTimes
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.testing.media import Tone, make_clip

ARRIVED = 1_700_000_000.25


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("clips")
    make_clip(files / "a.mp4", duration=3.0, seed=1, audio=[Tone(440.0, 0.0, 3.0)])
    make_clip(files / "b.avi", duration=2.0, seed=2, codec="mpeg4", fps=25)
    (files / "text.mp4").write_text("not a video")
    with opened(files) as made:
        yield made


@pytest.fixture(scope="module")
def sight(front: Front) -> ApiServerSight:
    made = ApiServerSight(lambda: {**runtime_of(front.renderer).stats(), "live": {}})
    made.start(front.renderer.config, front.renderer, Namespace(disable_log_stats=False))
    return made


def _value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class _Grown:
    """By how much series have grown since this was made."""

    def __init__(self) -> None:
        self._before = {self._key(sample): sample.value for sample in self._samples()}

    def __call__(self, name: str, **labels: str) -> float:
        before = self._before.get((name, *sorted(labels.items())), 0.0)
        return _value(name, **labels) - before

    @staticmethod
    def _samples() -> Iterator[Any]:
        for family in REGISTRY.collect():
            yield from family.samples

    @staticmethod
    def _key(sample: Any) -> tuple[Any, ...]:
        return (sample.name, *sorted(sample.labels.items()))


def _output(cached: int, **changes: Any) -> Any:
    stats = RequestStateStats(
        num_generation_tokens=1,
        arrival_time=ARRIVED,
        queued_ts=50.0,
        scheduled_ts=50.5,
        first_token_ts=52.5,
        last_token_ts=52.5,
    )
    stats = replace(stats, **changes)
    return SimpleNamespace(num_cached_tokens=cached, metrics=stats)


@pytest.mark.usefixtures("sight")
def test_media_of_a_request_are_counted_with_their_stages(front: Front) -> None:
    grown = _Grown()
    trace = front.render("a.mp4", "b.avi").trace
    for codec, seconds, name in (("h264", 3.0, "a.mp4"), ("mpeg4", 2.0, "b.avi")):
        of = {"modality": "video", "codec": codec}
        assert grown("mm_ext_media_items_total", source="decoder", **of) == 1
        assert grown("mm_ext_media_seconds_total", **of) == pytest.approx(seconds, abs=0.05)
        assert grown("mm_ext_media_bytes_total", **of) == (front.files / name).stat().st_size
    frames = sum(len(report.times) for _, report in trace.videos)
    assert sum(grown("mm_ext_frames_total", policy=p) for p in ("uniform", "adaptive")) == frames
    assert grown("mm_ext_videos_total", load_tier="0") == 2
    assert grown("mm_ext_prompt_items_total", modality="video", inputs="computed") == len(
        trace.items
    )
    counted = {
        stage: grown("mm_ext_stage_seconds_count", stage=stage, modality="video")
        for stage in ("fetch", "probe", "sample", "decode")
    }
    assert counted == dict.fromkeys(counted, 2.0)
    for stage in ("plan", "preprocess"):
        assert grown("mm_ext_stage_seconds_count", stage=stage, modality="request") == 1
    by_item = {one.item for one in trace.timeline if one.stage == "decode"}
    assert by_item == {0, 1}
    began = {(one.stage, one.item): one.began for one in trace.timeline}
    assert began["fetch", 0] <= began["probe", 0] <= began["decode", 0] <= began["preprocess", None]


@pytest.mark.usefixtures("sight")
def test_a_follow_up_is_counted_as_cached(front: Front) -> None:
    front.render("a.mp4")
    grown = _Grown()
    trace = front.render("a.mp4", text="And then?").trace
    of = {"modality": "video", "codec": "h264"}
    assert grown("mm_ext_media_items_total", source="cache", **of) == 1
    assert grown("mm_ext_media_items_total", source="decoder", **of) == 0
    assert grown("mm_ext_prompt_items_total", modality="video", inputs="cached") == len(trace.items)
    assert grown("mm_ext_stage_seconds_count", stage="decode", modality="video") == 0


def test_the_engine_adds_its_stages_and_the_tokens(front: Front, sight: ApiServerSight) -> None:
    assert sight is not None
    board = EngineBoard(state_for(front.renderer.config))
    board.write_times(ARRIVED, EngineTimes(1.0, 0.25, 0.75))
    rendered = front.render("a.mp4")
    trace = rendered.trace
    grown = _Grown()

    async def answered() -> None:
        enter_request(RequestContext(renderer=front.renderer, trace=trace))
        followed = observer("chat-7", {"prompt_token_ids": trace.prompts[0].token_ids})
        assert followed is not None
        followed.sent()
        followed.first(_output(trace.items[0].end))
        followed.ended()

    asyncio.run(answered())
    assert trace.request_id == "chat-7"
    seconds = {one.stage: one.seconds for one in trace.timeline}
    assert [seconds[s] for s in ("queue", "encode", "prefill_wait", "prefill")] == [
        0.5,
        1.0,
        0.75,
        0.25,
    ]
    tokens = {
        (modality, source): grown("mm_ext_prompt_tokens_total", modality=modality, source=source)
        for modality in ("video", "text")
        for source in ("computed", "prefix_cache")
    }
    assert sum(tokens.values()) == rendered.prompt_tokens
    cached = tokens["video", "prefix_cache"] + tokens["text", "prefix_cache"]
    assert cached == trace.items[0].end
    assert tokens["video", "prefix_cache"] == trace.items[0].embeddings


def test_an_answer_that_is_not_streamed_has_its_stages_where_they_were(
    front: Front, sight: ApiServerSight
) -> None:
    assert sight is not None
    recorder = runtime_of(front.renderer).recorder
    assert recorder is not None
    trace = front.render("a.mp4").trace
    # The first output that vLLM gives is the whole answer.
    recorder.answered(trace, _output(0, last_token_ts=72.5, num_generation_tokens=100))
    prefill = trace.timeline[-1]
    assert prefill.stage == "prefill"
    assert prefill.began + prefill.seconds == pytest.approx(time.time() - 20.0, abs=1.0)


@pytest.mark.parametrize("scheduled", [0.0, 50.5], ids=["never scheduled", "aborted in prefill"])
def test_a_request_that_ended_before_its_first_token_has_neither_prefill_nor_computed_tokens(
    front: Front, sight: ApiServerSight, scheduled: float
) -> None:
    assert sight is not None
    recorder = runtime_of(front.renderer).recorder
    assert recorder is not None
    trace = front.render("a.mp4").trace
    before, grown = len(trace.timeline), _Grown()
    recorder.answered(trace, _output(-1, scheduled_ts=scheduled, num_generation_tokens=0))
    stages = [(one.stage, one.seconds) for one in trace.timeline[before:]]
    assert stages == ([("queue", 0.5)] if scheduled else [])
    for modality in ("video", "text"):
        of = {"modality": modality, "source": "computed"}
        assert grown("mm_ext_prompt_tokens_total", **of) == 0


def test_each_prompt_of_a_request_is_counted_once_by_what_it_has(
    front: Front, sight: ApiServerSight
) -> None:
    assert sight is not None
    rendered = [front.render(name) for name in ("a.mp4", "b.avi")]
    trace = rendered[-1].trace
    trace.prompts = [prompt for one in rendered for prompt in one.trace.prompts]
    grown = _Grown()

    async def answered() -> None:
        enter_request(RequestContext(renderer=front.renderer, trace=trace))
        batch = [
            observer(f"batch_{index}", {"prompt_token_ids": prompt.token_ids})
            for index, prompt in enumerate(trace.prompts)
        ]
        for followed in batch:
            assert followed is not None
            followed.first(_output(0))
        # What comes after an output is a further step of a beam search.
        assert observer("beam", {"prompt_token_ids": [1]}) is None

    asyncio.run(answered())
    for modality in ("video", "text"):
        counted = grown("mm_ext_prompt_tokens_total", modality=modality, source="computed")
        assert counted == sum(prompt.tokens[modality] for prompt in trace.prompts)


@pytest.mark.parametrize("decoder", [None, "a text", {"prompt_token_ids": [1]}])
def test_a_prompt_for_an_encoder_decoder_is_followed_whatever_its_decoder_begins_with(
    front: Front, decoder: Any
) -> None:
    trace = front.render("a.mp4").trace

    async def answered() -> None:
        enter_request(RequestContext(renderer=front.renderer, trace=trace))
        prompt = {"encoder_prompt": "heard", "decoder_prompt": decoder}
        assert observer("chat-8", prompt) is not None

    asyncio.run(answered())
    assert trace.request_id == "chat-8"


def test_each_turn_of_a_response_is_followed(front: Front) -> None:
    trace = front.render("a.mp4").trace

    async def answered() -> None:
        enter_request(RequestContext(renderer=front.renderer, trace=trace))
        for turn in range(2):
            followed = observer(f"turn_{turn}", {"prompt_token_ids": [turn]})
            assert followed is not None
            followed.first(_output(turn))
            # vLLM renders what the model's tool has found.
            await front.renderer.process_for_engine_async({"prompt_token_ids": [turn]}, ARRIVED)

    asyncio.run(answered())


def test_a_fault_of_the_metrics_fails_no_request(
    front: Front, sight: ApiServerSight, caplog: pytest.LogCaptureFixture
) -> None:
    assert sight is not None
    recorder = runtime_of(front.renderer).recorder
    assert recorder is not None
    trace = front.render("a.mp4").trace
    with caplog.at_level("ERROR", logger="vllm.mm_ext"):
        # No output of vLLM's: it lacks ``metrics``.
        recorder.answered(trace, object())
        recorder.answered(trace, object())
    assert [record.message for record in caplog.records] == [
        "mm_ext: metrics or spans lack something: Recorder.answered"
    ]
    trace.cached_tokens = -1
    trace.set_tokens({"video": 5}, 3)
    grown = _Grown()
    recorder.answered(trace, _output(-1))
    text = {"modality": "text", "source": "computed"}
    assert grown("mm_ext_prompt_tokens_total", **text) == 0
    video = {"modality": "video", "source": "computed"}
    assert grown("mm_ext_prompt_tokens_total", **video) == 5


def test_a_refused_request_is_counted_by_its_reason(front: Front, sight: ApiServerSight) -> None:
    async def chat(_: Any) -> PlainTextResponse:
        try:
            await _render_here(front)
        except VLLMError as error:
            return PlainTextResponse(str(error), 422)
        raise AssertionError("the file is no video")

    app = Starlette(routes=[Route("/chat", chat)])
    app.add_middleware(TraceMiddleware, sight=sight)  # type: ignore[arg-type]
    grown = _Grown()
    with TestClient(app) as client:
        assert client.get("/chat").status_code == 422
    assert grown("mm_ext_refused_requests_total", reason="unreadable") == 1


def test_a_request_that_has_ended_keeps_no_place_in_the_order_of_the_media_budget(
    sight: ApiServerSight,
) -> None:
    budget, kept = MediaBudget(10), []

    async def fetch(_: object) -> PlainTextResponse:
        context = current_request()
        assert context is not None
        kept.append(context.budget_claim(budget))
        (await kept[0].acquire(1)).release()
        raise ValueError("what was fetched is not rendered")

    app = Starlette(routes=[Route("/generate", fetch)])
    app.add_middleware(TraceMiddleware, sight=sight)  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/generate").status_code == 500
    assert kept
    assert len(budget._live) == 0


def test_a_scrape_brings_in_caches_and_engines(front: Front, sight: ApiServerSight) -> None:
    front.render("a.mp4")
    board = EngineBoard(state_for(front.renderer.config))
    figures = {name: float(number) for number, name in enumerate(FIGURES)}
    board.write(0, figures)
    grown = _Grown()
    with TestClient(_metrics_app(sight)) as client:
        client.get("/metrics")
        board.write(0, {name: value + 2 for name, value in figures.items()})
        client.get("/metrics/")
    steps = figures["steps_mixed"] + 2
    assert grown("mm_ext_engine_steps_total", engine="0", work="mixed") == steps
    assert _value("mm_ext_engine_requests", engine="0", state="waiting") == figures["waiting"] + 2
    stats = runtime_of(front.renderer).stats()
    assert _value("mm_ext_cache_bytes", cache="decoded") == stats["decoded_cache"]["num_bytes"] > 0
    assert _value("mm_ext_cache_hits_total", cache="decoded") == stats["decoded_cache"]["hits"]
    assert _value("mm_ext_decode_jobs_started_total") == stats["decode"]["jobs"]


async def test_who_is_not_scraped_sets_what_engines_tell_again_and_again_whatever_goes_wrong(
    front: Front, sight: ApiServerSight, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = EngineBoard(state_for(front.renderer.config))
    figures = {name: float(number) for number, name in enumerate(FIGURES)}
    board.write(0, figures)
    stats, looks = sight._stats, []

    def fail_once() -> Mapping[str, Any]:
        looks.append(len(looks))
        if len(looks) == 1:
            raise OSError("too many open files")
        if len(looks) == 5:
            # As when the front-end is gone.
            raise VLLMError("the engine is dead")
        board.write(0, {name: value + looks[-1] for name, value in figures.items()})
        return stats()

    monkeypatch.setattr(api_server_sight, "_LOOK_S", 0.001)
    monkeypatch.setattr(sight, "_stats", fail_once)
    assert sight._metrics is not None
    await asyncio.wait_for(sight._keep_looking(sight._metrics), 10)
    assert looks == [0, 1, 2, 3, 4]
    waiting = _value("mm_ext_engine_requests", engine="0", state="waiting")
    assert waiting == figures["waiting"] + 3


def test_metrics_that_are_off_leave_no_recorder(front: Front) -> None:
    runtime = runtime_of(front.renderer)
    before, runtime.recorder = runtime.recorder, None
    try:
        sight = ApiServerSight(dict)
        sight.start(front.renderer.config, front.renderer, Namespace(disable_log_stats=True))
        sight.before_scrape()
        assert runtime.recorder is None
    finally:
        runtime.recorder = before


async def _render_here(front: Front) -> None:
    """As the chat route does, in the context that the middleware has opened."""
    request = ChatCompletionRequest(model="m", messages=front.messages("text.mp4"))
    await front.renderer.render_chat_async(
        [request.messages],
        request.build_chat_params(None, "auto"),
        request.build_tok_params(front.renderer.model_config),
        prompt_extras={},
    )


def _metrics_app(sight: ApiServerSight) -> Starlette:
    app = Starlette(
        routes=[Route(path, lambda _: PlainTextResponse("")) for path in ("/metrics", "/metrics/")]
    )
    app.add_middleware(TraceMiddleware, sight=sight)  # type: ignore[arg-type]
    return app
