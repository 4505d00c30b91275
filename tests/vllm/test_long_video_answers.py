"""Requests about long videos, from the client's request to the one that is answered in the end.

All but the engine is real: prompts are rendered, and get a note that is made up.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from front import CONTEXT, Front, chat_route, opened
from PIL import Image
from prometheus_client import REGISTRY
from starlette.requests import Request
from vllm import connections
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError

from vllm_mm_ext.adapters import rendering_wrappers
from vllm_mm_ext.adapters.long_video import long_chat
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.encoder_asks import EncoderAsks
from vllm_mm_ext.adapters.sight.recorder import Recorder
from vllm_mm_ext.base.engine_figures import EngineBoard
from vllm_mm_ext.base.shared_state import Decision, SharedState, private_state
from vllm_mm_ext.config.long_video_settings import LongVideoOptions, Strategy
from vllm_mm_ext.config.options import RequestOptions
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.request.context import EncodeJob, RequestContext, enter_request
from vllm_mm_ext.request.long_report import LongVideoReport
from vllm_mm_ext.sight.prometheus import process_metrics
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.origin import Origin, Resource

WINDOWS = 5


class Chat:
    """vLLM's handler of chat completions for a renderer, with an engine that writes one note.

    Attributes:
        sent: The requests that came to the engine.
        ranks: The data-parallel rank that each of them names.
        ids: The id that the HTTP request of each of them names.
        weights: Version of the engine's weights.
        freed: Ids of the requests whose KV another server was told to give up.
    """

    def __init__(self, front: Front) -> None:
        config = front.renderer.config
        self.files = front.files
        self.sent: list[ChatCompletionRequest] = []
        self.ranks: list[int | None] = []
        self.ids: list[str | None] = []
        self.weights = "default"
        self.freed: list[str] = []

        async def notify(request_id: str, *_: Any, **__: Any) -> None:
            self.freed.append(request_id)

        engine: Any = SimpleNamespace(
            vllm_config=config,
            model_config=config.model_config,
            renderer=front.renderer,
            input_processor=None,
            get_weight_version=self.get_weight_version,
            is_paused=self.is_paused,
            notify_kv_transfer_request_rejected=notify,
            errored=False,
            check_admission=lambda _: None,
        )
        self.serving = chat_route(engine)

    async def is_paused(self) -> bool:
        return False

    async def get_weight_version(self) -> str:
        return self.weights

    async def create(
        self, serving: OpenAIServingChat, request: Any, raw_request: Any = None
    ) -> ChatCompletionResponse:
        self.sent.append(request)
        self.ranks.append(serving._get_data_parallel_rank(raw_request))
        self.ids.append(None if raw_request is None else raw_request.headers.get("X-Request-Id"))
        _, (prompt,) = await serving.online_renderer.render_chat(request)
        tokens = serving._extract_prompt_len(prompt)
        assert tokens + request.max_completion_tokens <= CONTEXT
        message = ChatMessage(role="assistant", content="[0:01] a red door")
        return ChatCompletionResponse(
            model="m",
            choices=[ChatCompletionResponseChoice(index=0, message=message)],
            usage=UsageInfo(prompt_tokens=tokens, completion_tokens=9, total_tokens=tokens + 9),
        )

    @property
    def decode_jobs(self) -> int:
        """Jobs of decode workers so far."""
        return runtime_of(self.serving.renderer).frontend.pool.stats()["jobs"]

    async def ask(
        self,
        *messages: Any,
        fps: float | None = None,
        url: str | None = None,
        strategy: Strategy = "map_reduce",
        elsewhere: EncodeJob | None = None,
        raw: Request | None = None,
        **more: Any,
    ) -> Any:
        """The answer to the messages and a question about a clip in windows."""
        url = url or (self.files / "clip.mp4").as_uri()
        video = {"type": "video_url", "video_url": {"url": url}}
        text = {"type": "text", "text": "What happens?"}
        windows = LongVideoOptions(strategy=strategy, window_s=4, overlap_s=0, fps=fps)
        options = RequestOptions(long_video=windows)
        session = more.get("session_id")
        enter_request(RequestContext(options, session=session, elsewhere=elsewhere))
        request = ChatCompletionRequest(
            model="m",
            messages=[*messages, {"role": "user", "content": [video, text]}],
            **{"max_completion_tokens": 64} | more,
        )
        return await long_chat.answer(self.serving, request, raw, self.create)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    files = tmp_path_factory.mktemp("front")
    make_clip(files / "clip.mp4", width=64, height=48, fps=4, duration=18, seed=1)
    Image.new("RGB", (1000, 1000), (200, 0, 0)).save(files / "large.png")
    with opened(files) as made:
        yield made


@pytest.fixture
def chat(front: Front) -> Chat:
    return Chat(front)


async def test_images_that_leave_no_room_for_notes_are_refused_before_windows_are_looked_at(
    chat: Chat,
) -> None:
    url = (chat.files / "large.png").as_uri()
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    assert (await chat.ask(image)).choices
    of_window, final = chat.sent[0], chat.sent[-1]
    assert "red door" in str(final.messages[-1])
    assert "image_url" in str(final.messages)
    assert "image_url" not in str(of_window.messages)
    await chat.ask(max_completion_tokens=1450)
    asked = len(chat.sent)
    with pytest.raises(VLLMValidationError, match="room for"):
        await chat.ask(image, max_completion_tokens=1450)
    assert len(chat.sent) == asked


async def test_notes_of_other_weights_are_not_used(chat: Chat) -> None:
    rendering_wrappers.after_clearing(long_chat.forget_notes)

    async def asked() -> int:
        del chat.sent[:]
        await chat.ask(cache_salt="weights")
        return len(chat.sent)

    assert await asked() == WINDOWS + 1
    assert await asked() == 1
    # What vLLM does in the API server that is told of new weights.
    await chat.serving.renderer.clear_mm_cache_async()
    assert await asked() == WINDOWS + 1
    # Another one hears of their version alone.
    chat.weights = "next"
    assert await asked() == WINDOWS + 1


@pytest.mark.parametrize(("strategy", "asked"), [("map_reduce", False), ("single", True)])
async def test_an_encoder_is_asked_for_what_one_prompt_shows_and_for_no_windows(
    chat: Chat, strategy: Strategy, asked: bool
) -> None:
    url = (chat.files / "large.png").as_uri()
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    # Nobody listens there.
    encoders = EncoderAsks(["http://127.0.0.1:9"], {}, wait_s=1.0)
    job = encoders.job({"messages": [image]}, b"", {}, None)
    assert (await chat.ask(image, strategy=strategy, elsewhere=job)).choices
    assert job is not None
    assert (job.name is not None) == asked
    job.end()


@pytest.mark.parametrize(
    "block",
    [
        {"fps": "x"},
        {"long_video": {"strategy": "search"}},
        {"long_video": {"strategy": "single"}},
        None,
    ],
    ids=["wrong options", "windows", "a video to survey", "a video"],
)
async def test_kv_is_given_up_once_where_a_request_for_it_is_refused(
    chat: Chat, block: dict[str, Any] | None
) -> None:
    chat.serving.has_kv_connector = True
    video = {"type": "video_url", "video_url": {"url": (chat.files / "missing.mp4").as_uri()}}
    request = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": [video]}],
        kv_transfer_params={"do_remote_prefill": True},
        mm_ext=block,
    )
    enter_request(RequestContext())
    with pytest.raises((VLLMUnprocessableEntityError, VLLMValidationError)):
        await chat.serving.create_chat_completion(request)
    assert chat.freed == [request.request_id]


async def test_notes_are_not_shared_while_engines_disagree_about_their_weights(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def disagree() -> str:
        raise RuntimeError("Engines returned different get_weight_version results")

    monkeypatch.setattr(chat.serving.engine_client, "get_weight_version", disagree)
    for asked in (1, 2):
        assert (await chat.ask(cache_salt="disagree")).choices
        shown = sum("video_url" in str(request.messages) for request in chat.sent)
        assert shown == asked * WINDOWS


async def test_a_turn_that_pydantic_gives_once_only_is_part_of_the_answer(chat: Chat) -> None:
    said = {
        "role": "assistant",
        "content": [{"type": "text", "text": "I see a blue car."}],
        "function_call": {"name": "look", "arguments": "{}"},
    }
    assert (await chat.ask(said)).choices
    assert chat.sent[-1].messages[0]["content"] == said["content"]


async def test_windows_leave_no_decisions_where_those_of_conversations_are_kept(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: set[bytes] = set()

    def keep(self: SharedState, key: bytes, decision: Decision) -> None:
        del self, decision
        kept.add(key)

    monkeypatch.setattr(SharedState, "keep", keep)
    await chat.ask(session_id="talk", cache_salt="sticky")
    assert sum("video_url" in str(request.messages) for request in chat.sent) == WINDOWS
    assert not kept


async def test_a_window_is_shown_at_the_load_tier_at_which_its_digest_was_made(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chat.ask()  # The clip is probed.
    before = chat.decode_jobs
    # The service's tier is another one each time that it is asked.
    tiers = itertools.cycle((1, 0, 2))
    monkeypatch.setattr(QualityController, "level", lambda _: next(tiers))
    assert (await chat.ask(fps=4.0)).choices
    assert chat.decode_jobs - before == WINDOWS


@pytest.mark.skipif(
    not hasattr(connections, "MediaRequestDownloadBudget"),
    reason="this vLLM has no budget for a request's downloads",
)
async def test_a_request_pays_once_for_its_long_video_however_many_windows_are_looked_at(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = (chat.files / "clip.mp4").read_bytes()
    monkeypatch.setenv("VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB", "1")
    with Origin() as origin:
        # A player ignores what follows a file's last box.
        large, too_large = (
            origin.serve(f"/{size}.mp4", Resource(clip + bytes(size - len(clip))))
            for size in (900_000, 1_100_000)
        )
        assert (await chat.ask(url=large, cache_salt="pays once")).choices
        assert sum("video_url" in str(request.messages) for request in chat.sent) == WINDOWS
        before, sent = chat.decode_jobs, len(chat.sent)
        with pytest.raises(VLLMUnprocessableEntityError, match="REQUEST_DOWNLOAD_SIZE_MB=1 "):
            await chat.ask(url=too_large)
        # The file is probed, and nothing more.
        assert (chat.decode_jobs, len(chat.sent)) == (before + 1, sent)


async def test_the_bytes_of_a_long_video_are_counted_once_however_many_windows_are_looked_at(
    front: Front, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(process_metrics(), EngineBoard(private_state()), None)
    monkeypatch.setattr(runtime_of(front.renderer), "recorder", recorder)
    of = {"modality": "video", "codec": "h264"}

    def counted(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, of | labels) or 0.0

    def items() -> float:
        return sum(counted("mm_ext_media_items_total", source=s) for s in ("decoder", "cache"))

    # No notes are kept by this name.
    chat.weights = "counted"
    before, num_bytes = items(), counted("mm_ext_media_bytes_total")
    assert (await chat.ask()).choices
    assert items() - before == WINDOWS
    size = (front.files / "clip.mp4").stat().st_size
    assert counted("mm_ext_media_bytes_total") - num_bytes == size


async def test_windows_are_looked_at_where_the_client_wants_to_be_answered(chat: Chat) -> None:
    headers = [(b"x-data-parallel-rank", b"1"), (b"x-request-id", b"own")]
    raw = Request({"type": "http", "headers": headers})
    assert (await chat.ask(raw=raw, cache_salt="no notes yet")).choices
    assert chat.ranks == [1] * (WINDOWS + 1)
    assert chat.ids == [None] * WINDOWS + ["own"], "each prompt has an id of its own"


async def test_the_cost_of_all_windows_is_summed_once_for_a_streamed_answer(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = 0
    create, cost = chat.create, LongVideoReport.cost.fget
    assert cost is not None

    def counted(self: LongVideoReport) -> Any:
        nonlocal sums
        sums += 1
        return cost(self)

    async def chunks() -> AsyncIterator[str]:
        for _ in range(100):
            yield 'data: {"created":1,"choices":[]}\n\n'

    async def answered(serving: Any, request: Any, raw_request: Any = None) -> Any:
        return chunks() if request.stream else await create(serving, request, raw_request)

    monkeypatch.setattr(LongVideoReport, "cost", property(counted))
    monkeypatch.setattr(chat, "create", answered)
    events = [event async for event in await chat.ask(stream=True)]
    assert len(events) > 100
    assert sums == 1
