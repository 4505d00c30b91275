"""What a simulated fleet did, and what its clients saw."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mm_ext.fleet.quantiles import Quantiles
from vllm_mm_ext.fleet.replica import Running

_LEAST_MEAN = 2.0


@dataclass(frozen=True)
class Waits:
    """Seconds to the first token: quantiles, within 1 %."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Quantiles) -> Waits:
        """Of so many seconds."""
        return cls(seconds.at(0.5), seconds.at(0.9), seconds.at(0.99))


class Tally:
    """Counts, in constant memory.

    Args:
        routing: How requests were sent to replicas.
        replicas: Number of replicas.
        encoders: Number of encoder instances.

    Attributes:
        routing, replicas, encoders: The same.
        sent: Requests of clients.
        answered: Those answered.
        refused: Those whose prompt is longer than the KV cache.
        sent_again: How often a request was sent again, as its replica had died.
        offered_s: From the start to the last request, as clients wanted to send it.
        seconds: From the start to the last answer.
        prompt_tokens, found_tokens: Tokens of prompts, and of these those found in KV caches.
        later_tokens, later_found: The same of requests that go on with a conversation.
        media_tokens: Tokens of the media in prompts...
        encoded_tokens: ...and those that were encoded for them.
        decodes: Media decoded.
        busy_s, encoder_busy_s: Seconds that each engine, and each encoder instance, worked.
    """

    def __init__(self, routing: str, replicas: int, encoders: int) -> None:
        self.routing, self.replicas, self.encoders = routing, replicas, encoders
        self.sent = self.answered = self.refused = self.sent_again = 0
        self.offered_s = self.seconds = 0.0
        self.prompt_tokens = self.found_tokens = 0
        self.later_tokens = self.later_found = 0
        self.media_tokens = self.encoded_tokens = 0
        self.decodes = 0
        self.busy_s: list[float] = []
        self.encoder_busy_s: list[float] = []
        self._first, self._later, self._live = Quantiles(), Quantiles(), Quantiles()
        self._peaks = Quantiles()

    def load(self, requests: int, mean: float) -> None:
        """Note the requests in flight of a replica that has just got one, and the mean of all."""
        # With fewer than two each, one request is half the mean or more.
        if mean >= _LEAST_MEAN:
            self._peaks.add(requests / mean)

    def prompt(self, request: Running) -> None:
        """Note what was found of a prompt that is computed."""
        if not request.measured:
            return
        prompt = request.prompt
        self.prompt_tokens += prompt.tokens
        self.found_tokens += request.found
        if not request.first:
            self.later_tokens += prompt.tokens
            self.later_found += request.found
        self.media_tokens += request.talk.media_tokens
        self.encoded_tokens += request.encoded_tokens

    def first_token(self, request: Running, now: float) -> None:
        """Note that a client has its first token."""
        if not request.measured:
            return
        if request.live:
            # Appends are waited for by nobody.
            if request.prompt.output > 1:
                self._live.add(now - request.sent)
        elif request.first:
            self._first.add(now - request.sent)
        else:
            self._later.add(now - request.sent)

    @property
    def first(self) -> Waits:
        """Waits of first turns."""
        return Waits.of(self._first)

    @property
    def later(self) -> Waits:
        """Waits of turns after the first."""
        return Waits.of(self._later)

    @property
    def live(self) -> Waits:
        """Waits for answers in live sessions."""
        return Waits.of(self._live)

    @property
    def all(self) -> Waits:
        """Waits of all but live sessions."""
        return Waits.of(self._first.with_those_of(self._later))

    @property
    def fullest(self) -> tuple[float, float]:
        """Requests in flight of a replica that gets one, over the mean: 99 in 100 below; most."""
        return self._peaks.at(0.99), self._peaks.at(1.0)
