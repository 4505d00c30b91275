"""First tokens and throughput of clients that each send the next request after an answer.

The API server's work is simulated here, lane by lane; what each engine step holds is decided by a
``SteppedEngine``, for which there is vLLM's own scheduler (``adapters/planning/``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vllm_mm_ext.planner.host import Host, Lane, share_busy
from vllm_mm_ext.planner.host_work import MediumWork
from vllm_mm_ext.planner.rates import Rates, RatesRange
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.step_contents import (
    RequestPart,
    StepContents,
    encoder_work,
    inputs_of,
    step_contents,
)

# Requests of each client; the first and the last one's do not count: the load is not steady then.
ROUNDS = 5
LEAST_REQUESTS = 12


class SteppedEngine(Protocol):
    """An engine that is told when its steps are over."""

    def add(self, number: int, now: float) -> None:
        """A request comes.

        Args:
            number: Its number, from 0 on.
            now: The clock, in seconds.
        """

    def begin(self, now: float) -> StepContents | None:
        """Begin a step, and say what it holds; None if there is nothing to do."""

    def end(self, now: float) -> list[tuple[int, bool]]:
        """End the step: numbers of the requests that got a token, and whether it was the last."""


@dataclass(frozen=True)
class Service:
    """What serves, and how many ask.

    Attributes:
        concurrency: Clients, each with a request at a time.
        media: Work for the media of each request.
        decode_workers: Decodes at a time; as many probes beside them.
        cores: Cores of the machine that this engine and its API server have.
    """

    concurrency: int
    media: tuple[MediumWork, ...]
    decode_workers: int
    cores: int


@dataclass
class Timing:
    """When a request was sent, when its first and its last token came, and how many came."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Figures:
    """What clients see.

    Attributes:
        ttft_p50_s, ttft_p95_s: Seconds to the first token: median, and of the slowest in twenty.
        itl_p50_s: Seconds between tokens, mean of an answer, median of answers.
        requests_per_s: Answers a second.
    """

    ttft_p50_s: float
    ttft_p95_s: float
    itl_p50_s: float
    requests_per_s: float


@dataclass(frozen=True)
class Estimate:
    """What clients would see, with its range.

    Attributes:
        low, middle, high: At the lowest, the middle and the highest costs of the rates; each figure
            of ``low`` is not above, each of ``high`` not below the one of ``middle``.
        busy: By part of the server, the share of the time that it is busy, at the middle costs.
    """

    low: Figures
    middle: Figures
    high: Figures
    busy: dict[str, float]

    @property
    def limit(self) -> str:
        """The part of the server that is busiest."""
        return max(self.busy, key=self.busy.__getitem__)


def side_by_side(servers: Sequence[tuple[Estimate, int]]) -> Estimate:
    """The estimate of several servers, each with its own clients.

    Args:
        servers: The estimate of one server, and how many are like it; those with the most clients
            first, as what one client sees is of these.
    """
    estimates = [each for each, _ in servers]

    def together(figures: Sequence[Figures]) -> Figures:
        counted = zip(figures, servers, strict=True)
        rate = sum(count * one.requests_per_s for one, (_, count) in counted)
        return replace(figures[0], requests_per_s=rate)

    return Estimate(
        together([each.low for each in estimates]),
        together([each.middle for each in estimates]),
        together([each.high for each in estimates]),
        estimates[0].busy,
    )


def estimate(service: Service, rates: RatesRange, engine: Callable[[], SteppedEngine]) -> Estimate:
    """Estimate with the range that the rates give.

    Args:
        service: What serves whom.
        rates: What work costs.
        engine: Makes an engine without requests.

    Raises:
        ValueError: The engine does not get on with its requests.
    """
    runs = [simulate(service, each, engine()) for each in (rates.low, rates.middle, rates.high)]
    figures = [run.figures for run in runs]
    low, high = (
        Figures(
            *(choose(getattr(one, name) for one in figures) for name in Figures.__annotations__)
        )
        for choose in (min, max)
    )
    return Estimate(low, figures[1], high, runs[1].busy)


def requests_of(concurrency: int) -> int:
    """How many requests so many clients send in all, for figures of a steady load."""
    return max(ROUNDS * concurrency, LEAST_REQUESTS)


def figures_of(timings: Sequence[Timing], concurrency: int) -> Figures:
    """What clients saw while all of them had a request.

    Args:
        timings: Of all requests, none without tokens.
        concurrency: The clients.
    """
    ends = sorted(timing.last for timing in timings)
    # From the first answer of a steady load to the last one after which a request was sent.
    first, last = min(concurrency, len(ends) // 3), len(ends) - min(concurrency, len(ends) // 3)
    seconds = ends[last - 1] - ends[first - 1]
    steady = sorted(timings, key=lambda timing: timing.sent)[first:]
    waits = [timing.first - timing.sent for timing in steady]
    gaps = [(one.last - one.first) / (one.tokens - 1) for one in steady if one.tokens > 1]
    return Figures(
        float(np.median(waits)),
        float(np.quantile(waits, 0.95)),
        float(np.median(gaps)) if gaps else 0.0,
        (last - first) / seconds,
    )


def follow_up_s(media: Sequence[MediumWork], request: RequestTokens, rates: Rates) -> float:
    """Seconds to the first token of a follow-up that is asked alone, with all before it in caches.

    Its question is as long as the request's own text, and is computed in one step.

    Args:
        media: Work for the media of the request before it.
        request: That request.
        rates: What work costs.
    """
    before = request.prompt + request.output
    inputs = inputs_of(encoder_work(request))
    part = RequestPart(request.text, before, before + request.text, (), inputs)
    host = rates.host
    cached = sum(medium.cached_s(host) for medium in media)
    return host.request + cached + rates.step.seconds(step_contents([part])) + host.token


@dataclass(frozen=True)
class Run:
    """A simulated load.

    Attributes:
        figures: What its clients saw.
        busy: By part of the server, the share of the time that it was busy.
    """

    figures: Figures
    busy: dict[str, float]


def simulate(service: Service, rates: Rates, engine: SteppedEngine) -> Run:
    """Let clients ask, on a simulated clock.

    Args:
        service: What serves whom.
        rates: What work costs.
        engine: An engine without requests.

    Raises:
        ValueError: The engine does not get on with its requests.
    """
    clients = _Clients(service, rates, engine)
    timings = clients.run()
    if not all(timing.tokens for timing in timings):
        raise ValueError("the engine has no room for a request as it is planned")
    return Run(figures_of(timings, service.concurrency), clients.busy())


class _Clients:
    """Requests on their way through the API server, decode workers and the engine."""

    def __init__(self, service: Service, rates: Rates, engine: SteppedEngine) -> None:
        self._service, self._rates, self._engine = service, rates, engine
        self._host = Host(service.cores)
        lanes = {
            "API server": 1,
            "probe workers": service.decode_workers,
            "decode workers": service.decode_workers,
            "preprocessing thread": 1,
            "engine": 1,
        }
        self._lanes: dict[str, Lane] = {
            name: self._host.lane(width) for name, width in lanes.items()
        }
        self._timings: list[Timing] = []
        self._left = requests_of(service.concurrency)
        self._stepping = False

    def run(self) -> list[Timing]:
        """Serve all requests."""
        for _ in range(min(self._service.concurrency, self._left)):
            self._send()
        while self._host.run():
            pass
        return self._timings

    def busy(self) -> dict[str, float]:
        """Share of the time that each part was busy."""
        return {name: share_busy(lane, self._host.now) for name, lane in self._lanes.items()}

    def _send(self) -> None:
        if not self._left:
            return
        self._left -= 1
        number = len(self._timings)
        self._timings.append(Timing(self._host.now))
        self._add("API server", self._rates.host.request, lambda: self._received(number))

    def _received(self, number: int) -> None:
        """All media of a request are read at once; it goes on with the last of them."""
        media, costs = self._service.media, self._rates.host
        open_media = len(media)

        def ready() -> None:
            nonlocal open_media
            open_media -= 1
            if not open_media:
                seconds = sum(medium.preprocess_s(costs) for medium in media)
                self._add("preprocessing thread", seconds, lambda: self._preprocessed(number))

        for medium in media:
            self._read(medium, ready)
        if not media:
            self._arrives(number)

    def _read(self, medium: MediumWork, ready: Callable[[], None]) -> None:
        costs = self._rates.host
        if not medium.in_worker:
            ready()
            return

        def decode() -> None:
            seconds = medium.decode_s(costs)
            self._add("decode workers", seconds, ready, threads=costs.decode_threads)

        self._add("probe workers", medium.probe_s(costs), decode)

    def _preprocessed(self, number: int) -> None:
        seconds = sum(medium.main_s(self._rates.host) for medium in self._service.media)
        self._add("API server", seconds, lambda: self._arrives(number))

    def _arrives(self, number: int) -> None:
        self._engine.add(number, self._host.now)
        self._step()

    def _step(self) -> None:
        """Begin a step unless one is running."""
        if self._stepping:
            return
        contents = self._engine.begin(self._host.now)
        if contents is None:
            return
        self._stepping = True
        seconds = self._rates.step.seconds(contents)
        self._add("engine", seconds, self._stepped, threads=self._rates.host.engine_threads)

    def _stepped(self) -> None:
        self._stepping = False
        tokens = self._engine.end(self._host.now)
        self._add("API server", self._rates.host.token * len(tokens), lambda: self._answer(tokens))
        self._step()

    def _answer(self, tokens: Sequence[tuple[int, bool]]) -> None:
        """Tokens reach their clients; whose answer is complete sends the next request."""
        for number, last in tokens:
            timing = self._timings[number]
            timing.last = self._host.now
            timing.first = timing.first or timing.last
            timing.tokens += 1
            if last:
                self._send()

    def _add(
        self, lane: str, seconds: float, done: Callable[[], None], threads: float = 1.0
    ) -> None:
        self._host.add(self._lanes[lane], seconds, done, threads)
