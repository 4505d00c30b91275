"""Questions about long videos to a running server, and what the server did for them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.testing.memory import cpu_seconds
from vllm_mm_ext.testing.server import Server

_ANSWER_TOKENS = 64
_TIMEOUT_S = 3600.0
# After an answer the log of its last steps takes a moment, and workers may still put things away.
_SETTLE_S = 0.5
_POLL_S = 0.02
_STEP = re.compile(
    r"Iteration\(\d+\): \d+ context requests, (\d+) context tokens, \d+ generation requests, "
    r"(\d+) generation tokens(?:.*?encoder inputs: (\d+))?"
)
_GAUGES = re.compile(r"(?m)^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$")


@dataclass(frozen=True)
class LongAnswer:
    """An answer about a long video.

    Attributes:
        text: The answer.
        seconds: From sending the request to the answer's end.
        report: The answer's ``mm_ext.long_video``.
    """

    text: str
    seconds: float
    report: Mapping[str, Any]

    @property
    def windows(self) -> list[dict[str, Any]]:
        """The windows as reported."""
        return list(self.report.get("windows", ()))

    @property
    def notes(self) -> list[str | None]:
        """The note of each window."""
        return [window.get("note") for window in self.windows]


@dataclass(frozen=True)
class Work:
    """What an engine computed.

    Attributes:
        tokens: Tokens of prompts that no cache held, and tokens written.
        encoder_inputs: Items that went through an encoder.
    """

    tokens: int
    encoder_inputs: int


class Asker:
    """Asks one server about long videos.

    Args:
        server: Who is asked; started with ``--enable-logging-iteration-details``.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._client = server.client(timeout=_TIMEOUT_S)

    def ask(
        self, path: Path, question: str, *, salt: str | None = None, options: Mapping[str, Any]
    ) -> LongAnswer:
        """Ask and wait for the answer.

        Args:
            path: The video.
            question: What is asked.
            salt: Of the request's caches: requests with another one share nothing with it.
            options: The request's ``mm_ext`` block.

        Raises:
            openai.APIError: The server refused or failed.
        """
        started = time.perf_counter()
        text = ""
        report: Mapping[str, Any] = {}
        for chunk in self._chunks(path, question, options, salt):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            report = (chunk.model_extra or {}).get("mm_ext", report)
        return LongAnswer(text, time.perf_counter() - started, report.get("long_video", {}))

    def follow(
        self,
        path: Path,
        question: str,
        options: Mapping[str, Any],
        progress: Callable[[int], bool],
    ) -> int:
        """Ask, and close the connection in the middle; windows that were told of.

        Args:
            path: The video.
            question: What is asked.
            options: The request's ``mm_ext`` block.
            progress: Told how many windows are done; True: leave.
        """
        done = 0
        with closing(self._chunks(path, question, options, None)) as chunks:
            for chunk in chunks:
                if "progress" in (chunk.model_extra or {}).get("mm_ext", {}):
                    done += 1
                if progress(done):
                    break
        return done

    def _chunks(
        self, path: Path, question: str, options: Mapping[str, Any], salt: str | None
    ) -> Generator[Any]:
        content: Any = [
            {"type": "video_url", "video_url": {"url": path.as_uri()}},
            {"type": "text", "text": question},
        ]
        extra: dict[str, Any] = {"mm_ext": dict(options)}
        if salt is not None:
            extra["cache_salt"] = salt
        with self._client.chat.completions.create(
            model=self.server.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=_ANSWER_TOKENS,
            temperature=0.0,
            seed=0,
            stream=True,
            extra_body=extra,
        ) as stream:
            yield from stream

    def mark(self) -> int:
        """The present end of the server's log, for ``work_since``."""
        return self.server.log.stat().st_size

    def work_since(self, mark: int) -> Work:
        """What the engine computed since a mark, as vLLM logs it step by step."""
        self.idle_after()
        time.sleep(_SETTLE_S)
        with self.server.log.open("rb") as log:
            log.seek(mark)
            return logged_work(log.read().decode(errors="replace"))

    def idle_after(self) -> float:
        """Wait until the engine has no request; how many seconds that took."""
        started = time.perf_counter()
        while requests_in_engine(self.server.get("/metrics")):
            time.sleep(_POLL_S)
        return time.perf_counter() - started

    def decode_seconds(self) -> float:
        """CPU seconds of the decode workers so far, those that have ended included."""
        ended = psutil.Process(self.server.pid).cpu_times()
        running = cpu_seconds(self.server.pid)["decode"]
        return float(ended.children_user + ended.children_system) + running


def logged_work(log: str) -> Work:
    """What steps computed, from vLLM's log lines about them."""
    steps = [[int(number or 0) for number in match.groups()] for match in _STEP.finditer(log)]
    return Work(
        tokens=sum(prompt + written for prompt, written, _ in steps),
        encoder_inputs=sum(encoded for _, _, encoded in steps),
    )


def requests_in_engine(metrics: str) -> int:
    """Requests that run or wait, from the text of ``/metrics``."""
    return round(sum(float(value) for value in _GAUGES.findall(metrics)))
