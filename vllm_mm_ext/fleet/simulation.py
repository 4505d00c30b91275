"""A fleet on a simulated clock: requests through a router to replicas with their real policies."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vllm_mm_ext.fleet.replica import Conversation, EncoderInstance, Replica, Running
from vllm_mm_ext.fleet.shapes import MediumCosts, ReplicaShape
from vllm_mm_ext.fleet.simulated_routers import ROUTERS, Hashed
from vllm_mm_ext.fleet.tally import Tally
from vllm_mm_ext.fleet.traffic import Ask

# What happens: a replica has news, a replica dies, a replica is back.
_NEWS, _DIE, _RETURN = range(3)
# Requests after which progress is told.
_TOLD_EVERY = 10_000


@dataclass(frozen=True)
class Fleet:
    """A fleet.

    Attributes:
        shape: Each replica.
        kinds: The kinds of media.
        replicas: How many there are.
        encoders: Encoder instances, as large as replicas; 0: replicas encode themselves.
    """

    shape: ReplicaShape
    kinds: tuple[MediumCosts, ...]
    replicas: int
    encoders: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica that dies, with all that it holds, and comes back empty.

    Attributes:
        at: When it dies, in seconds.
        replica: Which one.
        back: When it serves again.
    """

    at: float
    replica: int
    back: float


def random_failures(
    count: int, replicas: int, seconds: float, down_s: float, seed: int
) -> tuple[Failure, ...]:
    """Failures spread over a time, in its order.

    Args:
        count: How many.
        replicas: Of so many replicas.
        seconds: The time.
        down_s: Seconds until a replica is back.
        seed: The same seed gives the same failures.
    """
    source = random.Random(seed)
    times = sorted(source.uniform(0, seconds) for _ in range(count))
    return tuple(Failure(at, source.randrange(replicas), at + down_s) for at in times)


@dataclass(slots=True)
class _Session:
    """A conversation under way: what it asks next while an answer is being written."""

    talk: Conversation
    replica: int = -1
    asking: bool = False
    waiting: deque[Ask] = field(default_factory=deque)


def simulate(
    fleet: Fleet,
    asks: Iterable[Ask],
    routing: str,
    *,
    failures: Sequence[Failure] = (),
    unmeasured: int = 0,
    clients: float = math.inf,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Serve requests.

    A request is sent at its time, or when the last answer of its session is complete, if that is
    later. What a replica had when it died is sent again at once.

    Args:
        fleet: What serves.
        asks: The requests, in order of time.
        routing: A name of ``ROUTERS``.
        failures: Replicas that die, in order of time.
        unmeasured: The first requests, which find caches empty and count for nothing.
        clients: Requests asked and not answered at a time: the next one waits for an answer, even
            if its time has come.
        seed: Of random choices.
        progress: Is called now and then with the number of requests sent so far.

    Returns:
        What clients saw and what the fleet did.
    """
    run = _Simulation(fleet, routing, failures, unmeasured, seed)
    run.play(iter(asks), clients, progress)
    return run.tally


class _Simulation:
    def __init__(
        self, fleet: Fleet, routing: str, failures: Sequence[Failure], unmeasured: int, seed: int
    ) -> None:
        self._fleet = fleet
        encodes = not fleet.encoders
        self._replicas = [
            Replica(fleet.shape, fleet.kinds, encodes=encodes) for _ in range(fleet.replicas)
        ]
        self._encoders = [EncoderInstance(fleet.shape, fleet.kinds) for _ in range(fleet.encoders)]
        self._encoder_router = Hashed(by_media=True)
        if self._encoders:
            self._encoder_router.serve_by(range(fleet.encoders))
        self._router = ROUTERS[routing](seed)
        self._serving = dict.fromkeys(range(fleet.replicas))
        self._router.serve_by(list(self._serving))
        self._loads = [0] * fleet.replicas
        self._total = 0
        # Requests of a time when no replica serves.
        self._stranded: deque[Running] = deque()
        self._sessions: dict[int, _Session] = {}
        self._events: list[tuple[float, int, int, int]] = []
        self._numbers = itertools.count()
        # When each replica is expected to have news, so that it is written down once.
        self._expected = [math.inf] * fleet.replicas
        self._unmeasured = unmeasured
        self.tally = Tally(routing, fleet.replicas, fleet.encoders)
        for failure in failures:
            self._later(failure.at, _DIE, failure.replica)
            self._later(failure.back, _RETURN, failure.replica)

    def play(self, asks: Iterator[Ask], clients: float, progress: Callable[[int], None]) -> None:
        """Serve all requests."""
        events, sent, now = self._events, 0, 0.0
        coming = next(asks, None)
        while True:
            at = math.inf if coming is None else max(now, coming.at)
            over = self.tally.answered + self.tally.refused
            if coming is not None and sent - over < clients and (not events or at <= events[0][0]):
                now = at
                self._ask(now, coming)
                self.tally.offered_s = now
                coming = next(asks, None)
                sent += 1
                if not sent % _TOLD_EVERY:
                    progress(sent)
                continue
            # What is still to fail or to return when all is answered changes nothing.
            if not events or (coming is None and not self._total and not self._stranded):
                break
            now, _, kind, replica = heapq.heappop(events)
            self._happen(now, kind, replica)
        progress(sent)
        self.tally.busy_s = [replica.busy_s for replica in self._replicas]
        self.tally.encoder_busy_s = [encoder.busy_s for encoder in self._encoders]
        self.tally.decodes = sum(replica.decodes for replica in self._replicas)
        self.tally.decodes += sum(encoder.decodes for encoder in self._encoders)

    def _happen(self, now: float, kind: int, replica: int) -> None:
        if kind == _DIE:
            self._die(now, replica)
        elif kind == _RETURN:
            self._return(now, replica)
        elif self._expected[replica] <= now:
            self._expected[replica] = math.inf
            self._run(now, replica)

    def _later(self, at: float, kind: int, replica: int) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, replica))

    def _expect(self, replica: int) -> None:
        at = self._replicas[replica].next_event()
        if at < math.inf and at != self._expected[replica]:
            self._expected[replica] = at
            self._later(at, _NEWS, replica)

    # --- requests ---------------------------------------------------------------------------------

    def _ask(self, now: float, ask: Ask) -> None:
        session = self._sessions.get(ask.session)
        if session is None:
            session = self._sessions[ask.session] = _Session(Conversation(ask.session))
        session.waiting.append(ask)
        self._go_on(now, ask.session)

    def _go_on(self, now: float, number: int) -> None:
        """Send what waits until a request is under way; one that is refused is over at once."""
        while (session := self._sessions.get(number)) and session.waiting and not session.asking:
            self._send(now, session, session.waiting.popleft())

    def _send(self, now: float, session: _Session, ask: Ask) -> None:
        talk = session.talk
        first = not talk.tokens
        costs = self._fleet.kinds[ask.kind]
        media_tokens = costs.tokens if ask.media >= 0 else 0
        talk.say(ask.media, ask.kind, media_tokens, ask.text, costs.items)
        measured = self.tally.sent >= self._unmeasured
        self.tally.sent += 1
        prompt = talk.prompt(ask.output, kept=ask.kept)
        request = Running(talk, prompt, now, first, ask.live, ask.last, measured)
        session.asking = True
        if self._replicas[0].fits(prompt):
            self._dispatch(now, request)
        else:
            self.tally.refused += 1
            self._close(request)

    def _dispatch(self, now: float, request: Running) -> None:
        """Send a request, for the first time or again."""
        session = self._sessions[request.talk.number]
        if not self._serving:
            self._stranded.append(request)
            return
        where = session.replica
        if where < 0:
            media = request.talk.media[0][0] if request.talk.media else -1
            where = self._router.choose(request.talk.number, media, self._loads, self._total)
            self._loads[where] += 1
            self._total += 1
            self.tally.load(self._loads[where], self._total / len(self._serving))
            if request.live:
                # Its WebSocket is a request in flight until the session ends.
                session.replica = where
        request.replica = where
        replica = self._replicas[where]
        replica.receive(now, request)
        request.encoded_at = -math.inf
        if self._encoders and not request.live:
            request.encoded_tokens = 0
            # Asked while this replica's front-end is at work.
            if lacking := replica.lacking(request):
                first = request.talk.media[0][0]
                encoder = self._encoders[self._encoder_router.choose(0, first, (), 0)]
                request.encoded_at = encoder.serve(now, request, lacking)
        self._expect(where)

    def _run(self, now: float, where: int) -> None:
        ended = self._replicas[where].run(now)
        for request in ended.first:
            self.tally.prompt(request)
            if not request.told:
                request.told = True
                self.tally.first_token(request, now)
        self._expect(where)
        for request in ended.answered:
            self.tally.answered += 1
            self.tally.seconds = now
            self._close(request)
            self._go_on(now, request.talk.number)

    def _close(self, request: Running) -> None:
        """Note in its session that a request is over."""
        number = request.talk.number
        session = self._sessions[number]
        session.asking = False
        request.talk.tokens += request.prompt.output
        where = session.replica if request.live else request.replica
        if where >= 0 and (request.last or not request.live):
            self._loads[where] -= 1
            self._total -= 1
        if request.last:
            del self._sessions[number]
            if session.waiting:
                # A trace may go on with the number: as another conversation.
                self._sessions[number] = _Session(Conversation(number), waiting=session.waiting)

    # --- failures ---------------------------------------------------------------------------------

    def _die(self, now: float, where: int) -> None:
        if where not in self._serving:
            return
        del self._serving[where]
        if self._serving:
            self._router.serve_by(list(self._serving))
        lost = self._replicas[where].die(now)
        self._expected[where] = math.inf
        self._total -= self._loads[where]
        self._loads[where] = 0
        for session in self._sessions.values():
            if session.replica == where:
                session.replica = -1
        for request in lost:
            request.replica = -1
            self.tally.sent_again += 1
            self._dispatch(now, request)

    def _return(self, now: float, where: int) -> None:
        if where in self._serving:
            return
        self._serving[where] = None
        self._router.serve_by(sorted(self._serving))
        stranded, self._stranded = self._stranded, deque()
        for request in stranded:
            self._dispatch(now, request)
