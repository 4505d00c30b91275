"""Planning with vLLM's own renderer: what is asked, what fits, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import renderer_from_config

from vllm_mm_ext import plugin
from vllm_mm_ext.media.connector import server_job
from vllm_mm_ext.media.plan import set_plans
from vllm_mm_ext.options import Reduction
from vllm_mm_ext.runtime import current_runtime
from vllm_mm_ext.serving import answers, report
from vllm_mm_ext.serving.costs import FrontendCosts, PlannedVideo
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_audio, make_clip
from vllm_mm_ext.trace import RequestTrace, current_trace, open_trace

CONTEXT = 2048


@dataclass(frozen=True)
class Rendered:
    """A rendered request: its prompt's length and what was recorded on the way."""

    prompt_tokens: int
    trace: RequestTrace

    @property
    def videos(self) -> list[dict[str, Any]]:
        """As reported to the client."""
        found: list[dict[str, Any]] = report.block(self.trace)["videos"]
        return found

    @property
    def video_tokens(self) -> int:
        """All embeddings of videos."""
        return self.trace.tokens["video"]


@dataclass(frozen=True)
class Front:
    """vLLM's renderer with the plugin, as an API server has it."""

    renderer: Any
    files: Path

    def messages(self, *names: str, text: str = "What is this?") -> list[Any]:
        parts = [
            {"type": "video_url", "video_url": {"url": (self.files / name).as_uri()}}
            for name in names
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    def render(
        self,
        *names: str,
        options: dict[str, Any] | None = None,
        session: str | None = None,
        text: str = "What is this?",
        **more: Any,
    ) -> Rendered:
        request = ChatCompletionRequest(
            model="m", messages=self.messages(*names, text=text), **more
        )

        async def run() -> Rendered:
            trace = open_trace()
            answers.begin(options, session)
            _, (made,) = await self.renderer.render_chat_async(
                [request.messages],
                request.build_chat_params(None, "auto"),
                request.build_tok_params(self.renderer.model_config),
            )
            return Rendered(len(made["prompt_token_ids"]), trace)

        return asyncio.run(run())


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    plugin.register()
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "short.mp4", duration=4, seed=1)
    make_clip(files / "other.mp4", duration=6, scene="pan", seed=2)
    make_clip(files / "long.mp4", width=320, height=240, fps=4, duration=100, seed=3)
    make_audio(files / "tone.wav", duration=1.0)
    (files / "page.mp4").write_text("<!doctype html>")
    config = {"media": {"sampling": {"fps": 2.0, "max_frames": 64, "min_frames": 2}}}
    args = EngineArgs(
        model=str(checkpoint("qwen2_5_vl")),
        max_model_len=CONTEXT,
        allowed_local_media_path=str(files),
        limit_mm_per_prompt={"video": 3},
        additional_config={"mm_ext": config},
    )
    renderer = renderer_from_config(args.create_engine_config())
    yield Front(renderer, files)
    renderer.shutdown()


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
    with pytest.raises(VLLMValidationError, match=words):
        front.render(name)


def test_too_many_videos_are_refused_before_any_is_fetched(front: Front) -> None:
    before = current_runtime().stats()
    with pytest.raises(VLLMValidationError, match="At most 3 video"):
        front.render(*["missing.mp4"] * 4)
    assert current_runtime().stats() == before


def test_options_where_a_stock_loader_is_in_charge_are_refused(front: Front) -> None:
    data = [{"role": "user", "content": [{"video_url": "data:video/jpeg;base64,AAAA"}]}]
    request = ChatCompletionRequest(model="m", messages=data)

    async def run() -> None:
        answers.begin({"fps": 1}, None)
        await front.renderer.render_chat_async(
            [request.messages], request.build_chat_params(None, "auto")
        )

    with pytest.raises(VLLMValidationError, match="takes no mm_ext options"):
        asyncio.run(run())


def test_text_alone_is_neither_planned_nor_reported(front: Front) -> None:
    trace = front.render().trace
    assert not trace.plans
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


def test_a_request_leaves_nothing_behind_in_the_context(front: Front) -> None:
    set_plans({})
    front.render("short.mp4", options={"fps": 1})
    assert current_trace() is None
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
        job = server_job(runtime, {}, url, None)
        assert job is not None
        return PlannedVideo(url, 1, ref, info, info.video, job.plan)

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
