"""A simulated replica, and a simulated encoder instance: front-end, caches and steps."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_mm_ext.fleet.encoder_outputs import EncoderOutputs
from vllm_mm_ext.fleet.fluid_engine import Ended, FluidEngine, PromptWork
from vllm_mm_ext.fleet.front import Front
from vllm_mm_ext.fleet.prompt_cache import Held, Prompt, PromptCache, pieces_of
from vllm_mm_ext.fleet.shapes import MediumCosts, ReplicaShape
from vllm_mm_ext.fleet.shared_cores import SharedCores

# Sums of seconds are off by less.
_ROUNDING = 1e-9


@dataclass(slots=True)
class Conversation:
    """What a session's prompts hold by now.

    Attributes:
        number: The session's.
        media: Number, kind and end in the prompt of each medium.
        tokens: Tokens of the prompt so far: what was asked, and all answers.
        media_tokens: Tokens of all media.
        head: Name of the first medium, if it stands at the beginning; else "".
        head_pieces: Pieces of its KV.
        rest_key: What the KV of all that follows is known by.
    """

    number: int
    media: list[tuple[int, int, int]] = field(default_factory=list)
    tokens: int = 0
    media_tokens: int = 0
    head: str = ""
    head_pieces: tuple[tuple[bytes, int], ...] = ()
    rest_key: bytes = b""

    def say(self, media: int, kind: int, media_tokens: int, text: int, items: int = 1) -> None:
        """Add what a request brings.

        Args:
            media: Number of its medium; -1: none.
            kind: The medium's kind.
            media_tokens: Its tokens.
            text: Tokens of text.
            items: The medium's mm items.
        """
        if not self.tokens:
            if media >= 0:
                self.head = str(media)
                self.head_pieces = pieces_of(self.head, media_tokens, items)
            self.rest_key = f"{self.number} after {self.head}".encode()
        if media >= 0:
            self.media.append((media, kind, self.tokens + media_tokens))
            self.tokens += media_tokens
            self.media_tokens += media_tokens
        self.tokens += text

    def prompt(self, output: int, *, kept: bool = True) -> Prompt:
        """The prompt as it is now.

        Args:
            output: Tokens of its answer.
            kept: Later prompts have the answer as it was written.
        """
        return Prompt(self.head, self.head_pieces, self.tokens, output, kept, self.rest_key)


@dataclass(slots=True, eq=False)
class Running:
    """A request on its way.

    Attributes:
        talk: Its conversation.
        prompt: Its prompt.
        sent: When its client sent it.
        first: It begins a conversation.
        live: It belongs to a live session.
        last: No request of the session follows.
        measured: It counts for the figures.
        replica: Where it is; -1: nowhere.
        encoded_at: When encoder instances have encoded what it needs.
        told: Its client has the first token.
        found: Tokens of the prompt that were cached, by the last attempt.
        encoded_tokens: Tokens of its media that were encoded for it, by the last attempt.
        held: What it has of the KV cache.
    """

    talk: Conversation
    prompt: Prompt
    sent: float
    first: bool
    live: bool
    last: bool
    measured: bool
    replica: int = -1
    encoded_at: float = -math.inf
    told: bool = False
    found: int = 0
    encoded_tokens: int = 0
    held: Held | None = None


class Replica:
    """An engine with its API server.

    Args:
        shape: What it has room for, and what work costs.
        kinds: The kinds of media.
        encodes: It encodes itself; otherwise encoder instances have done so for it.

    Attributes:
        running: Requests that it has, from their coming on.
    """

    def __init__(
        self, shape: ReplicaShape, kinds: Sequence[MediumCosts], *, encodes: bool = True
    ) -> None:
        self._shape, self._kinds, self._encodes = shape, kinds, encodes
        self.running: dict[Running, None] = {}
        self._busy_s = 0.0
        self._decodes = 0
        self._numbers = itertools.count()
        self._start()

    def _start(self) -> None:
        shape = self._shape
        # Front-end and engine work on this clock.
        self._clock = SharedCores(shape.cores)
        self._front = Front(
            shape.rates.host, shape.decode_workers, shape.decoded_bytes, self._clock
        )
        # Requests that are read, by when that is over; and those that encoder instances work for.
        self._read: list[tuple[float, int, Running]] = []
        self._encoding: list[tuple[float, int, Running]] = []
        self._outputs = EncoderOutputs(max(shape.device_bytes, shape.host_bytes))
        self._cache = PromptCache(shape.kv_blocks, shape.block_size, shape.hidden_size)
        self._cache.retention.encoded = self._outputs.holds
        self._engine: FluidEngine[Running] = FluidEngine(
            shape.rates.step, shape.slots, shape.step_tokens, self._admit
        )

    @property
    def busy_s(self) -> float:
        """How long the engine's steps have run."""
        return self._busy_s + self._engine.busy_s

    @property
    def decodes(self) -> int:
        """Media decoded."""
        return self._decodes + self._front.decodes

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt is not too long."""
        return self._cache.fits(prompt)

    def receive(self, now: float, request: Running) -> None:
        """Read a request with its media; the engine gets it after that."""
        self.running[request] = None
        own = self._clock.own(now)
        ready = read = self._front.request(own)
        for number, kind, _ in _sent(request):
            ready = max(ready, self._front.medium(read, number, self._kinds[kind]))
        heapq.heappush(self._read, (ready, next(self._numbers), request))

    def lacking(self, request: Running) -> list[tuple[int, int]]:
        """Number and kind of the media whose outputs a request will need and nobody has here."""
        return self._lacking(request, self._cache.found(request.prompt))

    def _lacking(self, request: Running, found: int) -> list[tuple[int, int]]:
        lacking = []
        for media, kind, end in reversed(request.talk.media):
            if end <= found:
                break
            if not self._outputs.holds(str(media)):
                lacking.append((media, kind))
        return lacking

    def next_event(self) -> float:
        """When something happens next; infinity if nothing will."""
        own = self._engine.next_event()
        if self._read:
            own = min(own, self._read[0][0])
        at = self._clock.when(own)
        return min(at, self._encoding[0][0]) if self._encoding else at

    def run(self, now: float) -> Ended[Running]:
        """Go on to a time, not after ``next_event``; says who got a first token or an answer."""
        own = self._clock.own(now)
        ended = self._engine.run(own)
        for request in ended.first:
            assert request.held is not None
            self._cache.computed(request.held)
        for request in ended.answered:
            assert request.held is not None
            self._cache.release(request.held)
            request.held = None
            del self.running[request]
        while self._read and self._read[0][0] <= own + _ROUNDING:
            request = heapq.heappop(self._read)[2]
            if request.encoded_at > now:
                place = (request.encoded_at, next(self._numbers), request)
                heapq.heappush(self._encoding, place)
            else:
                self._arrive(own, request)
        while self._encoding and self._encoding[0][0] <= now:
            self._arrive(own, heapq.heappop(self._encoding)[2])
        self._clock.engine = self._shape.rates.host.engine_threads if self._engine.works else 0.0
        return ended

    def _arrive(self, own: float, request: Running) -> None:
        """A request reaches the engine."""
        found = self._cache.found(request.prompt)
        seconds = self._prefill_s(request.prompt, found) + self._inputs_s(request)
        encoding = 0.0
        if self._encodes:
            encoding = sum(self._kinds[kind].encode_s for _, kind in self._lacking(request, found))
        # One that is to be encoded passes one that is under way only if half as much is left of it.
        rank = 2 * (seconds + encoding) if encoding else seconds
        self._engine.add(own, request, request.prompt.tokens, request.prompt.output, rank)

    def die(self, now: float) -> list[Running]:
        """Lose everything; returns the requests that were there."""
        self._engine.run(min(self._clock.own(now), self._engine.next_event()))
        self._busy_s, self._decodes = self.busy_s, self.decodes
        lost = list(self.running)
        for request in lost:
            request.held = None
        self.running.clear()
        self._start()
        return lost

    def _inputs_s(self, request: Running) -> float:
        return sum(self._kinds[kind].inputs_s for _, kind, _ in _sent(request))

    def _prefill_s(self, prompt: Prompt, found: int) -> float:
        costs, tokens = self._shape.rates.step, prompt.tokens - found
        return costs.prefill * tokens + costs.pairs * tokens * (found + tokens / 2)

    def _admit(self, request: Running) -> PromptWork | None:
        held = self._cache.admit(request.prompt)
        if held is None:
            return None
        request.held, request.found = held, held.found
        if self._encodes or request.live:
            request.encoded_tokens = 0
        encoding = 0.0
        for media, kind, end in reversed(request.talk.media):
            if end <= held.found:
                break
            encoding += self._encode(request, media, self._kinds[kind], held.found, end)
        seconds = self._prefill_s(request.prompt, held.found) + encoding + self._inputs_s(request)
        return PromptWork(seconds, request.prompt.tokens - held.found, encoding > 0)

    def _encode(
        self, request: Running, media: int, costs: MediumCosts, found: int, end: int
    ) -> float:
        """Have the outputs of a medium that prefill needs; returns the seconds of encoding them."""
        parts = self._outputs.parts(costs.items, costs.output_bytes)
        cached = max(0, found - (end - costs.tokens))
        first = cached * parts // max(1, costs.tokens)
        encoded = self._outputs.use(str(media), parts, first, costs.output_bytes, costs.encode_s)
        if not self._encodes and not request.live:
            return 0.0
        request.encoded_tokens += costs.tokens * encoded // parts
        return costs.encode_s * encoded / parts


def _sent(request: Running) -> list[tuple[int, int, int]]:
    """Number, kind and end of the media that a request brings or repeats."""
    media = request.talk.media
    # What came before in a live session is part of the session.
    return media[-1:] if request.live else media


class EncoderInstance:
    """A server that encodes for others, one request after the other.

    Args:
        shape: What it has room for, and what work costs.
        kinds: The kinds of media.

    Attributes:
        busy_s: How long its engine has worked.
    """

    def __init__(self, shape: ReplicaShape, kinds: Sequence[MediumCosts]) -> None:
        self._costs, self._kinds = shape.rates, kinds
        self._front = Front(
            shape.rates.host, shape.decode_workers, shape.decoded_bytes, SharedCores()
        )
        self._outputs = EncoderOutputs(max(shape.device_bytes, shape.host_bytes))
        self._free = self.busy_s = 0.0

    @property
    def decodes(self) -> int:
        """Media decoded."""
        return self._front.decodes

    def serve(self, now: float, request: Running, media_kinds: Sequence[tuple[int, int]]) -> float:
        """Have the outputs of media that a request needs.

        Args:
            now: When it asks.
            request: The request.
            media_kinds: Number and kind of each medium.

        Returns:
            When all are there.
        """
        ready = read = self._front.request(now)
        for media, kind in media_kinds:
            costs = self._kinds[kind]
            decoded = self._front.medium(read, media, costs)
            parts = self._outputs.parts(costs.items, costs.output_bytes)
            encoded = self._outputs.use(str(media), parts, 0, costs.output_bytes, costs.encode_s)
            request.encoded_tokens += costs.tokens * encoded // parts
            step = self._costs.step
            took = (step.step + step.encodes + costs.encode_s * encoded / parts) if encoded else 0.0
            self.busy_s += took
            begins = max(decoded, self._free) if encoded else decoded
            self._free = max(self._free, begins + took)
            ready = max(ready, begins + took)
        return ready
