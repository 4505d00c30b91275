"""What a session tells of its prompts; the engine is a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import TokenizersBackend
from vllm.exceptions import (
    GracefulHTTPError,
    MaxQueuedTokensError,
    QueueOverflowError,
    RetryableRequestError,
)
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from vllm_mm_ext.adapters.live import engine_session
from vllm_mm_ext.adapters.live.engine import LiveEngine
from vllm_mm_ext.adapters.live.engine_parts import Engine
from vllm_mm_ext.adapters.live.engine_session import EngineSession, new_salt
from vllm_mm_ext.adapters.live.served_template import reasoning_of
from vllm_mm_ext.adapters.rendering_wrappers import Span
from vllm_mm_ext.adapters.serving.cache_drift import LostInputsError
from vllm_mm_ext.adapters.serving.preprocessing import finished, looked_up, started
from vllm_mm_ext.live.effects import Append, Respond, ResponseOptions, TurnEnd, Usage
from vllm_mm_ext.live.prompt import Message, Prompt, Text
from vllm_mm_ext.policies.kv.sessions import session_key
from vllm_mm_ext.request.context import current_request

END = 7
PROMPT = Prompt((Message("user", (Text("one two three"),)),), open=True)
CHAT = SimpleNamespace(default_sampling_params={}, override_max_tokens=None)


class Client:
    """Answers each prompt with one token, whose chance is a quarter."""

    model_config = SimpleNamespace(max_model_len=100)
    vllm_config = SimpleNamespace(speculative_config=None)
    engine_core: Any

    def __init__(self) -> None:
        self.renderer = self
        self.ended = 0
        # How each prompt is answered, by which adapter and on which engine.
        self.params: list[Any] = []
        self.adapters: list[Any] = []
        self.ranks: list[int | None] = []
        self.sessions: list[str] = []
        self.salts: set[str] = set()
        # Prompts are answered as long as this is set.
        self.answers = asyncio.Event()
        self.answers.set()

    async def render_cmpl_async(
        self, prompts: list[Any], *, prompt_extras: dict[str, str]
    ) -> list[Any]:
        self.salts.add(prompt_extras["cache_salt"])
        return prompts

    async def generate(self, prompt: Any, params: Any, *_: Any, **more: Any) -> AsyncIterator[Any]:
        self.params.append(params)
        self.adapters.append(more["lora_request"])
        self.ranks.append(more["data_parallel_rank"])
        self.sessions.append(more["session_id"])
        await self.answers.wait()
        logprobs = None
        if params.allowed_token_ids is not None:
            logprobs = [{END: SimpleNamespace(logprob=math.log(0.25))}]
        yield SimpleNamespace(
            prompt_token_ids=prompt["prompt_token_ids"],
            num_cached_tokens=2,
            outputs=[
                SimpleNamespace(logprobs=logprobs, token_ids=[9], text="A", finish_reason="length")
            ],
        )
        self.ended += 1


class Maker:
    """Makes a prompt of five tokens."""

    family = SimpleNamespace(traits=None, turn_end=END, token_ids={"video": 8})
    token_texts: ClassVar = {"video": "<video>"}

    def make(self, prompt: Prompt, stretches: dict[str, Any]) -> dict[str, Any]:
        # As the real one does: what a prompt does not show is dropped.
        stretches.clear()
        stretches.update({str(part): part for part in prompt.messages[-1].parts})
        return {"prompt_token_ids": [1, 2, 3, 4, 5]}


class Listener:
    """Keeps what it is told of appends, and the names of answers that have ended."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self.answered: asyncio.Queue[str] = asyncio.Queue()
        self.failures: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        # Of answers: the tokens, the text, and how many tokens the last one has in all.
        self.token_ids: tuple[int, ...] = ()
        self.text = ""
        self.output_tokens = 0

    def appended(self, *told: Any) -> None:
        self.told.put_nowait(told)

    def wrote(self, _: str, token_ids: tuple[int, ...], text: str, __: Any) -> None:
        self.token_ids += token_ids
        self.text += text

    def ended(self, response_id: str, _: str, usage: Usage) -> None:
        self.output_tokens = usage.output_tokens
        self.answered.put_nowait(response_id)

    def failed(self, _: str | None, error_type: str, code: str, __: str) -> None:
        self.failures.put_nowait((error_type, code))


async def _nothing() -> None:
    pass


async def _base_model() -> None:
    return None


def _session(
    client: Client,
    listener: Listener,
    threads: ThreadPoolExecutor,
    leave: Callable[[], Awaitable[None]] = _nothing,
    *,
    chat: Any = CHAT,
    remembers: bool = False,
) -> EngineSession:
    engine: Any = Engine(client, chat, Maker(), threads, None, remembers)  # type: ignore[arg-type]
    return EngineSession(engine, "one", listener, _base_model, None, new_salt(), _nothing, leave)


def _live(client: Any, models: Any = None, **parallel: int) -> LiveEngine:
    """What the sessions of an API server share, with an engine that keeps no KV."""

    async def no_pool(*_: Any) -> None:
        return None

    client.engine_core = SimpleNamespace(call_utility_async=no_pool)
    client.vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{
                "data_parallel_size": 1,
                "local_engines_only": False,
                "_api_process_count": 1,
                "_api_process_rank": 0,
                **parallel,
            }
        ),
        speculative_config=None,
    )
    return LiveEngine(client, CHAT, models, Maker(), None)  # type: ignore[arg-type]


async def test_an_append_tells_what_was_computed_and_what_the_model_says_of_the_pause() -> None:
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.append(Append(PROMPT))
        assert await listener.told.get() == (5, 3, None)
        session.append(Append(PROMPT, pause=4))
        tokens, computed, turn_end = await listener.told.get()
        assert (tokens, computed, turn_end.pause) == (5, 3, 4)
        assert isinstance(turn_end, TurnEnd)
        assert math.isclose(turn_end.chance, 0.25)
        # The engine's outputs were read to their end, so nothing is left to be aborted.
        assert client.ended == 2
        await session.close()


async def test_only_an_answer_is_made_into_text() -> None:
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.append(Append(PROMPT))
        await listener.told.get()
        session.respond(Respond("one", PROMPT, ResponseOptions(1, 0.0)))
        await listener.answered.get()
        await session.close()
    assert [params.detokenize for params in client.params] == [False, True]


@pytest.mark.parametrize(
    ("wanted", "default", "most", "gets"),
    [(None, None, None, 95), (30, 20, None, 30), (None, 20, None, 20), (30, 20, 10, 10)],
)
async def test_an_answer_is_sampled_as_a_chat_completion(
    wanted: int | None, default: int | None, most: int | None, gets: int
) -> None:
    sampling = {
        "temperature": 0.6,
        "repetition_penalty": 1.1,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.1,
    }
    defaults = sampling if default is None else {**sampling, "max_tokens": default}
    chat = SimpleNamespace(default_sampling_params=defaults, override_max_tokens=most)
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads, chat=chat)
        session.respond(Respond("one", PROMPT, ResponseOptions(wanted, None)))
        await listener.answered.get()
        await session.close()
    (params,) = client.params
    assert {name: getattr(params, name) for name in sampling} == sampling
    assert params.max_tokens == gets


@pytest.mark.parametrize("drafter", [None, SimpleNamespace()])
async def test_an_answer_has_no_token_of_a_medium_with_a_drafter_too(drafter: Any) -> None:
    client, listener = Client(), Listener()
    client.vllm_config = SimpleNamespace(speculative_config=drafter)
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.respond(Respond("one", PROMPT, ResponseOptions(None, None)))
        await listener.answered.get()
        await session.close()
    (params,) = client.params
    params._validate_spec_decode(drafter)
    tokenizer = SimpleNamespace(
        encode=lambda text, **_: [8] if text == "<video>" else [1, 8], max_token_id=100
    )
    params.update_from_tokenizer(tokenizer)
    assert set(params.logit_bias or ()) == ({8} if drafter is None else set())
    assert params.bad_words_token_ids == (None if drafter is None else [[8]])


class Cutting(Maker):
    """Makes prompts of these tokens, one after the other."""

    def __init__(self, *prompts: list[int]) -> None:
        self.prompts = list(prompts)

    def make(self, *_: Any) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompts.pop(0)}


async def test_kv_of_earlier_prompts_is_let_go_once_one_that_does_not_go_on_is_computed() -> None:
    done: list[str] = []

    class Told(Client):
        async def generate(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
            async for output in super().generate(*args, **more):
                yield output
            done.append("prompt")

    async def trim() -> None:
        done.append("trim")

    # The answer, which is 9, goes on in the next prompt; then a turn goes, and another one.
    maker = Cutting([1, 2], [1, 2, 3], [5, 5], [1, 2, 3, 9, 4], [1, 3, 9, 4], [1, 3, 9, 4, 5], [1])
    client, listener = Told(), Listener()
    with ThreadPoolExecutor(1) as threads:
        engine: Any = Engine(client, CHAT, maker, threads)  # type: ignore[arg-type]
        session = EngineSession(engine, "s", listener, _base_model, None, "salt", trim, _nothing)

        async def append() -> list[str]:
            done.clear()
            session.append(Append(PROMPT))
            await listener.told.get()
            return list(done)

        async def answer(*, aside: bool) -> None:
            session.respond(Respond("r", PROMPT, ResponseOptions(1, 0.0), aside=aside))
            await listener.answered.get()
            while session._responses:
                await asyncio.sleep(0)

        assert await append() == ["prompt"]
        await answer(aside=False)
        await answer(aside=True)
        assert await append() == ["prompt"]
        assert await append() == ["prompt", "trim"]
        assert await append() == ["prompt"]
        assert await append() == ["prompt", "trim"]
        await session.close()


async def test_kv_of_answers_aside_is_known_apart_and_let_go_before_that_of_the_conversation() -> (
    None
):
    asked: list[tuple[str, str]] = []

    async def pool(_: str, action: str, key: str) -> int:
        asked.append((action, key))
        return 0

    client, listener = Client(), Listener()
    live = _live(client, SimpleNamespace(lora_requests={}))
    client.engine_core.call_utility_async = pool
    session = await live.open("one", listener)
    for aside in (True, False):
        session.respond(Respond("r", PROMPT, ResponseOptions(1, 0.0), aside=aside))
        await listener.answered.get()
    # The answer is not part of this prompt.
    session.append(Append(PROMPT))
    await listener.told.get()
    await session.close()
    assert client.sessions == ["one-aside", "one", "one"]
    (salt,) = client.salts
    talk, beside = session_key("one", salt), session_key("one-aside", salt)
    trimmed = [("release", beside), ("trim", talk)]
    assert asked == [("pin", talk), *trimmed, ("release", beside), ("release", talk)]


async def test_a_session_on_a_slow_engine_asks_it_to_let_go_of_all_its_kv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    async def slow(_: str, action: str, key: str) -> int:
        asked.append((action, key))
        if action == "release":
            await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(engine_session, "_END_S", 0.01)
    client, listener = Client(), Listener()
    live = _live(client, SimpleNamespace(lora_requests={}))
    client.engine_core.call_utility_async = slow
    session = await live.open("one", listener)
    with pytest.raises(TimeoutError):
        await session.close()
    talk, beside = (session_key(name, session._salt) for name in ("one", "one-aside"))
    assert asked == [("pin", talk), ("release", beside), ("release", talk)]


def _tokenizer(*, special: bool) -> TokenizersBackend:
    """A tokenizer with tokens around reasoning, which may be special ones, as the last one is."""
    words = ("[UNK]", "Let me", " see.", "It", " is.", "\n", "\n\n")
    raw = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
    raw.decoder = Fuse()
    raw.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    raw.add_special_tokens(["<end>"])
    return TokenizersBackend(tokenizer_object=raw)


class Writing(Client):
    """Answers each prompt with these tokens, so many at a time; vLLM makes them into text."""

    def __init__(self, tokenizer: TokenizersBackend, ids: list[int], at_once: int) -> None:
        super().__init__()
        self.tokenizer, self.ids, self.at_once = tokenizer, ids, at_once

    async def generate(self, prompt: Any, params: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
        asked = prompt["prompt_token_ids"]
        request: Any = SimpleNamespace(
            request_id="r", prompt_token_ids=asked, sampling_params=params
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self.tokenizer, request)
        for first in range(0, len(self.ids), self.at_once):
            some = self.ids[first : first + self.at_once]
            ends = first + self.at_once >= len(self.ids)
            detokenizer.update(some, ends)
            part = SimpleNamespace(
                token_ids=some,
                text=detokenizer.get_next_output_text(ends, delta=True),
                finish_reason="stop" if ends else None,
            )
            yield SimpleNamespace(prompt_token_ids=asked, num_cached_tokens=2, outputs=[part])


@pytest.mark.parametrize("at_once", [1, 2, 9])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("special", [False, True])
async def test_the_reasoning_before_an_answer_is_left_out(
    special: bool, begun: bool, at_once: int
) -> None:
    tokenizer = _tokenizer(special=special)
    written = "" if begun else "<think>"
    ids = [*tokenizer.encode(written), 1, 2, *tokenizer.encode("</think>"), 6, 3, 4, 5]
    ids += tokenizer.encode("<end>")
    client, listener = Writing(tokenizer, ids, at_once), Listener()
    with ThreadPoolExecutor(1) as threads:
        reasoning = reasoning_of(tokenizer, begun=begun)
        assert reasoning is not None
        engine: Any = Engine(client, CHAT, Maker(), threads, reasoning)  # type: ignore[arg-type]
        session = EngineSession(
            engine, "one", listener, _base_model, None, new_salt(), _nothing, _nothing
        )
        session.respond(Respond("one", PROMPT, ResponseOptions(9, 0.0)))
        await listener.answered.get()
        await session.close()
    assert (listener.token_ids, listener.text) == ((3, 4, 5), "It is.\n")
    assert listener.output_tokens == len(ids)


async def test_an_append_waits_for_the_one_before_it_and_takes_the_place_of_one_that_waits() -> (
    None
):
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        client.answers.clear()
        for _ in range(5):
            session.append(Append(PROMPT))
            await asyncio.sleep(0)
        client.answers.set()
        await listener.told.get()
        await listener.told.get()
        session.append(Append(PROMPT))
        await listener.told.get()
        assert client.ended == 3
        assert listener.told.empty()
        await session.close()


async def test_a_prompt_has_the_adapter_of_its_time_and_a_session_whose_adapter_is_gone_ends() -> (
    None
):
    first, second = object(), object()
    models = SimpleNamespace(lora_requests={"tuned": first}, is_base_model=lambda _: False)
    client, listener = Client(), Listener()
    session = await _live(client, models).open("one", listener, model="tuned")
    for adapter in (first, second):
        models.lora_requests["tuned"] = adapter
        session.append(Append(PROMPT))
        await listener.told.get()
    assert client.adapters == [first, second]
    del models.lora_requests["tuned"]
    session.append(Append(PROMPT))
    assert await listener.failures.get() == ("invalid_request_error", "model_not_found")
    session.append(Append(PROMPT))
    session.respond(Respond("late", PROMPT, ResponseOptions(1, 0.0)))
    await session.close()
    assert client.adapters == [first, second]
    assert listener.told.empty()


async def test_the_first_sessions_of_api_servers_are_on_different_engines() -> None:
    listener = Listener()
    models = SimpleNamespace(lora_requests={})
    ranks = []
    for api_server in (0, 1):
        server = {"_api_process_count": 2, "_api_process_rank": api_server}
        client = Client()
        live = _live(client, models, data_parallel_size=2, **server)
        for number in range(3):
            session = await live.open(f"s{number}", listener)
            session.append(Append(PROMPT))
            await listener.told.get()
        ranks.append(client.ranks)
    assert ranks == [[0, 1, 0], [1, 0, 1]]


async def test_no_two_sessions_have_kv_in_common() -> None:
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        for _ in range(2):
            session = _session(client, listener, threads)
            session.append(Append(PROMPT))
            await listener.told.get()
            await session.close()
    assert len(client.salts) == 2


async def test_a_session_lets_go_of_its_kv_even_if_its_end_is_cut_short() -> None:
    left: list[bool] = []

    async def leave() -> None:
        left.append(True)

    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads, leave)
        client.answers.clear()
        session.append(Append(PROMPT))
        closing = asyncio.create_task(session.close())
        await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        assert left == [True]


async def test_an_answer_to_something_else_keeps_what_was_made_of_the_conversation() -> None:
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.append(Append(PROMPT))
        await listener.told.get()
        kept = dict(session._stretches)
        other = Prompt((Message("user", (Text("four"),)),), open=False)
        await session._rendered(other, aside=True)
        assert session._stretches == kept
        await session._rendered(other, aside=False)
        assert session._stretches != kept
        await session.close()


@pytest.mark.parametrize("in_conversation", [False, True])
async def test_only_an_answer_of_the_conversation_takes_the_place_of_an_append_that_waits(
    in_conversation: bool,
) -> None:
    client, listener = Client(), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        client.answers.clear()
        session.append(Append(PROMPT))
        session.append(Append(PROMPT, pause=4))
        prompt = replace(PROMPT, open=False)
        aside = not in_conversation
        session.respond(Respond("r", prompt, ResponseOptions(1, None), aside, in_conversation))
        client.answers.set()
        assert await listener.answered.get() == "r"
        await listener.told.get()
        session.append(Append(PROMPT))
        told = await listener.told.get()
        # Outside of it, the question whether the turn has ended is still asked.
        assert (told[2] is None) == in_conversation


class Refusing(Client):
    """Refuses prompts as an engine does, and counts how often a prompt is rendered."""

    def __init__(self, *refusals: Exception) -> None:
        super().__init__()
        self.refusals = list(refusals)
        self.rendered = 0

    async def render_cmpl_async(self, prompts: list[Any], **more: Any) -> list[Any]:
        self.rendered += 1
        return await super().render_cmpl_async(prompts, **more)

    async def generate(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
        if self.refusals:
            raise self.refusals.pop(0)
        async for output in super().generate(*args, **more):
            yield output


async def test_a_prompt_waits_for_a_paused_engine_and_is_rendered_anew_where_media_got_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_session, "_WAITS_S", (0.0,) * 3)
    paused, lost = [RetryableRequestError("Generation is paused.")] * 3, [LostInputsError()] * 2
    for refusals, renders in ((paused, 1), (lost, 3), (paused[:1] + lost, 3)):
        client, listener = Refusing(*refusals), Listener()
        with ThreadPoolExecutor(1) as threads:
            session = _session(client, listener, threads)
            session.append(Append(PROMPT))
            assert await listener.told.get() == (5, 3, None)
            await session.close()
        assert (client.rendered, client.refusals) == (renders, [])


@asynccontextmanager
async def _append_that_waits() -> AsyncIterator[tuple[EngineSession, Listener]]:
    """A session whose append a paused engine has just refused."""
    client, listener = Refusing(RetryableRequestError("Generation is paused.")), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.append(Append(PROMPT))
        while client.refusals:
            await asyncio.sleep(0)
        yield session, listener
        await session.close()


@pytest.mark.parametrize("answers", [False, True])
async def test_an_append_that_waits_for_a_paused_engine_holds_nothing_else_up(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    # Only something else ends this wait.
    monkeypatch.setattr(engine_session, "_WAITS_S", (1e6,))
    async with _append_that_waits() as (session, listener):
        if answers:
            session.respond(Respond("one", PROMPT, ResponseOptions(1, 0.0)))
        else:
            session.append(Append(PROMPT))
        assert await asyncio.wait_for(listener.told.get(), 20) == (None, 0, None)
        if answers:
            assert await listener.answered.get() == "one"
        else:
            assert await listener.told.get() == (5, 3, None)


async def test_an_answer_outside_the_conversation_lets_an_append_wait_for_a_paused_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_session, "_WAITS_S", (0.1,))
    async with _append_that_waits() as (session, listener):
        options = ResponseOptions(1, 0.0)
        session.respond(Respond("one", PROMPT, options, aside=True, in_conversation=False))
        assert await listener.told.get() == (5, 3, None)
        assert await listener.answered.get() == "one"


async def test_a_prompt_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_session, "_WAITS_S", (0.0, 0.0))
    for error in (RetryableRequestError("Generation is paused."), LostInputsError()):
        client, listener = Refusing(*[error] * 9), Listener()
        with ThreadPoolExecutor(1) as threads:
            session = _session(client, listener, threads)
            session.append(Append(PROMPT))
            assert await listener.told.get() == (None, 0, None)
            await session.close()


class GivingUp(Client):
    """Gives prompts up as a paused engine does.

    Attributes:
        ends: Of each prompt, the finish reasons of its outputs; without any it is answered.
    """

    def __init__(self, *ends: list[str | None]) -> None:
        super().__init__()
        self.ends = list(ends)

    async def generate(self, prompt: Any, *args: Any, **more: Any) -> AsyncIterator[Any]:
        reasons = self.ends.pop(0)
        if not reasons:
            async for output in super().generate(prompt, *args, **more):
                yield output
        for reason in reasons:
            ids = [9] if reason is None else []
            part = SimpleNamespace(logprobs=[], token_ids=ids, text="", finish_reason=reason)
            yield SimpleNamespace(prompt_token_ids=[1], num_cached_tokens=1, outputs=[part])


async def test_a_prompt_that_the_engine_gives_up_is_sent_again_unless_it_has_written_something(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_session, "_WAITS_S", (0.0, 0.0))
    client, listener = GivingUp(["abort"], [], ["abort"], [None, "abort"]), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.append(Append(PROMPT, pause=4))
        assert (await listener.told.get())[:2] == (5, 3)
        session.respond(Respond("one", PROMPT, ResponseOptions(1, 0.0)))
        assert await listener.failures.get() == ("server_error", "try_again")
        await session.close()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "refusal",
    [QueueOverflowError(), MaxQueuedTokensError(), GracefulHTTPError("busy", HTTPStatus(503))],
    ids=lambda refusal: type(refusal).__name__,
)
async def test_a_prompt_waits_where_too_many_wait_already(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusal: Exception
) -> None:
    monkeypatch.setattr(engine_session, "_WAITS_S", (0.0, 0.0))
    client, listener = Refusing(refusal, *[refusal] * 3), Listener()
    with ThreadPoolExecutor(1) as threads:
        session = _session(client, listener, threads)
        session.respond(Respond("one", PROMPT, ResponseOptions(1, 0.0)))
        assert await listener.failures.get() == ("server_error", "try_again")
        session.append(Append(PROMPT))
        assert await listener.told.get() == (5, 3, None), "after one refusal"
        await session.close()
    assert "Traceback" not in caplog.text


class Preprocessing(Client):
    """Makes model inputs of a medium in a thread, which goes on where the prompt is cancelled.

    Attributes:
        goes_on: The thread waits for it.
        begun: The thread has begun.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self.goes_on, self.begun = threading.Event(), asyncio.Event()
        self._thread = thread
        self._prompts = 0

    async def render_cmpl_async(self, prompts: list[Any], **_: Any) -> list[Any]:
        begun, loop = self.begun, asyncio.get_running_loop()
        self._prompts += 1
        name = f"hash {self._prompts}"

        def process() -> None:
            loop.call_soon_threadsafe(begun.set)
            self.goes_on.wait(20)
            looked_up({"video": [False]}, {"video": [name]}, ())

        start = started()
        await loop.run_in_executor(self._thread, contextvars.copy_context().run, process)
        finished(start, None, {"audio": [Span(0, 2, 2, f"{name} of sound")]}, (1, 2))
        return prompts


async def test_a_session_knows_the_items_of_its_prompts_those_of_one_that_was_cut_short_too() -> (
    None
):
    listener = Listener()
    with ThreadPoolExecutor(1) as threads, ThreadPoolExecutor(1) as preprocessing:
        client = Preprocessing(preprocessing)
        session = _session(client, listener, threads, remembers=True)
        client.goes_on.set()
        session.append(Append(PROMPT))
        await listener.told.get()
        assert session.hashes == {"hash 1", "hash 1 of sound"}
        client.goes_on.clear()
        client.begun.clear()
        session.append(Append(PROMPT))
        await client.begun.wait()
        await session.close()
        client.goes_on.set()
        preprocessing.shutdown()
        assert session.hashes == {"hash 1", "hash 1 of sound", "hash 2"}
    # Metrics and spans are of requests.
    assert current_request() is None


async def test_where_nobody_takes_media_down_a_session_remembers_nothing() -> None:
    listener = Listener()
    with ThreadPoolExecutor(1) as threads, ThreadPoolExecutor(1) as preprocessing:
        client = Preprocessing(preprocessing)
        client.goes_on.set()
        session = _session(client, listener, threads)
        session.append(Append(PROMPT))
        await listener.told.get()
        assert not session.hashes
        await session.close()
