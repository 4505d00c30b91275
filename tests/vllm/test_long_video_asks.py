"""Prompts about windows as vLLM's requests, and what its answers to them say."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionLogProb,
    ChatCompletionLogProbs,
    ChatCompletionLogProbsContent,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
)
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.exceptions import RetryableRequestError
from vllm.lora.request import LoRARequest

from vllm_mm_ext.adapters.long_video import engine_model
from vllm_mm_ext.adapters.long_video.ask_requests import (
    chances,
    first_tokens,
    options_for,
    request_for,
    restrict,
)
from vllm_mm_ext.adapters.long_video.chat_chunks import Head, joined, with_cost, without_text
from vllm_mm_ext.adapters.long_video.engine_model import EngineModel
from vllm_mm_ext.adapters.long_video.state import Shown
from vllm_mm_ext.adapters.long_video.survey import Survey
from vllm_mm_ext.config.options import Reduction, RequestOptions, TrainedReductions
from vllm_mm_ext.config.quality_settings import BoundSettings
from vllm_mm_ext.config.report_settings import ReportsConfig
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.long_video.asking import Ask, AskFailedError, Cost, Look, Window
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.policies.quality.videos import ContextUse
from vllm_mm_ext.request.context import RequestContext
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import chatml_template, make_tokenizer

WINDOW = Window(0, 3, 84.0, 114.0)
CLIENT = ChatCompletionRequest(
    model="adapter",
    messages=[{"role": "user", "content": "When?"}],
    temperature=0.9,
    n=3,
    seed=7,
    max_tokens=50,
    stop=["."],
    cache_salt="salt",
    chat_template_kwargs={"language": "de"},
    reasoning_effort="none",
)
CHOICES = {"yes": [1, 2], "no": [3]}


def logprobs(written: int, others: dict[int, float]) -> ChatCompletionLogProbsContent:
    return ChatCompletionLogProbsContent(
        token=f"token_id:{written}",
        logprob=others[written],
        top_logprobs=[
            ChatCompletionLogProb(token=f"token_id:{token}", logprob=value)
            for token, value in others.items()
        ],
    )


def test_a_prompt_is_sent_for_the_clients_model_and_salt_but_greedily() -> None:
    ask = Ask(WINDOW, Look("note"), ("Before.", "Note."), max_tokens=20)
    made = request_for(ask, CLIENT, "file:///a.mp4", session="s", priority=10)
    assert (made.model, made.cache_salt, made.session_id) == ("adapter", "salt", "s")
    assert made.chat_template_kwargs == {"language": "de"}
    assert made.reasoning_effort == "none", "else a model thinks where it was told not to"
    assert (made.n, made.temperature, made.stop, made.max_completion_tokens) == (1, 0.0, [], 20)
    assert made.priority == 10
    (message,) = made.messages
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["video_url", "text", "text"]


def model_of(
    salt: str | None,
    reports: ReportsConfig,
    *,
    storable: bool = True,
    shown_at: int = 0,
    age_s: float = 0.0,
) -> EngineModel:
    """A model that knows the digest of ``WINDOW``.

    Args:
        salt: The client's.
        reports: What clients are told.
        storable: As of the video's content.
        shown_at: The load tier at which the window was shown to an earlier request.
        age_s: Seconds since then.
    """
    config = MMExtConfig(reports=reports)
    windows: ByteBudgetCache[str, Shown] = ByteBudgetCache(9, lambda _: 1)
    content: Any = SimpleNamespace(digest="file", storable=storable)
    serving = SimpleNamespace(
        renderer=None,
        model_config=SimpleNamespace(mm_ext_settings=config, max_model_len=9, max_logprobs=20),
        engine_client=SimpleNamespace(is_paused=AsyncMock(return_value=False)),
    )
    model = EngineModel(
        serving,
        AsyncMock(),
        CLIENT.model_copy(update={"cache_salt": salt}),
        RequestContext(),
        Survey(
            ("file:///a.mp4",) * 4,
            (content,) * 4,
            (200.0,) * 4,
            ("h264",) * 4,
            fits=False,
            context_use=ContextUse(99, 0, 0),
        ),
        windows=windows,
        weights="default",
        session=None,
        priority=0,
    )
    windows.put(
        model._place(WINDOW, Look("note"), "file"),
        Shown("digest", shown_at, time.monotonic() - age_s),
    )
    return model


@pytest.mark.parametrize(
    ("salt", "cache_hits", "expected"),
    [(None, False, None), ("salt", False, "digest"), (None, True, "digest")],
)
async def test_notes_that_others_may_have_asked_for_change_no_answer_unless_hits_are_told(
    salt: str | None, cache_hits: bool, expected: str | None
) -> None:
    model = model_of(salt, ReportsConfig(cache_hits=cache_hits))
    assert model.known_window_key(WINDOW, Look("note")) == expected
    assert await model.window_key(WINDOW, Look("note")) == "digest", "not decoded again"


@pytest.mark.parametrize(
    ("shown_at", "age_s", "is_known"), [(0, 1e6, True), (2, 60.0, True), (2, 1900.0, False)]
)
async def test_a_window_is_shown_as_its_digest_was_made_but_not_for_ever_as_under_load(
    shown_at: int, age_s: float, is_known: bool
) -> None:
    model = model_of("salt", ReportsConfig(), shown_at=shown_at, age_s=age_s)
    assert model.known_window_key(WINDOW, Look("note")) == ("digest" if is_known else None)
    assert model._enter(WINDOW, Look("note")).levels == ((shown_at,) if is_known else None)
    assert model._enter(WINDOW, Look("close")).levels is None


async def test_a_window_that_meets_a_busy_front_end_is_decoded_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, look = model_of("salt", ReportsConfig()), Look("close", fps=1.0)
    busy = BusyError("no room")
    monkeypatch.setattr(model, "_digest", AsyncMock(side_effect=[busy, "digest", busy, busy]))
    monkeypatch.setattr(engine_model, "_BUSY_PAUSE_S", 0.0)
    assert await model.window_key(WINDOW, look) == "digest"
    with pytest.raises(AskFailedError, match="no room"):
        await model.window_key(WINDOW, look)


def answered(
    text: str, reason: str = "stop", tokens: list[ChatCompletionLogProbsContent] | None = None
) -> ChatCompletionResponse:
    choice = ChatCompletionResponseChoice(
        index=0,
        message=ChatMessage(role="assistant", content=text),
        finish_reason=reason,
        logprobs=None if tokens is None else ChatCompletionLogProbs(content=tokens),
    )
    return ChatCompletionResponse(model="adapter", choices=[choice], usage=UsageInfo())


async def test_a_prompt_that_the_engine_gives_up_is_sent_again_and_is_no_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_model, "_BUSY_PAUSE_S", 0.0)
    monkeypatch.setattr(engine_model, "first_tokens", lambda *_: CHOICES)
    model, aborted = model_of("salt", ReportsConfig()), answered("", "abort")
    model._renderer = SimpleNamespace(get_tokenizer=lambda: None)
    monkeypatch.setattr(model, "_enter", lambda *_: RequestContext())
    note = Ask(WINDOW, Look("note"), ("Note.",), max_tokens=20)
    chosen = answered("yes", "length", [logprobs(1, {1: -0.1, 3: -3.0})])
    choice = Ask(WINDOW, Look("coarse"), ("Is it?",), max_tokens=1, choices=("yes", "no"))
    for ask, whole in ((note, answered("[1] a man")), (choice, chosen)):
        model._create = AsyncMock(side_effect=[aborted, whole, aborted, aborted])
        assert (await model.ask(ask)).text in ("[1] a man", "")
        with pytest.raises(AskFailedError, match="Send it again"):
            await model.ask(ask)
    assert model.first_error.error.code == 503
    # However the engine came to end a choice without a token.
    model._create = AsyncMock(side_effect=[answered("", tokens=[]), chosen])
    assert (await model.ask(choice)).chances["yes"] > 0.9


@pytest.mark.parametrize("polls", [1, 5])
async def test_a_pause_of_the_engine_uses_up_no_attempt(
    polls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 refuses prompts meanwhile."""
    monkeypatch.setattr(engine_model, "_BUSY_PAUSE_S", 0.0)
    model = model_of("salt", ReportsConfig())
    monkeypatch.setattr(model, "_enter", lambda *_: RequestContext())
    refused = create_error_response(RetryableRequestError("Generation is paused."))
    model._create = AsyncMock(side_effect=[refused, refused, refused, answered("[1] a man")])
    # Paused again as soon as it went on, and busy after that.
    paused = [*[True] * polls, False, True, False, False]
    model._serving.engine_client = SimpleNamespace(is_paused=AsyncMock(side_effect=paused))
    ask = Ask(WINDOW, Look("note"), ("Note.",), max_tokens=20)
    assert (await model.ask(ask)).text == "[1] a man"
    assert model.first_error is None


async def test_a_prompt_that_meets_an_engine_which_shuts_down_ends_as_one_to_be_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_model, "_BUSY_PAUSE_S", 0.0)
    model = model_of("salt", ReportsConfig())
    monkeypatch.setattr(model, "_enter", lambda *_: RequestContext())
    refused = create_error_response(RetryableRequestError("The server shuts down."))
    model._create = AsyncMock(return_value=refused)
    # As vLLM's client of engines says it.
    gone = AsyncMock(side_effect=Exception("The engine is shutting down."))
    model._serving.engine_client = SimpleNamespace(is_paused=gone)
    with pytest.raises(AskFailedError, match="shuts down"):
        await model.ask(Ask(WINDOW, Look("note"), ("Note.",), max_tokens=20))
    assert model.first_error.error.code == 503
    assert not await model.sat_out_pause()


async def test_a_takedown_finds_the_items_of_a_window_by_the_clients_request() -> None:
    model = model_of("salt", ReportsConfig())
    trace = model._enter(WINDOW, Look("note")).trace
    trace.hashes.add("of the window")
    assert trace is not model._context.trace
    assert model._context.trace.hashes == {"of the window"}


@pytest.mark.parametrize("storable", [True, False])
def test_nothing_is_kept_of_a_video_whose_origin_forbids_it(storable: bool) -> None:
    model = model_of("salt", ReportsConfig(), storable=storable)
    assert model.may_keep(WINDOW) is storable


def test_notes_of_an_adapter_are_not_those_of_another_one_of_the_same_name() -> None:
    model = model_of("salt", ReportsConfig())
    found = []
    for adapter in (
        None,
        LoRARequest("adapter", 1, "/adapters/first"),
        LoRARequest("adapter", 2, "/adapters/first"),
        LoRARequest("adapter", 3, "/adapters/second"),
    ):
        model._serving._maybe_get_adapters = lambda _, adapter=adapter: adapter
        found.append(model.identity)
    assert found[1] == found[2]
    assert len(set(found)) == 3


def test_a_choice_is_one_token_among_those_allowed() -> None:
    ask = Ask(WINDOW, Look("coarse"), ("Is it?",), max_tokens=1, choices=("yes", "no"))
    made = request_for(ask, CLIENT, "file:///a.mp4", session=None, priority=0)
    restrict(made, list(CHOICES.values()), max_logprobs=5)
    params = made.to_sampling_params(1, {})
    assert (params.allowed_token_ids, params.max_tokens, params.logprobs) == ([1, 2, 3], 1, 5)


def test_the_chance_of_a_choice_is_that_of_all_tokens_it_may_begin_with() -> None:
    found = chances(CHOICES, logprobs(1, {1: math.log(0.4), 2: math.log(0.2), 3: math.log(0.2)}))
    assert found == pytest.approx({"yes": 0.75, "no": 0.25})


def test_a_token_that_is_not_reported_is_no_likelier_than_those_that_are() -> None:
    found = chances({"yes": [1], "no": [3]}, logprobs(3, {3: -0.01, 8: -5.0}))
    assert found["yes"] == pytest.approx(math.exp(-4.99) / (1 + math.exp(-4.99)))


@given(st.dictionaries(st.integers(0, 9), st.floats(-9999, 0), min_size=1))
def test_chances_are_of_one_together_whatever_is_reported(others: dict[int, float]) -> None:
    found = chances(CHOICES, logprobs(next(iter(others)), others))
    assert sum(found.values()) == pytest.approx(1)
    assert all(0 <= chance <= 1 for chance in found.values())


def test_choices_that_begin_alike_cannot_be_told_apart() -> None:
    tokenizer = make_tokenizer([], vocab_size=300, named={}, chat_template=chatml_template())
    found = first_tokens(tokenizer, ("yes", "no"))
    assert len({token for ids in found.values() for token in ids}) == 4, "Yes and No as well"
    with pytest.raises(ValueError, match="same token"):
        first_tokens(tokenizer, ("yes", "yet"))


def test_what_a_client_asks_of_whole_videos_does_not_hold_for_windows() -> None:
    client = RequestOptions(min_frames=9, max_frames=10, total_tokens=99, resolution=64, fps=1)
    found = options_for(Look("close", fps=60.0), client, BoundSettings(max_fps=8.0), None)
    assert found == RequestOptions(resolution=64, fps=8.0)


def test_a_coarse_look_has_as_few_tokens_as_the_model_learned() -> None:
    client, bounds = RequestOptions(reduction=Reduction(pool=2)), BoundSettings()
    trained = TrainedReductions(((1, 1), (2, 1), (1, 4), (2, 4)))
    for kind, expected in (("coarse", Reduction(pool=2, temporal=4)), ("note", client.reduction)):
        assert options_for(Look(kind), client, bounds, trained).reduction == expected
        assert options_for(Look(kind), client, bounds, None).reduction == client.reduction


def test_chunks_of_an_answer_get_the_time_and_the_usage_of_the_whole_stream() -> None:
    head = Head("chatcmpl-1", "model", created=5)
    text = 'data: {"id":"chatcmpl-1","created":9,"choices":[{"delta":{"content":"x"}}]}\n\n'
    assert joined(text, head, Cost(10, 4, 1)) == text.replace(":9,", ":5,")
    usage = 'data: {"created":9,"choices":[],"usage":{"prompt_tokens":7,"total_tokens":9,'
    usage += '"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
    made = joined(usage, head, Cost(10, 4, 1))
    assert '"prompt_tokens":17,"total_tokens":20,"completion_tokens":3' in made
    assert '"cached_tokens":5' in made
    assert '"delta":{}' in without_text(head, {})


def test_cached_tokens_are_told_only_where_vllm_tells_them() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    assert "prompt_tokens_details" not in with_cost(usage, Cost(10, 4, 1))
