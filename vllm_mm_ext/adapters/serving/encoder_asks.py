"""Asks encoder instances to encode the media of requests, while the requests go on here.

The engine waits for what an encoder was asked for until this module says that nothing more comes of
it, or until nothing has come for a while (``expectations.py``).
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from uuid import uuid4

import aiohttp

from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.fleet.encode_request import (
    ENCODE_HEADER,
    ITEM_TOKENS_HEADER,
    LEVELS_HEADER,
    has_media,
    takes_records,
)
from vllm_mm_ext.fleet.encoder_choice import EncoderChoice
from vllm_mm_ext.fleet.pairing import Plan, as_header
from vllm_mm_ext.fleet.route_key import route_key

# The method of vLLM's ``EngineCore`` by which API servers say that a job is over.
UTILITY: Final = "mm_ext_encode_over"
_CONNECT_S = 2.0
# An encoder answers when it has encoded everything; by then requests have long stopped waiting.
_ANSWER_S = 600.0
# Asks at a time; what goes beyond is encoded here.
_MOST_ASKS = 256
# Seconds in which one warning of a kind is enough.
_QUIET_S = 30.0
_SHOWN = 300
# Headers of a client that decide what its request may see, and to which conversation it belongs.
_PASSED_ON: Final = ("authorization", "x-session-id", "x-request-id")

OUTCOMES: Final = ("encoded", "refused", "failed", "ended", "none_up")


class EncoderAsks:
    """The encoder instances of one server.

    Args:
        encoders: Their URLs.
        plan: This instance's plan.
        wait_s: Seconds for which requests wait for an encoder of which nothing comes.

    Attributes:
        counts: Requests by what became of asking: an encoder encoded the media; refused (the
            request is wrong); failed; the request ended before; or none was up.
    """

    def __init__(self, encoders: Sequence[str], plan: Plan, wait_s: float) -> None:
        self._wait_s = wait_s
        # When each encoder last answered anything.
        self._answered: dict[str, float] = {}
        self._choice = EncoderChoice(encoders)
        self._header = as_header(plan)
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: dict[str, float] = {}
        self.counts = dict.fromkeys(OUTCOMES, 0)

    def job(
        self, body: Mapping[str, Any], sent: bytes, headers: Mapping[str, str], core: Any
    ) -> Job | None:
        """What may be asked for a request; None if it has no media.

        Args:
            body: Of the chat completion.
            sent: The body as it was sent.
            headers: Of the HTTP request, by lower-case names.
            core: vLLM's client of the engine.
        """
        if not has_media(body.get("messages") or ()):
            return None
        job = Job(self, route_key(body) or "", sent, headers, core)
        job.takes_records = takes_records(body)
        return job

    def start(self, job: Job, levels: Sequence[int], item_tokens: int) -> asyncio.Task[None] | None:
        """Ask for a job in the background; None if no encoder is up, or too many asks are open."""
        candidates = self._choice.candidates(job.key)
        if not candidates or len(self._tasks) >= _MOST_ASKS:
            self.counts["none_up"] += 1
            return None
        # In the request's own context the task would keep its media.
        task = asyncio.get_running_loop().create_task(
            self._ask(job, levels, item_tokens, candidates), context=contextvars.Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(
        self, job: Job, levels: Sequence[int], item_tokens: int, candidates: Sequence[str]
    ) -> None:
        headers = {name: job.headers[name] for name in _PASSED_ON if name in job.headers}
        headers |= {ENCODE_HEADER: self._header, "content-type": "application/json"}
        if levels:
            headers[LEVELS_HEADER] = ",".join(map(str, levels))
        if item_tokens:
            headers[ITEM_TOKENS_HEADER] = str(item_tokens)
        outcome = "failed"
        try:
            timeout = aiohttp.ClientTimeout(total=_ANSWER_S, sock_connect=_CONNECT_S)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                for encoder in candidates:
                    outcome = await self._ask_one(session, encoder, job.sent, headers)
                    if outcome != "failed":
                        break
        except asyncio.CancelledError:
            outcome = "ended"
            raise
        finally:
            self.counts[outcome] += 1
            await self._tell(job)

    async def _ask_one(
        self,
        session: aiohttp.ClientSession,
        encoder: str,
        body: bytes,
        headers: Mapping[str, str],
    ) -> str:
        url = f"{encoder}/v1/chat/completions"
        timer = asyncio.get_running_loop().call_later(
            self._wait_s, self._silent, encoder, time.monotonic()
        )
        try:
            async with session.post(
                url, data=body, headers=headers, allow_redirects=False
            ) as response:
                self._answered[encoder] = time.monotonic()
                status = response.status
                said = ""
                if status != 200:
                    # A proxy may say it in any encoding.
                    said = (await response.content.read(_SHOWN)).decode(errors="replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._choice.failed(encoder)
            self._warn(encoder, f"does not answer ({type(error).__name__}: {error})")
            return "failed"
        finally:
            timer.cancel()
        if status == 200:
            return "encoded"
        # A 500 may come of one request alone, and others must not suffer from that.
        if status in (409, 421, 502, 503, 504):
            self._choice.failed(encoder)
        if status in (409, 421):
            self._warn(encoder, f"does not encode for this server: {said}")
            return "failed"
        if status < 400 or status >= 500 or status in (401, 403, 404, 429):
            self._warn(encoder, f"answers {status}: {said}")
            return "failed"
        # The request itself is wrong. This server finds out as well, and tells the client.
        return "refused"

    def _silent(self, encoder: str, asked: float) -> None:
        if self._answered.get(encoder, asked) <= asked:
            self._choice.failed(encoder)
            self._warn(encoder, f"answers nothing for {self._wait_s:g} s")

    def _warn(self, encoder: str, what: str) -> None:
        now = time.monotonic()
        if now - self._warned.get(encoder, -_QUIET_S) < _QUIET_S:
            return
        self._warned[encoder] = now
        logger.warning(
            "mm_ext: encoder %s %s; another one is asked, or media are encoded here", encoder, what
        )

    async def _tell(self, job: Job) -> None:
        try:
            await job.core.call_utility_all_async(UTILITY, job.name)
        except Exception as error:
            # The engine is gone, or it stops waiting by itself.
            logger.debug("mm_ext: the engine was not told of %s: %s", job.name, error)


class Job:
    """One request's media, to be encoded elsewhere.

    Attributes:
        name: Names it to the engine; None until an encoder is asked.
        key: The request's route key, by which an encoder is chosen.
        takes_records, used_records, whole: As in ``EncodeJob``.
        sent, headers, core: See ``EncoderAsks.job``.
    """

    def __init__(
        self, asks: EncoderAsks, key: str, sent: bytes, headers: Mapping[str, str], core: Any
    ) -> None:
        self._asks = asks
        self.key = key
        self.sent = sent
        self.headers = headers
        self.core = core
        self.name: str | None = None
        self.takes_records = False
        self.used_records = 0
        self.whole: Callable[[], asyncio.Task[Any]] | None = None
        self._begun = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether an encoder is at work."""
        task = self._task
        return task is not None and not task.done()

    def begin(self, levels: Sequence[int], item_tokens: int) -> None:
        """Ask an encoder, once.

        Args:
            levels: The load tier of each planned video.
            item_tokens: Tokens of an mm item at most; 0 for no limit.
        """
        if self._begun:
            return
        self._begun = True
        self.name = uuid4().hex
        self._task = self._asks.start(self, levels, item_tokens)
        if self._task is None:
            self.name = None

    def end(self) -> None:
        """Stop asking: the request has ended, whether it was answered or given up."""
        task, self._task = self._task, None
        # What renders the request again leads back to this job.
        self.whole = None
        if task is not None:
            task.cancel()
