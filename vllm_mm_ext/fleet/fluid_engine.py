"""An engine's steps on a simulated clock, without a step for each token.

The contents of steps cost what the planner says. While requests only decode, steps flow: nothing is
simulated until an answer ends or a prompt comes. What is left of a long prompt is computed in as
many steps at once as it takes. Only steps in which prompts end are looked at one by one.

Prompts go in the order of the plugin's scheduler: those with the least to do first, of those about
as large the first to come, and before them those that have waited for half of ``aging_s``; beside
decodes a step has ``target_itl_ms``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from vllm_mm_ext.config.scheduler_settings import SchedulerSettings
from vllm_mm_ext.planner.step_costs import StepCosts
from vllm_mm_ext.policies.scheduler.step_plan import AGED_AFTER, LEAST_SHARE

T = TypeVar("T")

_SETTINGS = SchedulerSettings()
_TARGET_S = _SETTINGS.target_itl_ms / 1e3
_IDLE_STEP_S = _SETTINGS.encoder_step_idle_ms / 1e3
_AGED_S = AGED_AFTER * _SETTINGS.aging_s
# Sums of seconds are off by less.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What a prompt needs of steps.

    Attributes:
        seconds: All its work in steps, without what each step costs by itself.
        tokens: Prompt tokens to compute.
        encodes: Whether anything is encoded for it.
    """

    seconds: float
    tokens: int
    encodes: bool


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """A request in the engine.

    Attributes:
        request: Whose it is.
        came: When it came.
        prompt: Tokens of its prompt.
        output: Tokens of its answer.
        rank: What it needs by its coming, in seconds: the lowest goes first.
        number: Its place in the order of coming.
        work: What it needs; None until it has a slot.
        left_s: Seconds of that which are not done.
    """

    request: T
    came: float
    prompt: int
    output: int
    rank: float
    number: int
    work: PromptWork | None = None
    left_s: float = 0.0


class _Phase(Enum):
    idle = 0
    """Nothing to do."""
    decodes = 1
    """Steps that only decode."""
    bulk = 2
    """Steps filled by one prompt, which goes on after them."""
    ends = 3
    """The step in which prompts end."""


@dataclass(slots=True)
class Ended(Generic[T]):
    """What happened in an engine: first tokens, and complete answers."""

    first: list[T] = field(default_factory=list)
    answered: list[T] = field(default_factory=list)


class FluidEngine(Generic[T]):
    """An engine.

    Args:
        costs: What steps cost.
        slots: ``--max-num-seqs``.
        step_tokens: ``--max-num-batched-tokens``.
        admit: Gives a request its room in the KV cache and says what is left to do; None while
            there is no room.

    Attributes:
        now: The clock, in seconds.
        busy_s: How long steps ran.
    """

    def __init__(
        self,
        costs: StepCosts,
        slots: int,
        step_tokens: int,
        admit: Callable[[T], PromptWork | None],
    ) -> None:
        self._costs = costs
        self._slots = slots
        self._step_tokens = step_tokens
        self._admit = admit
        self.now = self.busy_s = 0.0
        self._numbers = itertools.count()
        # Steps since the start; each gives a token to all that decode.
        self._steps = 0.0
        self._decoding: list[tuple[float, int, Job[T]]] = []
        self._context = 0.0
        self._waiting: list[tuple[float, int, Job[T]]] = []
        self._came: deque[Job[T]] = deque()
        self._started: list[Job[T]] = []
        self._phase = _Phase.idle
        self._until = math.inf
        self._step_s = 1.0
        # Of a step of the phase: seconds that go into the prompt.
        self._share_s = 0.0
        self._ending: list[Job[T]] = []

    @property
    def works(self) -> bool:
        """Whether a step is under way."""
        return self._phase is not _Phase.idle

    def add(self, now: float, request: T, prompt: int, output: int, rank: float) -> None:
        """A request comes.

        Args:
            now: The clock.
            request: The request.
            prompt: Tokens of its prompt.
            output: Tokens of its answer.
            rank: What it is expected to need, in seconds.
        """
        self._pass(now)
        job = Job(request, now, prompt, output, rank, next(self._numbers))
        heapq.heappush(self._waiting, (_size(rank), job.number, job))
        self._came.append(job)
        if self._phase is _Phase.idle:
            self._begin()
        elif self._phase is _Phase.decodes or (
            self._phase is _Phase.bulk and _size(rank) < _size(self._started[0].left_s)
        ):
            # On average half of the step under way is over.
            self._until = min(self._until, now + self._step_s / 2)

    def next_event(self) -> float:
        """When something happens next; infinity if nothing will."""
        if not self._decoding or self._phase is _Phase.ends:
            return self._until
        left = self._decoding[0][0] - self._steps
        return min(self._until, self.now + max(0.0, left) * self._step_s)

    def run(self, now: float) -> Ended[T]:
        """Go on to a time, which is not after ``next_event``."""
        self._pass(now)
        ended: Ended[T] = Ended()
        over = self._until <= now + _ROUNDING
        if over and self._phase is _Phase.ends:
            self._end_prompts(ended)
        reached = self._steps + 1e-6
        slots_before = len(self._decoding)
        if self._phase is not _Phase.ends or over:
            while self._decoding and self._decoding[0][0] <= reached:
                job = heapq.heappop(self._decoding)[2]
                self._context -= job.prompt + job.output
                ended.answered.append(job.request)
        freed = len(self._decoding) < slots_before
        if not self._decoding:
            # What rounding has left.
            self._context = 0.0
        if over or (freed and self._phase is not _Phase.bulk):
            self._begin()
        elif freed:
            self._bulk()
        return ended

    def drop_all(self) -> None:
        """Forget all requests: the engine has died."""
        self._decoding.clear()
        self._waiting.clear()
        self._came.clear()
        self._started.clear()
        self._ending.clear()
        self._context = 0.0
        self._rest(_Phase.idle)

    def _pass(self, now: float) -> None:
        """Let time pass in which nothing ends."""
        seconds = now - self.now
        self.now = now
        if seconds <= 0.0 or self._phase is _Phase.idle:
            return
        self.busy_s += seconds
        steps = seconds / self._step_s
        self._steps += steps
        self._context += steps * len(self._decoding)
        if self._phase is _Phase.bulk:
            self._started[0].left_s -= steps * self._share_s

    def _end_prompts(self, ended: Ended[T]) -> None:
        for job in self._ending:
            ended.first.append(job.request)
            if job.output == 1:
                ended.answered.append(job.request)
                continue
            self._context += job.prompt + 1
            place = (self._steps + job.output - 1, next(self._numbers), job)
            heapq.heappush(self._decoding, place)
        self._ending.clear()
        self._rest(_Phase.idle)

    def _rest(self, phase: _Phase) -> None:
        self._phase, self._until = phase, math.inf
        self._step_s, self._share_s = max(self._base_s(), _ROUNDING), 0.0

    def _base_s(self) -> float:
        """Seconds of a step without prompts."""
        costs = self._costs
        decoding = len(self._decoding)
        return costs.step + costs.decodes * decoding + costs.decode_context * self._context

    def _begin(self) -> None:
        """Decide what the next steps hold."""
        job = self._next()
        if job is None:
            self._rest(_Phase.decodes if self._decoding else _Phase.idle)
            return
        room = self._room(job)
        if job.left_s > room:
            self._started.remove(job)
            self._started.insert(0, job)
            self._bulk()
            return
        encodes, seconds = False, 0.0
        while job is not None and seconds + job.left_s <= room:
            assert job.work is not None
            self._started.remove(job)
            self._ending.append(job)
            seconds += job.left_s
            encodes = encodes or job.work.encodes
            job = self._next()
        self._step_s = self._base_s() + self._prompts_s(encodes) + seconds
        self._phase, self._until = _Phase.ends, self.now + self._step_s

    def _bulk(self) -> None:
        """Fill steps with the prompt of the first job that has a slot."""
        job = self._started[0]
        assert job.work is not None
        self._share_s = self._room(job)
        self._step_s = self._base_s() + self._prompts_s(job.work.encodes) + self._share_s
        steps = math.ceil(job.left_s / self._share_s) - 1
        self._phase, self._until = _Phase.bulk, self.now + steps * self._step_s
        if steps <= 0:
            self._begin()

    def _prompts_s(self, encodes: bool) -> float:
        return self._costs.prompts + (self._costs.encodes if encodes else 0.0)

    def _room(self, job: Job[T]) -> float:
        """Seconds that a step has for the work of prompts."""
        assert job.work is not None
        target = _TARGET_S if self._decoding else _IDLE_STEP_S
        fixed = self._base_s() + self._prompts_s(job.work.encodes)
        room = max(target - fixed, LEAST_SHARE * target)
        if job.work.tokens > self._step_tokens:
            room = min(room, job.work.seconds * self._step_tokens / job.work.tokens)
        return room

    def _next(self) -> Job[T] | None:
        """The request whose turn it is, with a slot; None if there is none."""
        if not self._started and not self._waiting:
            return None
        started = min(self._started, key=_place, default=None)
        if len(self._decoding) + len(self._started) + len(self._ending) >= self._slots:
            return started
        while self._came and self._came[0].work is not None:
            self._came.popleft()
        while self._waiting and self._waiting[0][2].work is not None:
            heapq.heappop(self._waiting)
        if not self._waiting:
            return started
        chosen = self._came[0]
        if self.now - chosen.came < _AGED_S:
            chosen = self._waiting[0][2]
            if started is not None and _place(started) < (_size(chosen.rank), chosen.number):
                return started
        work = self._admit(chosen.request)
        if work is None:
            return started
        chosen.work, chosen.left_s = work, work.seconds
        self._started.append(chosen)
        return chosen


def _place(job: Job[T]) -> tuple[int, int]:
    """A job's place among those with a slot."""
    return _size(job.left_s), job.number


def _size(seconds: float) -> int:
    """Work to half a power of two, as the scheduler compares it."""
    return math.floor(2 * math.log2(max(seconds, _ROUNDING)))
