"""Traffic whose KV accesses are recorded: seeded generators of prompts, five kinds."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vllm_mm_ext.tools.bench.commands import AccessKind


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a prompt; the same number is the same content.

    Attributes:
        video: Whether it is a video; otherwise text.
        number: Which one.
        size: Frames of the video, or words of the text.
    """

    video: bool
    number: int
    size: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        parts: What it consists of.
        session: Name of its conversation, if the client gives one.
    """

    parts: tuple[Part, ...]
    session: str | None = None


_SYSTEM = Part(False, 0, 12)
_FRAMES = (8, 12, 16, 24)
_WORDS = 120
_QUESTION = 10


class _Content:
    """Numbers that nothing else has."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._next = 0

    def text(self, words: int) -> Part:
        """New text."""
        self._next += 1
        return Part(False, self._next, words)

    def video(self) -> Part:
        """A new video."""
        self._next += 1
        return Part(True, self._next, self.rng.choice(_FRAMES))

    def question(self) -> Part:
        """A question, or an answer and the next question."""
        return self.text(self.rng.randint(_QUESTION // 2, 2 * _QUESTION))


@dataclass
class _Talk:
    """A conversation, which ends after some turns."""

    parts: tuple[Part, ...]
    session: str
    think: float = 1.0

    def ask(self, made: _Content, *media: Part) -> Prompt:
        """The next turn."""
        self.parts = (*self.parts, *media, made.question())
        return Prompt(self.parts, self.session)


def rounds(seed: int) -> Iterator[Prompt]:
    """Conversations about a video each that take turns, in another order each round; texts between.

    As in ``bench conversations``.
    """
    made = _Content(random.Random(seed))
    talks = [
        _Talk((_SYSTEM, Part(True, 10_000 + number, 16)), f"talk-{number}") for number in range(12)
    ]
    for _ in range(4):
        for talk in made.rng.sample(talks, len(talks)):
            yield Prompt(talk.ask(made).parts)
            for _ in range(2):
                yield Prompt((_SYSTEM, made.text(_WORDS)))


def conversations(seed: int) -> Iterator[Prompt]:
    """Conversations about videos, with think time; those that end are followed by new ones."""
    return _talks(seed, media=True, others=1.0)


def text_churn(seed: int) -> Iterator[Prompt]:
    """Conversations in text, among texts that nobody continues."""
    return _talks(seed, media=False, others=2.0)


def _talks(seed: int, *, media: bool, others: float) -> Iterator[Prompt]:
    made = _Content(random.Random(seed))
    rng = made.rng

    def new(number: int) -> _Talk:
        start = made.video() if media else made.text(_WORDS)
        return _Talk((_SYSTEM, start), f"talk-{number}", rng.lognormvariate(0.0, 0.4))

    due = [(rng.expovariate(1.0), number, new(number)) for number in range(10)]
    heapq.heapify(due)
    number = len(due)
    for _ in range(100):
        now, _, talk = heapq.heappop(due)
        yield talk.ask(made)
        if rng.random() < 0.25:
            talk = new(number)
        number += 1
        heapq.heappush(due, (now + talk.think * rng.lognormvariate(0.0, 0.6), number, talk))
        for _ in range(int(others + rng.random())):
            yield Prompt((_SYSTEM, made.text(rng.randint(_WORDS // 2, 2 * _WORDS))))


def scans(seed: int) -> Iterator[Prompt]:
    """Questions about videos of which some are popular, and runs over videos seen once."""
    made = _Content(random.Random(seed))
    videos = [made.video() for _ in range(16)]
    weights = [rank**-0.7 for rank in range(1, len(videos) + 1)]
    for _ in range(6):
        for video in made.rng.choices(videos, weights, k=18):
            yield Prompt((_SYSTEM, video, made.question()))
        for _ in range(12):
            yield Prompt((_SYSTEM, made.video(), made.question()))


def growing(seed: int) -> Iterator[Prompt]:
    """Sessions that get another piece of video with each turn, and single videos among them."""
    made = _Content(random.Random(seed))
    rng = made.rng
    talks: list[_Talk] = []
    for number in range(150):
        if rng.random() < 0.3:
            yield Prompt((_SYSTEM, made.video(), made.question()))
            continue
        if len(talks) < 6:
            talks.append(_Talk((_SYSTEM,), f"talk-{number}"))
        talk = rng.choice(talks)
        yield talk.ask(made, made.video())
        if sum(part.video for part in talk.parts) >= 6 or rng.random() < 0.08:
            talks.remove(talk)


def mix(seed: int) -> Iterator[Prompt]:
    """All of these at once."""
    rng = random.Random(seed)
    kinds = [conversations, text_churn, scans, growing]
    # Their contents must differ.
    streams = [
        _apart(kind(seed + 1), 100_000 * (place + 1), kind.__name__)
        for place, kind in enumerate(kinds)
    ]
    for _ in range(240):
        prompt = next(rng.choice(streams), None)
        if prompt is not None:
            yield prompt


def _apart(prompts: Iterator[Prompt], by: int, name: str) -> Iterator[Prompt]:
    for prompt in prompts:
        parts = tuple(
            part if part == _SYSTEM else Part(part.video, part.number + by, part.size)
            for part in prompt.parts
        )
        yield Prompt(parts, prompt.session and f"{name}-{prompt.session}")


TRAFFIC: Mapping[AccessKind, Callable[[int], Iterator[Prompt]]] = {
    AccessKind.rounds: rounds,
    AccessKind.conversations: conversations,
    AccessKind.text_churn: text_churn,
    AccessKind.scans: scans,
    AccessKind.growing: growing,
    AccessKind.mix: mix,
}
# Requests at a time: where it is more than one, their blocks are in use together.
CONCURRENT: Mapping[AccessKind, int] = {AccessKind.mix: 3, AccessKind.text_churn: 2}
