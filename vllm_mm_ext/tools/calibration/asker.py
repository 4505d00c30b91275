"""Sends requests of a workload to a server and takes the times of their answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import string
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

from vllm_mm_ext.planner.estimate import Timing
from vllm_mm_ext.planner.workload import Workload
from vllm_mm_ext.testing.server import MODEL_NAME
from vllm_mm_ext.tools.calibration.media_files import parts_of

_STAGE = re.compile(r"mm_(\w+);dur=([\d.]+)")
_LETTERS = string.ascii_lowercase + " "
_TIMEOUT_S = 600.0
_REPLY, _QUESTION = "There are shapes that move.", "What comes after that?"
# Letters of the text that tells how many of them make a token.
_SAMPLE = 4000


@dataclass(frozen=True)
class Asked:
    """A request and what became of it.

    Attributes:
        key: By which the server knows it.
        workload: What it holds.
        timing: When it was sent and answered, on the monotonic clock that all processes share.
        prompt_tokens: Of its prompt, as the server counts them.
        stages: Seconds of the API server's stages, by name.
    """

    key: str
    workload: Workload
    timing: Timing
    prompt_tokens: int
    stages: dict[str, float] = field(default_factory=dict)


class Asker:
    """Asks a server.

    Args:
        session: A session without a limit of connections.
        url: The server's base URL.
        folder: Where media files are kept.
        first: Number of the first request, of which its media follow.
        model: Name of the model.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        folder: Path,
        *,
        first: int = 0,
        model: str = MODEL_NAME,
    ) -> None:
        self._session, self._url, self._folder, self._model = session, url, folder, model
        self._numbers = itertools.count(first)
        self._random = random.Random(first)
        self._letters_per_token = 0.0

    @classmethod
    @asynccontextmanager
    async def of(cls, url: str, folder: Path, *, first: int = 0) -> AsyncIterator[Self]:
        """An asker with a session of its own."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            yield cls(session, url, folder, first=first)

    async def prepare(self, workload: Workload, count: int) -> list[dict[str, Any]]:
        """Bodies of requests, with all files made that they name.

        Args:
            workload: What each holds.
            count: How many.
        """
        return [await self._body(workload) for _ in range(count)]

    def follow_up(self, body: dict[str, Any]) -> dict[str, Any]:
        """Body of a request that goes on after an answer to another one.

        Args:
            body: Of the other one.
        """
        messages = [
            *body["messages"],
            {"role": "assistant", "content": _REPLY},
            {"role": "user", "content": _QUESTION},
        ]
        return {**body, "messages": messages, "request_id": f"ask-{next(self._numbers)}-"}

    async def one(self, workload: Workload, body: dict[str, Any]) -> Asked:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: It was refused or broke off; the message has the server's answer.
        """
        sent = time.monotonic()
        first, usage = 0.0, {}
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:500]}")
            stages = response.headers.get("Server-Timing", "")
            async for line in response.content:
                if not first and line.startswith(b"data: {"):
                    first = time.monotonic()
                if b'"usage":{' in line:
                    usage = json.loads(line[6:])["usage"]
        if not usage:
            raise RuntimeError("an answer broke off before its end; the server's log says why")
        timing = Timing(sent, first, time.monotonic(), int(usage["completion_tokens"]))
        seconds = {name: float(ms) / 1e3 for name, ms in _STAGE.findall(stages)}
        return Asked(body["request_id"], workload, timing, int(usage["prompt_tokens"]), seconds)

    async def clients(
        self, workload: Workload, concurrency: int, bodies: Sequence[dict[str, Any]]
    ) -> list[Asked]:
        """Have clients send requests, each the next one after an answer.

        Args:
            workload: What each request holds.
            concurrency: The clients.
            bodies: The requests.
        """
        left, found = iter(bodies), []

        async def client() -> None:
            for body in left:
                found.append(await self.one(workload, body))

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return found

    async def _body(self, workload: Workload) -> dict[str, Any]:
        number = next(self._numbers)
        # Clips are made in a thread, so that what else is going on is not held up.
        parts = await asyncio.to_thread(parts_of, workload, self._folder, number)
        text = await self._text(workload.text)
        body: dict[str, Any] = {
            "model": self._model,
            "request_id": f"ask-{number}-",
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": workload.output,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if workload.videos:
            # Under load the server would deliver less than the workload says.
            body["mm_ext"] = {"fps": workload.fps, "quality": "fixed"}
        return body

    async def _text(self, tokens: int) -> str:
        """Text of about so many tokens, that is like no other from its beginning on."""
        if not self._letters_per_token:
            sample = "".join(self._random.choices(_LETTERS, k=_SAMPLE))
            body = {"model": self._model, "prompt": sample, "add_special_tokens": False}
            async with self._session.post(f"{self._url}/tokenize", json=body) as response:
                self._letters_per_token = _SAMPLE / int((await response.json())["count"])
        return "".join(self._random.choices(_LETTERS, k=round(tokens * self._letters_per_token)))
