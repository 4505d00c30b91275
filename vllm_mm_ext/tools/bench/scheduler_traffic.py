"""Traffic for schedulers on a simulated clock: seeded generators, and traces in text files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import vllm_mm_ext
from vllm_mm_ext.tools.bench.commands import TrafficKind
from vllm_mm_ext.tools.bench.scheduler_costs import StepCosts

TRACES = Path(vllm_mm_ext.__file__).parent / "assets" / "scheduler"
# Text comes each time that a lone request would have got so many tokens: as in ``mixed-traffic``,
# and so often that half of all prompts are more than one gap in a hundred, as p99 sees them.
_TEXT_EVERY_TOKENS = 78
_VARIED_EVERY_TOKENS = 52
_TEXT_PROMPT = 192
_TEXT_ANSWER = 160
_VARIED_ANSWER = 80
_VIDEO_TEXT = 40
_VIDEO_ANSWER = 8
# Seconds of arrivals, and when the first video comes.
_SECONDS = 24.0
_FIRST_VIDEO_S = 2.0
# Seconds of the engine that a video takes on average, and of the time between two videos.
_VIDEO_S = 1.0
_VIDEO_EVERY_S = 2.0
_VIDEOS_ONLY_EVERY_S = 1.3
# The sizes of videos, as multiples of the mean one, are as likely one as the other.
_SIZES = (0.2, 0.4, 0.7, 1.0, 1.4, 2.3)
_STEPS_PER_VIDEO = 1.4
# Of the adversarial trace.
_AGING_S = 20.0
_AGING_SECONDS = 80.0
# The size of its long videos, and seconds without other requests after each.
_LONG = 3.0
_LONG_S = 2.7
_HEAD = """\
# Traffic for `vllm-mm bench scheduler`, {what}.
# Lines of requests: seconds, tokens of text, of a video (0: none) and of the answer, priority.
"""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes.

    Attributes:
        at: When, in seconds.
        text: Tokens of text in its prompt.
        video: Tokens of its video, 0 if it has none.
        answer: Tokens of its answer.
        priority: Lower goes first, where the engine schedules by priority.
    """

    at: float
    text: int
    video: int
    answer: int
    priority: int = 0


@dataclass(frozen=True)
class Trace:
    """Requests for an engine.

    Attributes:
        slots: ``--max-num-seqs`` of the engine.
        step_tokens: Its ``--max-num-batched-tokens``.
        aging_s: The scheduler's setting.
        requests: In the order of their coming.
    """

    slots: int
    step_tokens: int
    aging_s: float
    requests: tuple[Arrival, ...]

    def texts(self) -> Trace:
        """The same without its videos."""
        left = tuple(one for one in self.requests if not one.video)
        return Trace(self.slots, self.step_tokens, self.aging_s, left)

    def write(self, file: Path, what: str) -> None:
        """Write a text file.

        Args:
            file: The file.
            what: What the traffic is, for whoever reads it.
        """
        lines = [f"{name} {getattr(self, name):g}" for name in _NAMES]
        lines += [
            f"{one.at:.3f} {one.text} {one.video} {one.answer} {one.priority}"
            for one in self.requests
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_HEAD.format(what=what) + "\n".join(lines) + "\n")

    @classmethod
    def read(cls, file: Path) -> Trace:
        """Read what ``write`` wrote.

        Raises:
            ValueError: It is no such file; the message names the line.
        """
        shape: dict[str, float] = {}
        requests = []
        for number, line in enumerate(file.read_text().splitlines(), 1):
            words = line.split()
            if not words or line.startswith("#"):
                continue
            try:
                if words[0] in _NAMES and len(words) == 2:
                    shape[words[0]] = float(words[1])
                    continue
                at, *numbers = words
                text, video, answer, priority = map(int, numbers)
                request = Arrival(float(at), text, video, answer, priority)
            except ValueError as error:
                raise ValueError(
                    f"{file}:{number}: wanted {' | '.join(f'{name} NUMBER' for name in _NAMES)} | "
                    f"SECONDS TEXT VIDEO ANSWER PRIORITY, got {line!r}"
                ) from error
            if min(request.at, request.video, request.text - 1, request.answer - 1) < 0:
                raise ValueError(f"{file}:{number}: less than there can be: {line!r}")
            requests.append(request)
        if len(shape) < len(_NAMES) or not requests or min(shape.values()) <= 0:
            raise ValueError(f"{file}: wanted {', '.join(_NAMES)} (above 0) and requests")
        requests.sort(key=lambda one: one.at)
        slots, step_tokens = int(shape["slots"]), int(shape["step_tokens"])
        return cls(slots, step_tokens, shape["aging_s"], tuple(requests))


_NAMES = tuple(field.name for field in fields(Trace) if field.name != "requests")


def _poisson(rng: random.Random, every_s: float, first: float) -> Iterator[float]:
    at = first
    while True:
        at += rng.expovariate(1 / every_s)
        if at >= _SECONDS:
            return
        yield at


def _texts(
    rng: random.Random, costs: StepCosts, every: float, answers: float, varies: float
) -> Iterator[Arrival]:
    """Steady, but neither in step with the videos nor with how long answers take.

    Args:
        rng: Random numbers.
        costs: What steps cost.
        every: Mean tokens of a lone request from one text to the next.
        answers: Mean tokens of an answer.
        varies: By which share lengths vary at most.
    """
    at = 0.0
    while at < _SECONDS:
        prompt, answer = (
            round(tokens * rng.uniform(1 - varies, 1 + varies))
            for tokens in (_TEXT_PROMPT, answers)
        )
        yield Arrival(at, prompt, 0, answer)
        at += every * costs.of(decodes=1) * rng.uniform(0.5, 1.5)


def _video(at: float, costs: StepCosts, size: float) -> Arrival:
    return Arrival(at, _VIDEO_TEXT, round(size * _video_tokens(costs)), _VIDEO_ANSWER)


def _video_tokens(costs: StepCosts) -> int:
    """Tokens of the mean video."""
    tokens = 64
    while costs.of(encoded=tokens, prefill=tokens, pairs=tokens**2 / 2) < _VIDEO_S:
        tokens += 64
    return tokens


def _trace(costs: StepCosts, slots: int, requests: Iterator[Arrival], aging_s: float) -> Trace:
    step_tokens = 32 * round(_video_tokens(costs) / _STEPS_PER_VIDEO / 32)
    ordered = sorted(requests, key=lambda one: one.at)
    # As precise as in a file.
    rounded = tuple(
        Arrival(round(one.at, 3), one.text, one.video, one.answer, one.priority) for one in ordered
    )
    return Trace(slots, step_tokens, aging_s, rounded)


def mixed(seed: int, costs: StepCosts) -> Trace:
    """Text, and videos of all sizes at random times, which are half of the work."""
    rng = random.Random(seed)

    def requests() -> Iterator[Arrival]:
        yield from _texts(rng, costs, _VARIED_EVERY_TOKENS, _VARIED_ANSWER, 0.5)
        for at in _poisson(rng, _VIDEO_EVERY_S, _FIRST_VIDEO_S):
            yield _video(at, costs, rng.choice(_SIZES))

    return _trace(costs, 16, requests(), 30.0)


def steady(seed: int, costs: StepCosts) -> Trace:
    """Text, and a video of one size every two seconds, as in ``mixed-traffic``."""
    rng = random.Random(seed)

    def requests() -> Iterator[Arrival]:
        yield from _texts(rng, costs, _TEXT_EVERY_TOKENS, _TEXT_ANSWER, 0.0)
        for number in range(int((_SECONDS - _FIRST_VIDEO_S) / _VIDEO_EVERY_S)):
            yield _video(_FIRST_VIDEO_S + number * _VIDEO_EVERY_S, costs, 1.0)

    return _trace(costs, 16, requests(), 30.0)


def videos(seed: int, costs: StepCosts) -> Trace:
    """Videos of all sizes, which take three quarters of the engine's time."""
    rng = random.Random(seed)
    times = _poisson(rng, _VIDEOS_ONLY_EVERY_S, 0.0)
    return _trace(costs, 16, (_video(at, costs, rng.choice(_SIZES)) for at in times), 30.0)


def six_on_four(seed: int, costs: StepCosts) -> Trace:
    """Six videos for four slots, all at once, then a text."""
    rng = random.Random(seed)

    def requests() -> Iterator[Arrival]:
        size = rng.uniform(0.6, 1.2)
        for _ in range(6):
            one = _video(0.0, costs, size * rng.uniform(0.9, 1.1))
            yield Arrival(one.at, one.text, one.video, 2 * one.answer)
        yield Arrival(0.3, _TEXT_PROMPT, 0, _VIDEO_ANSWER)

    return _trace(costs, 4, requests(), 30.0)


def aging(seed: int, costs: StepCosts) -> Trace:
    """Long videos, and whatever goes before them: ever shorter clips, text, priorities, bursts.

    As much as the engine can just do: what it lags behind stays below half of the aging bound.
    """
    rng = random.Random(seed)

    def requests() -> Iterator[Arrival]:
        now, number = 0.0, 0
        while now < _AGING_SECONDS:
            number += 1
            phase = int(now / (_AGING_SECONDS / 4))
            if number % 9 == 1:
                yield replace(_video(now, costs, _LONG), priority=9)
                now += _LONG_S
            if phase == 0:
                yield _video(now, costs, 0.9 - number % 8 / 10)
                now += rng.expovariate(1 / 0.8)
            elif phase == 1:
                text = 1200 if number % 9 == 0 else rng.randint(8, 400)
                yield Arrival(now, text, 0, rng.randint(1, 40))
                now += rng.expovariate(1 / 0.35)
            elif phase == 2:
                size = rng.uniform(0.05, 0.8)
                yield replace(_video(now, costs, size), priority=-number % 5)
                now += rng.expovariate(1 / 0.62)
            else:
                for _ in range(6):
                    yield _video(now, costs, rng.uniform(0.05, 1.2))
                now += 4.9

    return _trace(costs, 8, requests(), _AGING_S)


KINDS: dict[TrafficKind, Callable[[int, StepCosts], Trace]] = {
    TrafficKind.mixed: mixed,
    TrafficKind.steady: steady,
    TrafficKind.videos: videos,
    TrafficKind.six_on_four: six_on_four,
    TrafficKind.aging: aging,
}


def trace_of(kind: TrafficKind, seed: int, costs: StepCosts) -> Trace:
    """The trace of a kind: that of seed 0 is in the repository."""
    return KINDS[kind](seed, costs)
