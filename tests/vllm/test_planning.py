"""Planning with vLLM's own renderer: what is asked, what fits, and what is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from front import CONTEXT, Front, opened
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.renderers.chat_utils import (
    AsyncMultiModalItemTracker,
    parse_chat_messages,
    parse_chat_messages_async,
)

from vllm_mm_ext.adapters.media import media_connector as connector
from vllm_mm_ext.adapters.media.media_connector import server_plan
from vllm_mm_ext.adapters.quality.service import state_for
from vllm_mm_ext.adapters.runtime import current_runtime, runtime_of
from vllm_mm_ext.adapters.serving import planning
from vllm_mm_ext.base.shared_state import TierState
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.request import report
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.costs import FrontendCosts, PlannedVideo
from vllm_mm_ext.request.media_items import MediaItem
from vllm_mm_ext.testing.media import make_audio, make_clip
from vllm_mm_ext.testing.origin import Origin, Resource


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "short.mp4", duration=4, seed=1)
    make_clip(files / "other.mp4", duration=6, scene="pan", seed=2)
    make_clip(files / "long.mp4", width=320, height=240, fps=4, duration=100, seed=3)
    make_audio(files / "tone.wav", duration=1.0)
    (files / "page.mp4").write_text("<!doctype html>")
    with opened(files) as made:
        yield made


def test_without_options_and_pressure_the_server_s_settings_hold(front: Front) -> None:
    (video,) = front.render("short.mp4").videos
    assert (video["frames"], video["level"], video["lowered"]) == (8, 0, [])


@pytest.mark.parametrize(
    ("options", "frames"),
    [({"fps": 1}, 4), ({"max_frames": 2}, 2), ({"fps": 0.5, "min_frames": 6}, 6), ({"fps": 4}, 16)],
)
def test_frames_are_as_asked(front: Front, options: dict[str, Any], frames: int) -> None:
    (video,) = front.render("short.mp4", options=options).videos
    assert video["frames"] == frames
    assert video["lowered"] == []


def test_resolution_is_as_asked(front: Front) -> None:
    full, small = (
        front.render("short.mp4", options=o).videos[0]["size"] for o in ({}, {"resolution": 112})
    )
    assert small[0] * small[1] <= 112**2 < full[0] * full[1]


@pytest.mark.parametrize(
    "reduction", [{"pool": 2}, {"temporal": 2}, {"static": "merge", "keep": 0.5}]
)
def test_tokens_are_reduced_as_asked(front: Front, reduction: dict[str, Any]) -> None:
    full = front.render("short.mp4")
    less = front.render("short.mp4", options={"reduction": reduction})
    assert less.video_tokens < full.video_tokens
    assert less.videos[0]["reduction"].items() >= reduction.items()
    assert less.videos[0]["frames"] == full.videos[0]["frames"]


@pytest.mark.parametrize("budget", [40, 100, 200])
def test_a_budget_is_kept_and_what_was_lowered_is_told(front: Front, budget: int) -> None:
    made = front.render("short.mp4", "other.mp4", options={"total_tokens": budget})
    assert made.video_tokens <= budget
    lowered = [entry for video in made.videos for entry in video["lowered"]]
    assert lowered
    assert {entry["why"] for entry in lowered} == {"total_tokens"}


def test_one_video_shown_twice_counts_twice(front: Front) -> None:
    made = front.render("short.mp4", "short.mp4", options={"total_tokens": 120})
    assert made.video_tokens <= 120
    first, second = made.videos
    assert first["frames"] == second["frames"]


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_uses_of_one_url_are_told_apart_by_their_place_in_the_messages(
    front: Front, online: bool
) -> None:
    messages = front.messages("short.mp4", "short.mp4")
    url = messages[0]["content"][0]["video_url"]["url"]
    # A part that names a video by its uuid alone is none that the connector is asked for.
    messages[0]["content"].insert(1, {"video_url": None, "uuid": "sent before"})
    config = front.renderer.model_config

    async def parsed() -> list[Any]:
        context = enter_request(RequestContext(renderer=front.renderer))
        plan = server_plan(runtime_of(front.renderer), {}, url, None)
        assert plan is not None
        for frames in (2, 6):
            sampling = replace(plan.sampling, fps=8.0, max_frames=frames)
            context.add([MediaItem("video", url, replace(plan, sampling=sampling))])
        if online:
            _, data, _ = await parse_chat_messages_async(messages, config, "openai")
        else:
            _, data, _ = parse_chat_messages(messages, config, "openai")
        assert data is not None
        return [item for item in data["video"] if item is not None]

    assert [len(item.media[0]) for item in asyncio.run(parsed())] == [2, 6]


@pytest.fixture
def loaded(front: Front) -> Iterator[Callable[[int], None]]:
    """Sets the load tier of the service, which is 0 again after the test."""
    state = state_for(front.renderer.config)

    def load(level: int) -> None:
        with state.writing():
            state.write_tier(TierState(level, level, seen=time.monotonic()))

    yield load
    load(0)


def test_a_server_that_prefills_and_one_that_answers_plan_alike(
    front: Front, loaded: Callable[[int], None]
) -> None:
    def frames(role: dict[str, bool], level: int, max_tokens: int) -> tuple[int, int]:
        loaded(level)
        options = {"fps": 4, "max_frames": 400}
        # Each has a session of its own: what it was granted before does not count.
        session = f"{role} {level} {max_tokens}"
        made = front.render(
            "long.mp4",
            options=options,
            session=session,
            kv_transfer_params=role,
            max_tokens=max_tokens,
        )
        return made.videos[0]["frames"], made.videos[0]["level"]

    asked = [(0, 1), (0, 900), (2, 1), (2, 900)]
    for_one_server = {frames({}, *one) for one in asked}
    assert len(for_one_server) > 1
    roles: list[dict[str, bool]] = [{"do_remote_decode": True}, {"do_remote_prefill": True}]
    assert len({frames(role, *one) for role in roles for one in asked}) == 1


def test_a_video_s_plan_is_worked_out_once(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(*args: Any) -> Any:
        asked.append(args)
        return server_plan(*args)

    for module in (connector, planning):
        monkeypatch.setattr(module, "server_plan", counted)
    front.render("short.mp4", "other.mp4", "short.mp4")
    assert len(asked) == 2


def test_the_processor_is_never_entered_twice_at_once(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(front.renderer.mm_processor)
    inside, most, lock = 0, 0, threading.Lock()

    def watched(original: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            try:
                time.sleep(0.002)
                return original(*args, **kwargs)
            finally:
                with lock:
                    inside -= 1

        return method

    for name in ("video_tokens", "_cached_apply_hf_processor"):
        monkeypatch.setattr(kind, name, watched(getattr(kind, name)))

    async def together() -> None:
        names = ["short.mp4", "other.mp4", "long.mp4"] * 4
        await asyncio.gather(*(front.rendered(front.messages(name)) for name in names))

    asyncio.run(together())
    assert most == 1


def test_decisions_of_one_cache_salt_do_not_stand_for_another(front: Front) -> None:
    options = {"fps": 4, "max_frames": 400}
    crowded = {"max_tokens": 900, "text": "word " * 150}
    asked: dict[str, Any] = {"options": options, "session": "salted"}
    first = front.render("long.mp4", cache_salt="a", **asked, **crowded)
    again = front.render("long.mp4", cache_salt="a", **asked, max_tokens=16)
    other = front.render("long.mp4", cache_salt="b", **asked, max_tokens=16)
    assert first.video_tokens == again.video_tokens < other.video_tokens


def test_a_video_sent_again_in_a_later_turn_keeps_its_plan_and_its_caches(front: Front) -> None:
    once = front.render("other.mp4", session="again")
    twice = front.render("other.mp4", "other.mp4", session="again")
    assert twice.video_tokens == 2 * once.video_tokens
    for video in twice.videos:
        assert (video["times"], video["lowered"]) == (once.videos[0]["times"], [])
        assert video["decoded_cache"]


def test_a_long_video_is_fitted_into_the_context(front: Front) -> None:
    made = front.render("long.mp4", options={"fps": 4, "max_frames": 400}, max_tokens=100)
    assert made.prompt_tokens + 100 <= CONTEXT
    assert {entry["why"] for entry in made.videos[0]["lowered"]} == {"context"}


def test_text_and_the_answer_leave_less_for_videos(front: Front) -> None:
    options = {"fps": 4, "max_frames": 400}
    free = front.render("long.mp4", options=options, session="a", max_tokens=16)
    crowded = front.render(
        "long.mp4", options=options, session="b", max_tokens=900, text="word " * 150
    )
    assert crowded.prompt_tokens + 900 <= CONTEXT
    assert crowded.video_tokens < free.video_tokens


def test_text_that_pydantic_gives_once_only_takes_its_room_and_is_rendered(front: Front) -> None:
    """An answer of before, with the call of a function in OpenAI's deprecated form."""
    said = {
        "role": "assistant",
        "content": [{"type": "text", "text": "word " * 150}],
        "function_call": {"name": "look", "arguments": "{}"},
    }
    options = {"fps": 4, "max_frames": 400}
    asked = front.messages("long.mp4")
    free = front.render_messages(asked, options, "once a", max_tokens=900)
    crowded = front.render_messages([said, *asked], options, "once b", max_tokens=900)
    assert crowded.prompt_tokens + 900 <= CONTEXT
    assert crowded.video_tokens < free.video_tokens
    assert crowded.prompt_tokens - crowded.video_tokens > 150

    # Planning does not depend on the marking of placeholders, which reads the same contents.
    async def planned() -> Any:
        request = ChatCompletionRequest(model="m", messages=[said, *asked])
        enter_request(RequestContext())
        config = front.renderer.model_config
        parameters = request.build_chat_params(None, "auto"), request.build_tok_params(config)
        await planning.plan(front.renderer, request.messages, *parameters, {})
        return request.messages[0]["content"]

    assert asyncio.run(planned()) == said["content"]


def test_a_route_that_renders_no_chat_asks_for_no_media_bytes_while_it_generates(
    front: Front,
) -> None:
    url = front.messages("short.mp4")[0]["content"][0]["video_url"]["url"]

    async def generate() -> None:
        # As `/inference/v1/generate` does.
        context = enter_request(RequestContext())
        tracker = AsyncMultiModalItemTracker(front.renderer.model_config)
        tracker.create_parser().parse_video(url, None)
        data, _ = await tracker.resolve_items()
        budget = runtime_of(front.renderer).budget
        assert len(budget._live) == 1
        ids = front.renderer.get_tokenizer().encode("<|vision_start|><|video_pad|><|vision_end|>")
        await front.renderer.render_cmpl_async(
            [{"prompt_token_ids": ids, "multi_modal_data": data}]
        )
        assert len(budget._live) == 0
        assert context.trace.tokens["video"] > 0

    current_runtime().frontend.cache.clear()
    asyncio.run(generate())


def test_a_video_that_is_sampled_otherwise_takes_over_no_decision(front: Front) -> None:
    asked: dict[str, Any] = {"session": "sampled", "media_io_kwargs": {"video": {"num_frames": 2}}}
    assert front.render("other.mp4", **asked).videos[0]["frames"] == 2
    (plain,) = front.render("other.mp4", session="sampled").videos
    assert (plain["frames"], plain["lowered"]) == (12, [])


@pytest.mark.parametrize("session", [None, "short"])
def test_long_text_beside_a_video_takes_nothing_from_it_in_other_sessions(
    front: Front, session: str | None
) -> None:
    options = {"fps": 4, "max_frames": 401}
    crowded = front.render(
        "long.mp4", options=options, session="long", max_tokens=900, text="word " * 150
    )
    free = front.render("long.mp4", options=options, session=session, max_tokens=16)
    assert free.video_tokens > crowded.video_tokens


def test_a_follow_up_keeps_its_plan(front: Front) -> None:
    options = {"total_tokens": 150}
    first = front.render("other.mp4", options=options, session="s")
    second = front.render("other.mp4", options=options, session="s", text="And then? " * 5)
    assert second.videos[0]["times"] == first.videos[0]["times"]
    assert second.videos[0]["size"] == first.videos[0]["size"]
    assert second.videos[0]["decoded_cache"]
    (item,) = {item.preprocessed for item in second.trace.items}
    assert item, "every segment's inputs were cached"


def test_what_cannot_fit_is_refused_before_decoding(front: Front) -> None:
    before = current_runtime().frontend.stats()["decoded_cache"]
    options = {"total_tokens": 4, "floor": {"frames": 5}, "fps": 3}
    with pytest.raises(VLLMValidationError, match="token"):
        front.render("other.mp4", options=options)
    assert current_runtime().frontend.stats()["decoded_cache"] == before


def test_a_bound_of_the_server_is_named(front: Front) -> None:
    with pytest.raises(VLLMValidationError, match=r"mm_ext\.max_frames.*4000.*768"):
        front.render("short.mp4", options={"max_frames": 4000})


@pytest.mark.parametrize(
    ("name", "words"),
    [("page.mp4", "media"), ("tone.wav", "video"), ("missing.mp4", "does not exist")],
)
def test_bad_media_is_refused_as_without_planning(front: Front, name: str, words: str) -> None:
    with pytest.raises(VLLMUnprocessableEntityError, match=words):
        front.render(name)


def test_a_request_chooses_the_video_stream(front: Front) -> None:
    assert front.render("short.mp4", options={"video_stream": 0}).videos[0]["frames"]
    with pytest.raises(VLLMUnprocessableEntityError, match="no video stream 1: it has 1"):
        front.render("short.mp4", options={"video_stream": 1})


def test_too_many_videos_are_refused_before_any_is_fetched(front: Front) -> None:
    before = current_runtime().stats()
    with pytest.raises(VLLMValidationError, match="At most 3 video"):
        front.render(*["missing.mp4"] * 4)
    assert current_runtime().stats() == before


def test_options_where_a_stock_loader_is_in_charge_are_refused(front: Front) -> None:
    data = [{"role": "user", "content": [{"video_url": "data:video/jpeg;base64,AAAA"}]}]
    with pytest.raises(VLLMValidationError, match="takes no mm_ext options"):
        front.render_messages(data, {"fps": 1})


@pytest.mark.parametrize("extra", [[], ["other.mp4"]])
def test_options_for_a_video_named_by_its_uuid_alone_are_refused(
    front: Front, extra: list[str]
) -> None:
    messages = front.messages("short.mp4", *extra)
    part = messages[0]["content"][0]
    part["uuid"] = "clip"
    named = front.render_messages(messages)
    part["video_url"] = None
    assert front.render_messages(messages).prompt_tokens == named.prompt_tokens
    for options in ({"reduction": {"pool": 2}}, {"max_frames": 2}, {"total_tokens": 40}):
        with pytest.raises(VLLMValidationError, match=r"mm_ext options.*uuid alone"):
            front.render_messages(messages, options)


def test_text_alone_is_neither_planned_nor_reported(front: Front) -> None:
    trace = front.render().trace
    assert not trace.media
    assert not report.has_media(trace)


def test_offline_conversations_are_planned_one_by_one(front: Front) -> None:
    request = ChatCompletionRequest(model="m", messages=front.messages("short.mp4"))
    params = request.build_chat_params(None, "auto")
    lists = [front.messages("short.mp4"), front.messages("other.mp4"), front.messages()]
    conversations, prompts = front.renderer.render_chat(lists, params)
    assert len(conversations) == len(prompts) == 3
    alone = [front.renderer.render_chat([one], params)[1][0] for one in lists]
    ids = [prompt["prompt_token_ids"] for prompt in prompts]
    assert ids == [prompt["prompt_token_ids"] for prompt in alone]


def test_tokenize_counts_what_a_completion_without_a_block_would_take(front: Front) -> None:
    made = TokenizeChatRequest(messages=front.messages("long.mp4"))

    async def counted() -> int:
        _, (prompt,) = await front.renderer.render_chat_async(
            [made.messages],
            made.build_chat_params(None, "auto"),
            made.build_tok_params(front.renderer.model_config),
        )
        return len(prompt["prompt_token_ids"])

    answered = front.render("long.mp4", session="its own")
    assert asyncio.run(counted()) == answered.prompt_tokens


def test_routes_that_only_render_take_no_options(front: Front) -> None:
    block = {"messages": front.messages("short.mp4"), "mm_ext": {"fps": 1}}
    made = ServingTokenization.create_tokenize(Any, TokenizeChatRequest(**block), None)
    with pytest.raises(VLLMValidationError, match="/tokenize takes no mm_ext"):
        asyncio.run(made)
    request = ChatCompletionRequest(model="m", **block)
    with pytest.raises(VLLMValidationError, match="/render takes no mm_ext"):
        asyncio.run(ServingRender.render_chat_request(Any, request))


def test_a_request_arrives_before_it_is_planned(front: Front) -> None:
    with Origin() as origin:
        clip = (front.files / "short.mp4").read_bytes()
        url = origin.serve("/slow.mp4", Resource(clip, delay_s=0.3))
        messages = front.messages("short.mp4")
        messages[0]["content"][0]["video_url"]["url"] = url
        made = front.render_messages(messages)
    assert time.time() - made.arrived >= 0.3


@pytest.mark.parametrize("together", [True, False], ids=["one request", "several"])
def test_what_is_refused_fetches_nothing_more(front: Front, together: bool) -> None:
    hold = threading.Event()
    with Origin() as origin:
        clip = (front.files / "short.mp4").read_bytes() + b"\0" * (1 << 20)
        good = origin.serve("/held.mp4", Resource(clip, hold=hold))
        urls = (good, origin.url("/none.mp4"))
        contents: list[list[Any]] = [
            [{"type": "video_url", "video_url": {"url": url}}] for url in urls
        ]
        if together:
            contents = [[*contents[0], *contents[1]]]
        lists = [[{"role": "user", "content": content}] for content in contents]
        params = ChatCompletionRequest(model="m", messages=lists[0]).build_chat_params(None, "auto")

        async def run() -> None:
            frontend = current_runtime().loop.loop
            before = asyncio.all_tasks(frontend)
            with pytest.raises(VLLMUnprocessableEntityError, match="404"):
                await front.renderer.render_chat_async(lists, params)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            async with asyncio.timeout(5):
                while asyncio.all_tasks(frontend) - before:
                    await asyncio.sleep(0.01)

        try:
            asyncio.run(run())
        finally:
            hold.set()


def test_a_request_leaves_nothing_behind_in_the_context(front: Front) -> None:
    front.render("short.mp4", options={"fps": 1})
    assert current_request() is None
    (video,) = front.render("short.mp4").videos
    assert video["frames"] == 8


@pytest.mark.parametrize("reduction", [Reduction(), Reduction(pool=2), Reduction(temporal=2)])
def test_a_plan_costs_what_it_was_said_to_cost(front: Front, reduction: Reduction) -> None:
    runtime = current_runtime()
    url = (front.files / "other.mp4").as_uri()
    fetcher = runtime.fetcher(front.files.resolve(), ())

    async def probed() -> PlannedVideo:
        ref = await fetcher.resolve(url, timeout_s=5)
        info = await runtime.frontend.probe(ref)
        assert info.video is not None
        plan = server_plan(runtime, {}, url, None)
        assert plan is not None
        return PlannedVideo(url, 1, ref, info, info.video, plan)

    video = runtime.run_blocking(probed())
    frontend = runtime.frontend
    processor = front.renderer.mm_processor
    costs = FrontendCosts([video], processor, frontend.traits, frontend.limits)
    assert costs.knows_tokens
    for fps, cap in ((1.0, 0), (2.0, 112**2)):
        options = {
            "fps": fps,
            "reduction": reduction.model_dump(),
            "resolution": 112 if cap else None,
        }
        made = front.render("other.mp4", options=options)
        frames = costs.frames(0, fps, 2, 64)
        assert frames == made.videos[0]["frames"]
        assert costs.tokens(0, frames, cap, reduction) == made.video_tokens
