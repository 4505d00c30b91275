"""Prompts of one live session: units that are appended, answers, aborts."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import AbortedError
from vllm_mm_ext.adapters.live.engine_parts import Engine, EngineListener
from vllm_mm_ext.adapters.live.growing import GrowingStretch
from vllm_mm_ext.adapters.live.refusals import TooLongError, UnknownModelError, may_pass, told
from vllm_mm_ext.adapters.serving.cache_drift import LostInputsError
from vllm_mm_ext.base.tasks import to_its_end
from vllm_mm_ext.live.effects import Append, Respond, TurnEnd, Usage
from vllm_mm_ext.live.prompt import Prompt
from vllm_mm_ext.live.reasoning import AnswerOnly
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.ended_sessions import SessionHashes

logger = vllm_compat.logger

# Times that a prompt is sent again whose preprocessed media got lost on the way.
_RETRIES = 3
# Seconds before a prompt is sent again that the engine does not take now, as while it is paused or
# as many wait as may (vLLM's admission control).
_WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
# The server's defaults that vLLM applies to chat completions.
_SAMPLING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)
# Seconds that stopped work may take to end; an engine that is gone may keep it for ever.
_END_S = 10.0


def new_salt() -> str:
    """A ``cache_salt`` for one session.

    No other request finds the session's KV, and the session finds nobody else's: the cached tokens
    that its usage tells, and how soon it is answered, say nothing of others.
    """
    return secrets.token_hex(16)


def aside_of(session_id: str) -> str:
    """The id under which the engine knows a session's answers aside.

    So where their prompts end does not stand in for the end of the conversation.
    """
    return f"{session_id}-aside"


class EngineSession:
    """Prompts of one session. All but ``close`` return at once; the listener is told the rest."""

    def __init__(
        self,
        engine: Engine,
        session_id: str,
        listener: EngineListener,
        adapter: Callable[[], Awaitable[Any]],
        rank: int | None,
        salt: str,
        trim: Callable[[], Awaitable[None]],
        leave: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._id = session_id
        self._listener = listener
        # Asked before each prompt: operators replace LoRA adapters, and take them away.
        self._adapter = adapter
        self._rank = rank
        self._salt = salt
        self._trim = trim
        self._leave = leave
        # Tokens of the conversation's last prompt and of the answer to it.
        self._shown: list[int] = []
        # A prompt did not go on from there; KV of those before it is kept for nothing.
        self._cut = False
        self._stretches: dict[str, GrowingStretch] = {}
        self._rendering = asyncio.Lock()
        self._waiting: Append | None = None
        self._appending: asyncio.Task[None] | None = None
        # Something else is to take the place of the append that runs, if the engine refuses that.
        self._overtaken = asyncio.Event()
        self._responses: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests = 0
        self._hashes = SessionHashes() if engine.remembers else None
        # Nothing is told any more: the session is closed, or the engine or the model is gone.
        self._silent = False
        self._closed = False

    @property
    def hashes(self) -> set[str]:
        """vLLM's hashes of the mm items of the session's prompts; none if nobody wants them."""
        return set() if self._hashes is None else self._hashes.all()

    def append(self, append: Append) -> None:
        """Let the engine compute what of a prompt it has not computed yet.

        One append runs at a time. One that is given meanwhile waits for it, and takes the place of
        one that waits already, or that the engine refuses for now.
        """
        self._waiting = append
        self._overtaken.set()
        if self._appending is None:
            self._append_next()

    def respond(self, respond: Respond) -> None:
        """Let the engine answer; an append that runs ends first.

        One that waits, or that the engine refuses for now, is dropped if the answer will stand
        before what it appends. No other answer takes its place: it may be the one that asks whether
        a turn has ended.
        """
        if respond.in_conversation:
            self._waiting = None
            self._overtaken.set()
        if not self._silent:
            task = self._start(self._answer(respond, self._appending))
            self._responses[respond.response_id] = task

    def abort(self, response_id: str) -> None:
        """Stop a response; the listener hears nothing more of it."""
        task = self._responses.pop(response_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop all work, wait for its end, and let go of the session's KV."""
        if self._closed:
            return
        self._closed = self._silent = True
        self._waiting = None
        self._responses.clear()
        for task in self._tasks:
            task.cancel()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_END_S)
        finally:
            self._stretches.clear()
            # An engine that is gone does not answer.
            await asyncio.wait_for(self._leave(), _END_S)

    # --- appends ----------------------------------------------------------------------------------

    def _append_next(self) -> None:
        """Begin with the append that waits, if one does."""
        append, self._waiting, self._appending = self._waiting, None, None
        self._overtaken.clear()
        if append is not None and not self._silent:
            self._appending = self._start(self._append(append))

    async def _append(self, append: Append) -> None:
        ended: tuple[int | None, int, TurnEnd | None] = (None, 0, None)
        try:
            ended = await self._appended(append)
        except Exception as error:
            # The response to the prompt meets the same error, and tells the client.
            logger.debug("mm_ext: an append of a live session failed: %s", error)
            self._note_end(error)
        if not self._silent:
            self._listener.appended(*ended)
        self._append_next()

    async def _appended(self, append: Append) -> tuple[int, int, TurnEnd | None]:
        """Tokens of a prompt, those that were computed, and what the model says of the pause."""
        from vllm import SamplingParams

        prompt, end = append.prompt, None
        if append.pause is not None:
            # The model tells it right after what it hears.
            prompt, end = replace(prompt, open=True), self._engine.maker.family.turn_end
        # Of a token that is the only one allowed, vLLM returns the log-probability that it has
        # among all. `logprob_token_ids` would take those of other requests of the step away.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            allowed_token_ids=None if end is None else [end],
            logprobs=None if end is None else 0,
            # vLLM would read the prompt's last tokens as text, to go on from there.
            detokenize=False,
        )
        last = None
        # To its end: a generator that is left before is closed some time later.
        async for output in self._outputs(prompt, lambda _: params, overtaken=self._overtaken):
            last = output
        if last is None:
            raise RuntimeError("the engine ended a prompt without an output")
        tokens = len(last.prompt_token_ids)
        turn_end = None
        if append.pause is not None and end is not None:
            chance = math.exp(last.outputs[0].logprobs[0][end].logprob)
            turn_end = TurnEnd(append.pause, chance)
        return tokens, tokens - (last.num_cached_tokens or 0), turn_end

    # --- responses --------------------------------------------------------------------------------

    async def _answer(self, respond: Respond, append: asyncio.Task[None] | None) -> None:
        name = respond.response_id
        try:
            if append is not None and not append.done():
                await asyncio.wait({append})
            await self._write(respond)
        except Exception as error:
            self._note_end(error)
            if name in self._responses and not self._silent:
                self._listener.failed(name, *told(error))
        finally:
            if self._responses.get(name) is asyncio.current_task():
                del self._responses[name]

    async def _write(self, respond: Respond) -> None:
        from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        name, options, engine = respond.response_id, respond.options, self._engine
        default = engine.chat.default_sampling_params
        chosen = {key: default[key] for key in _SAMPLING if key in default}
        if options.temperature is not None:
            chosen["temperature"] = options.temperature
        banned, unwritten = engine.maker.family.token_ids, engine.never_written()
        reasoning = engine.reasoning
        answer = None if reasoning is None else AnswerOnly(reasoning)

        def params(prompt_tokens: int) -> Any:
            return SamplingParams(
                **chosen,
                max_tokens=get_max_tokens(
                    engine.context_tokens,
                    options.max_output_tokens,
                    prompt_tokens,
                    default,
                    engine.chat.override_max_tokens,
                ),
                **unwritten,
                output_kind=RequestOutputKind.DELTA,
                # Where the reasoning ends is looked for in the text, too.
                skip_special_tokens=reasoning is None or not reasoning.special,
            )

        usage: Usage | None = None
        overtaken = asyncio.Event()  # Nothing takes the place of an answer.
        async for output in self._outputs(
            respond.prompt, params, overtaken=overtaken, aside=respond.aside
        ):
            (part,) = output.outputs
            if usage is None:
                given = output.prompt_token_ids
                sound = given.count(banned.get("audio", -1))
                seen = given.count(banned["video"]) + given.count(banned.get("image", -1))
                usage = Usage(len(given), output.num_cached_tokens or 0, 0, sound, seen)
            usage = replace(usage, output_tokens=usage.output_tokens + len(part.token_ids))
            reason = part.finish_reason
            # The token that ends an answer has no text, and no place in the conversation.
            ids = tuple(part.token_ids[:-1] if reason == "stop" else part.token_ids)
            if not respond.aside:
                self._shown += ids
            ids, text = (ids, part.text) if answer is None else answer.take(ids, part.text)
            if ids or text:
                self._listener.wrote(name, ids, text, usage)
            if reason in ("stop", "length"):
                self._listener.ended(name, reason, usage)
            elif reason is not None:
                raise RuntimeError(f"the engine ended the answer ({reason})")

    # --- the engine -------------------------------------------------------------------------------

    async def _outputs(
        self,
        prompt: Prompt,
        params: Callable[[int], Any],
        *,
        overtaken: asyncio.Event,
        aside: bool = False,
    ) -> AsyncIterator[Any]:
        """vLLM's outputs for a prompt.

        It is made and sent again if its media got lost on the way, and sent later if the engine
        refuses it now, or gives it up before it has written anything.

        Args:
            prompt: The prompt.
            params: Returns vLLM's ``SamplingParams`` for a prompt of so many tokens.
            overtaken: Once it is set, a prompt that the engine refuses is not sent again.
            aside: As of ``Respond``.
        """
        retries, waits, rendered, begun = iter(range(_RETRIES)), iter(_WAITS_S), None, False
        while True:
            try:
                rendered = rendered or await self._rendered(prompt, aside)
                length = len(rendered["prompt_token_ids"])
                if length >= self._engine.context_tokens:
                    raise TooLongError(length, self._engine.context_tokens)
                lora = await self._adapter()
                if not aside:
                    ids = list(rendered["prompt_token_ids"])
                    self._cut |= ids[: len(self._shown)] != self._shown
                    self._shown = ids
                self._requests += 1
                outputs = self._engine.client.generate(
                    rendered,
                    params(length),
                    f"live-{self._id}-{self._requests}",
                    lora_request=lora,
                    data_parallel_rank=self._rank,
                    session_id=aside_of(self._id) if aside else self._id,
                )
                aborted = False
                async for output in outputs:
                    aborted = output.outputs[0].finish_reason == "abort"
                    if not aborted:
                        begun = True
                        yield output
                if aborted:
                    raise AbortedError
                # Not before: the prompt has found what it shares with those before it.
                if self._cut and not aside:
                    await self._trim()
                    self._cut = False
                return
            except LostInputsError:
                if begun or next(retries, None) is None:
                    raise
                rendered = None
            except Exception as error:
                wait_s = next(waits, None) if may_pass(error) else None
                if begun or wait_s is None:
                    raise
                with suppress(TimeoutError):
                    await asyncio.wait_for(overtaken.wait(), wait_s)
                    raise

    async def _rendered(self, prompt: Prompt, aside: bool) -> Any:
        """The prompt as vLLM's engine takes it."""
        engine = self._engine
        # What is kept of the stretches is changed by one prompt at a time.
        async with self._rendering:
            # What such a prompt does not show is shown again by the next append.
            stretches = dict(self._stretches) if aside else self._stretches
            made = await to_its_end(engine.threads.submit(engine.maker.make, prompt, stretches))
            if self._hashes is not None:
                trace = RequestTrace(hashes=self._hashes.latest())
                enter_request(RequestContext(trace=trace, unreported=True))
            (rendered,) = await engine.client.renderer.render_cmpl_async(
                [made], prompt_extras={"cache_salt": self._salt}
            )
            return rendered

    def _note_end(self, error: Exception) -> None:
        """Tell the listener that the engine or the model is gone, if an error says so; the last."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._silent:
            return
        if isinstance(error, EngineDeadError):
            self._silent = True
            self._listener.failed(None, "server_error", "engine_gone", "The engine has stopped.")
        elif isinstance(error, UnknownModelError):
            self._silent = True
            self._listener.failed(None, "invalid_request_error", "model_not_found", str(error))

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
