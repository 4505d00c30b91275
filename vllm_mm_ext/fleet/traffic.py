"""What clients of a fleet ask: made by a seeded generator, request by request, in order of time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# A live session: units come so often, it has so many of them, and every fifth asks for an answer.
UNIT_S = 2.0
_UNITS = 150
_ANSWER_EVERY = 5
# Ids of media of live sessions begin here, those of videos are below.
_OWN_MEDIA = 1 << 48
# Random numbers are drawn so many at a time.
_BLOCK = 4096


class Ask(NamedTuple):
    """A request as its client sends it.

    Attributes:
        at: Seconds from the start; later if the session's last answer is not complete by then.
        session: Number of the conversation.
        media: Number of the medium that comes with the request; -1: none. What came with earlier
            requests of the session stays in its prompts.
        kind: Place of the medium's kind among those of the simulation.
        text: Tokens of text that the request adds to the conversation.
        output: Tokens of the answer, at least 1.
        live: It belongs to a live session, which stays with its replica.
        last: No request of the session follows.
        kept: Later prompts have the answer as it was written; else something as long in its place.
    """

    at: float
    session: int
    media: int = -1
    kind: int = 0
    text: int = 0
    output: int = 1
    live: bool = False
    last: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Traffic:
    """Conversations about popular and less popular videos, and live sessions.

    Attributes:
        requests: How many there are in all.
        rate: Requests a second, but for those of live sessions.
        videos: Different videos.
        zipf: The video of rank r is asked about in proportion to ``r ** -zipf``.
        turns: Turns of a conversation, on average (geometric).
        think_s: Seconds from a turn to the next, on average (exponential).
        kinds: Number of kinds of videos, of which there are equally many.
        text, output: Tokens of a question and of an answer, on average (from half of it on).
        live: Live sessions at a time; each unit of theirs is of the kind after the videos' kinds.
        seed: The same seed gives the same requests.
    """

    requests: int
    rate: float
    videos: int
    zipf: float
    turns: float
    think_s: float
    kinds: int
    text: int
    output: int
    live: int = 0
    seed: int = 0

    def asks(self) -> Iterator[Ask]:
        """The requests, in order of time; memory is that of the conversations under way."""
        return itertools.islice(_Generator(self).run(), self.requests)


class _Drawn:
    """Random numbers one by one, drawn by the block."""

    def __init__(self, draw: Callable[[int], npt.NDArray[np.generic]]) -> None:
        self._draw = draw
        self._left: list[float] = []

    def __call__(self) -> float:
        if not self._left:
            self._left = self._draw(_BLOCK).tolist()
        return self._left.pop()


class _Talk(NamedTuple):
    """The next request of a session: its time, a number that breaks ties, what is left."""

    at: float
    number: int
    session: int
    turn: int
    left: int
    live: bool


class _Generator:
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        rng = np.random.default_rng(traffic.seed)
        ranks = np.arange(1, traffic.videos + 1, dtype=np.float64)
        reach = np.cumsum(ranks**-traffic.zipf)
        reach /= reach[-1]
        self._video = _Drawn(
            lambda count: np.minimum(np.searchsorted(reach, rng.random(count)), traffic.videos - 1)
        )
        self._turns = _Drawn(lambda count: rng.geometric(1 / traffic.turns, count))
        self._wait = _Drawn(lambda count: rng.exponential(1.0, count))
        self._size = _Drawn(lambda count: rng.uniform(0.5, 1.5, count))
        self._numbers = itertools.count()
        self._sessions = itertools.count()

    def run(self) -> Iterator[Ask]:
        traffic = self._traffic
        between = traffic.turns / traffic.rate if traffic.rate else float("inf")
        due: list[_Talk] = []
        for place in range(traffic.live):
            # As if they had begun at other times.
            units = _UNITS - place * _UNITS // traffic.live
            due.append(self._talk(UNIT_S * place / traffic.live, units, live=True))
        # So many conversations think at any time; each goes on as if it had just begun.
        for _ in range(round(traffic.rate * traffic.think_s * (1 - 1 / traffic.turns))):
            at = traffic.think_s * self._wait()
            due.append(self._talk(at, int(self._turns()), live=False))
        heapq.heapify(due)
        opens = between * self._wait()
        while True:
            if not due or opens < due[0].at:
                if opens == float("inf"):
                    return
                heapq.heappush(due, self._talk(opens, int(self._turns()), live=False))
                opens += between * self._wait()
                continue
            talk = due[0]
            yield self._ask(talk)
            if talk.left > 1:
                wait = UNIT_S if talk.live else traffic.think_s * self._wait()
                after = talk._replace(
                    at=talk.at + wait,
                    number=next(self._numbers),
                    turn=talk.turn + 1,
                    left=talk.left - 1,
                )
                heapq.heapreplace(due, after)
            elif talk.live:
                heapq.heapreplace(due, self._talk(talk.at + UNIT_S, _UNITS, live=True))
            else:
                heapq.heappop(due)

    def _talk(self, at: float, left: int, *, live: bool) -> _Talk:
        return _Talk(at, next(self._numbers), next(self._sessions), 0, left, live)

    def _ask(self, talk: _Talk) -> Ask:
        traffic, last = self._traffic, talk.left == 1
        if talk.live:
            media = _OWN_MEDIA + talk.session * _UNITS + talk.turn
            answers = (talk.turn + 1) % _ANSWER_EVERY == 0
            output = self._tokens(traffic.output) if answers else 1
            return Ask(talk.at, talk.session, media, traffic.kinds, 0, output, True, last)
        text, output = self._tokens(traffic.text), self._tokens(traffic.output)
        if talk.turn:
            return Ask(talk.at, talk.session, -1, 0, text, output, False, last)
        media = int(self._video())
        # Whatever their popularity, videos are of all kinds.
        kind = (media * 2_654_435_761 >> 16) % traffic.kinds
        return Ask(talk.at, talk.session, media, kind, text, output, False, last)

    def _tokens(self, mean: int) -> int:
        return max(1, round(mean * self._size()))
