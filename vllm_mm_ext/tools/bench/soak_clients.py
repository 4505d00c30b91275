"""Clients of a soak at work, and what the server's processes hold meanwhile."""

from __future__ import annotations

import math
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai

from vllm_mm_ext.testing.memory import Role
from vllm_mm_ext.testing.server import Server
from vllm_mm_ext.testing.usage import Usage, usage
from vllm_mm_ext.tools.bench.soak_media import SoakMedia
from vllm_mm_ext.tools.bench.soak_work import Question, conversation

# A client that hangs up before the answer does so within this time.
_PATIENCE_S = 0.3
# An answer later than this is none.
_TIMEOUT_S = 120.0
# Faults that are told, and how much the server says of each.
_MAX_FAULTS = 12
_MAX_WORDS = 300
# Samples of a soak at most: each costs the server's processes some of their time.
_MAX_SAMPLES = 600


@dataclass(frozen=True)
class Sample:
    """What the server's processes hold at one moment, in seconds from the first request."""

    at_s: float
    usage: Mapping[Role, Usage]

    def of(self, role: Role | None) -> Usage:
        """The processes of a role together; None: all processes."""
        return sum((held for own, held in self.usage.items() if role in (None, own)), Usage())


@dataclass
class Course:
    """What happened to one server.

    Attributes:
        samples: In their order; the first before any request.
        outcomes: By kind of question and outcome: ``answered``, ``refused``, ``left``, ``failed``.
        faults: What came instead of answers that were due, the first few.
        alive: The server still ran at the end.
    """

    samples: list[Sample] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    alive: bool = True

    def count(self, outcome: str) -> int:
        """Requests with an outcome."""
        return sum(count for (_, found), count in self.outcomes.items() if found == outcome)

    def at(self, at_s: float, value: Callable[[Sample], float]) -> float:
        """Median over the twentieth of the soak before a moment, at least one sample."""
        before = [sample for sample in self.samples if sample.at_s <= at_s]
        window_s = self.samples[-1].at_s / 20
        recent = [sample for sample in before if sample.at_s >= at_s - window_s]
        return statistics.median(value(sample) for sample in recent or before[-1:])


class Soak:
    """Clients at work, and what the server's processes hold meanwhile.

    Args:
        server: Asked by all clients.
        media: What they ask about.
        clients: Conversations at a time.
        seed: Of the work.
    """

    def __init__(self, server: Server, media: SoakMedia, *, clients: int, seed: int = 0) -> None:
        self._server = server
        self._media = media
        self._randoms = [random.Random(f"{seed} {client}") for client in range(clients)]
        self._course = Course()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def run(
        self,
        seconds: float,
        step: Callable[[str], None] = lambda _: None,
        write: Callable[[Sample], None] = lambda _: None,
    ) -> Course:
        """Work for some time.

        Args:
            seconds: For how long; conversations that have begun are brought to their end.
            step: Called about once a second with what to show.
            write: Called with each sample.
        """
        began = time.monotonic()
        self._sample(0.0, write)
        every = math.ceil(seconds / _MAX_SAMPLES)
        with ThreadPoolExecutor(len(self._randoms)) as clients:
            work = [clients.submit(self._converse, rng) for rng in self._randoms]
            try:
                for second in range(1, int(seconds) + 1):
                    time.sleep(max(0.0, began + second - time.monotonic()))
                    step(f"minute {second // 60 + 1}, {self._course.outcomes.total()} requests")
                    if second % every == 0:
                        self._sample(time.monotonic() - began, write)
                    if not self._server.alive():
                        break
            finally:
                self._ended.set()
            for client in work:
                client.result()
        self._course.alive = self._server.alive()
        return self._course

    def _sample(self, at_s: float, write: Callable[[Sample], None]) -> None:
        sample = Sample(at_s, usage(self._server.pid))
        self._course.samples.append(sample)
        write(sample)

    def _converse(self, rng: random.Random) -> None:
        with self._server.client(timeout=_TIMEOUT_S) as client:
            while not self._ended.is_set() and self._server.alive():
                with conversation(self._media, rng) as questions:
                    for question in questions:
                        self._note(question, *self._ask(client, question, rng))

    def _ask(
        self, client: openai.OpenAI, question: Question, rng: random.Random
    ) -> tuple[str, str]:
        """What became of a question, and what the server said where it did not answer."""
        hangs_up = question.leaves == "before the answer"
        timeout = rng.uniform(0.01, _PATIENCE_S) if hangs_up else _TIMEOUT_S
        try:
            answer: Any = client.with_options(timeout=timeout).chat.completions.create(
                model=self._server.model, **question.body
            )
            if question.body["stream"]:
                with answer:
                    for _ in answer:
                        if question.leaves == "after a token":
                            return "left", ""
        except openai.APIStatusError as error:
            outcome = "failed" if error.status_code >= 500 else "refused"
            return outcome, f"{error.status_code}: {error.message}"
        except openai.APIError as error:
            if hangs_up and isinstance(error, openai.APITimeoutError):
                return "left", ""
            return "failed", repr(error)
        except Exception as error:  # A fault of the client must not end the soak unreported.
            return "failed", f"the client raised {error!r}"
        return "answered", ""

    def _note(self, question: Question, outcome: str, words: str) -> None:
        with self._lock:
            self._course.outcomes[question.kind, outcome] += 1
            fault = outcome == "failed" or (outcome == "refused" and question.must_answer)
            if fault and len(self._course.faults) < _MAX_FAULTS:
                self._course.faults.append(f"{question.kind}: {words[:_MAX_WORDS]}")
