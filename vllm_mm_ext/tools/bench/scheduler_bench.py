"""``scheduler``: traffic on a simulated clock through vLLM's schedulers, stock's and the plugin's.

Deterministic: what a step takes is added up from costs that were measured once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_mm_ext.tools.bench.commands import TrafficKind
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.scheduler_clock import (
    EngineShape,
    SimulatedEngine,
    Timing,
    build_request,
    build_scheduler,
)
from vllm_mm_ext.tools.bench.scheduler_costs import MEASURED, StepContents, StepCosts
from vllm_mm_ext.tools.bench.scheduler_rules import RULES
from vllm_mm_ext.tools.bench.scheduler_traffic import KINDS, TRACES, Arrival, Trace, trace_of

SEEDS = 20
# Stock encodes a video in one piece; the plugin makes items of so many tokens of it.
ITEM_TOKENS = 64
_TEXT_PROMPT = 192
# The plugin's target between tokens: so many times what a lone text waits for its first token.
_TARGET_OF_TEXT = 1.4


@dataclass(frozen=True)
class Figure:
    """One figure of some traffic.

    Attributes:
        kind: The traffic.
        name: What it is.
        unit: Its unit.
        value: Works it out of what was measured; a second argument has the same for the texts of
            the trace without its videos.
        alone: Whether it needs that.
        least: The larger, the better.
    """

    kind: TrafficKind
    name: str
    unit: str
    value: Callable[[Outcome, Outcome], float]
    alone: bool = False
    least: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of the requests of a trace, in their order."""

    requests: tuple[Arrival, ...]
    timings: tuple[Timing, ...]

    def ttft(self, *, video: bool) -> list[float]:
        """Seconds to the first tokens of all videos, or of all texts."""
        return [timing.tokens[0] - timing.came for timing in self._of(video)]

    def itl(self) -> list[float]:
        """Seconds between tokens of texts."""
        return [
            after - before
            for timing in self._of(False)
            for before, after in zip(timing.tokens, timing.tokens[1:], strict=False)
        ]

    def per_minute(self) -> float:
        """Videos answered, from the first one's coming to the last one's end."""
        ends = [timing.tokens[-1] for timing in self._of(True)]
        return 60 * len(ends) / (max(ends) - min(timing.came for timing in self._of(True)))

    def answered(self) -> float:
        """When the last token came."""
        return max(timing.tokens[-1] for timing in self.timings)

    def longest_wait(self) -> float:
        """Longest time to a first token."""
        return max(timing.tokens[0] - timing.came for timing in self.timings)

    def mean_wait(self) -> float:
        """Mean time to a first token."""
        return statistics.fmean(timing.tokens[0] - timing.came for timing in self.timings)

    def _of(self, video: bool) -> list[Timing]:
        pairs = zip(self.requests, self.timings, strict=True)
        return [timing for request, timing in pairs if bool(request.video) == video]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _itl_p99(found: Outcome, _alone: Outcome) -> float:
    return 1e3 * percentile(found.itl(), 99)


def _text_ttft_p95(found: Outcome, _alone: Outcome) -> float:
    return 1e3 * percentile(found.ttft(video=False), 95)


def _text_and_videos(kind: TrafficKind) -> Iterator[Figure]:
    yield Figure(kind, "text ITL p99", "ms", _itl_p99)
    yield Figure(kind, "text ITL, longest", "ms", lambda found, _: 1e3 * max(found.itl()))
    yield Figure(
        kind,
        "text ITL p99 over text alone",
        "ratio",
        lambda found, alone: percentile(found.itl(), 99) / percentile(alone.itl(), 99),
        alone=True,
    )
    yield Figure(kind, "text TTFT p95", "ms", _text_ttft_p95)
    yield from _videos(kind)


def _videos(kind: TrafficKind) -> Iterator[Figure]:
    yield Figure(
        kind,
        "mean video TTFT",
        "ms",
        lambda found, _: 1e3 * statistics.fmean(found.ttft(video=True)),
    )
    yield Figure(kind, "videos a minute", "1/min", lambda found, _: found.per_minute(), least=True)


LONGEST_WAIT = Figure(
    TrafficKind.aging, "longest wait over the bound", "ratio", lambda found, _: found.longest_wait()
)
FIGURES: tuple[Figure, ...] = (
    *_text_and_videos(TrafficKind.mixed),
    *_text_and_videos(TrafficKind.steady),
    *_videos(TrafficKind.videos),
    Figure(TrafficKind.six_on_four, "all answered", "ms", lambda found, _: 1e3 * found.answered()),
    LONGEST_WAIT,
    Figure(TrafficKind.aging, "mean TTFT", "ms", lambda found, _: 1e3 * found.mean_wait()),
    Figure(TrafficKind.aging, "text TTFT p95", "ms", _text_ttft_p95),
)


def target_ms(costs: StepCosts) -> float:
    """The plugin's target, as in ``mixed-traffic``: in terms of what a lone text waits for."""
    pairs = _TEXT_PROMPT**2 / 2
    return 1e3 * _TARGET_OF_TEXT * costs.of(prompts=1, prefill=_TEXT_PROMPT, pairs=pairs)


def play(
    trace: Trace,
    costs: StepCosts,
    *,
    plugin: bool,
    target: float,
    item_tokens: int = ITEM_TOKENS,
) -> Outcome:
    """Let a scheduler serve a trace.

    Args:
        trace: The trace.
        costs: What steps cost.
        plugin: The plugin's scheduler instead of vLLM's.
        target: Its ``target_itl_ms``.
        item_tokens: Tokens of the items that it makes of videos.
    """
    largest = max(one.video for one in trace.requests)
    shape = EngineShape(
        trace.slots,
        trace.step_tokens,
        max(trace.step_tokens, largest),
        priorities=any(one.priority for one in trace.requests),
    )
    settings = {"target_itl_ms": target, "aging_s": trace.aging_s}
    scheduler = build_scheduler(shape, settings if plugin else None)
    engine = SimulatedEngine(
        scheduler, lambda output: costs.seconds(StepContents.of(scheduler.requests, output))
    )
    engine.play(
        (
            one.at,
            build_request(
                str(number),
                text=one.text,
                items=_items(one.video, item_tokens if plugin else one.video),
                answer=one.answer,
                priority=one.priority,
            ),
        )
        for number, one in enumerate(trace.requests)
    )
    scheduler.shutdown()
    timings = tuple(engine.timings[str(number)] for number in range(len(trace.requests)))
    return Outcome(trace.requests, timings)


def _items(tokens: int, each: int) -> list[int]:
    return [min(each, tokens - start) for start in range(0, tokens, max(1, each))]


class Runs:
    """Figures of one side over many traces.

    Args:
        traces: Traces by kind.
        costs: What steps cost.
        item_tokens: Tokens of the items that the plugin makes of videos.
    """

    def __init__(
        self, traces: dict[TrafficKind, list[Trace]], costs: StepCosts, item_tokens: int
    ) -> None:
        self.figures = [figure for figure in FIGURES if figure.kind in traces]
        self._traces = traces
        self._play = partial(play, costs=costs, target=target_ms(costs), item_tokens=item_tokens)

    def of(self, *, plugin: bool, begin: Callable[[str], None]) -> dict[Figure, list[float]]:
        """Every figure, for each trace of its kind."""
        found: dict[Figure, list[float]] = {figure: [] for figure in self.figures}
        for kind, traces in self._traces.items():
            figures = [figure for figure in self.figures if figure.kind == kind]
            for trace in traces:
                begin(kind)
                outcome = self._play(trace, plugin=plugin)
                alone = outcome
                if any(figure.alone for figure in figures):
                    alone = self._play(trace.texts(), plugin=plugin)
                for figure in figures:
                    share = 1 / trace.aging_s if figure is LONGEST_WAIT else 1
                    found[figure].append(share * figure.value(outcome, alone))
        return found


def run(
    context: BenchContext,
    *,
    seeds: int = SEEDS,
    kinds: Sequence[TrafficKind] = tuple(TrafficKind),
    trace: Path | None = None,
    costs: Path = MEASURED,
    item_tokens: int = ITEM_TOKENS,
    ablate: bool = False,
) -> BenchResult:
    """Both sides on the same traffic.

    Args:
        context: What to run with.
        seeds: Traces of each kind.
        kinds: Kinds of traffic.
        trace: A trace to be served instead; it is told by what is in it which figures there are.
        costs: What steps cost.
        item_tokens: Tokens of the items that the plugin makes of videos.
        ablate: Also switch every rule of the plugin's scheduler off in turn.
    """
    prices = StepCosts.read(costs)
    if trace is not None:
        chosen = Trace.read(trace)
        traces = {_kind_of(chosen): [chosen]}
    else:
        traces = {kind: [trace_of(kind, seed, prices) for seed in range(seeds)] for kind in kinds}
    runs = Runs(traces, prices, item_tokens)
    total = sum(map(len, traces.values()))
    with context.steps("scheduler", total * (2 + len(RULES) * ablate)) as begin:
        stock = runs.of(plugin=False, begin=lambda kind: begin(f"stock, {kind}"))
        plugin = runs.of(plugin=True, begin=lambda kind: begin(f"plugin, {kind}"))
        rows = [
            Row.of(f"{f.kind}: {f.name}", f.unit, stock=stock[f], plugin=plugin[f])
            for f in runs.figures
        ]
        notes = [
            f"{seeds if trace is None else 1} traces of each kind; medians, and the spread over "
            f"traces; target_itl_ms {target_ms(prices):.0f}",
            f"the plugin's videos come as items of {item_tokens} tokens, stock's as one each",
        ]
        notes += _worst(runs.figures, stock, plugin)
        if LONGEST_WAIT in runs.figures:
            longest = max(plugin[LONGEST_WAIT])
            notes.append(f"the plugin's longest wait of all: {longest:.2f} of the aging bound")
        for rule, off in RULES.items() if ablate else ():
            with off():
                without = runs.of(plugin=True, begin=lambda kind: begin(f"no {rule}, {kind}"))  # noqa: B023
            notes.append(f"without {rule}: {_changes(runs.figures, plugin, without)}")
    return BenchResult("scheduler", rows, notes)


def _kind_of(trace: Trace) -> TrafficKind:
    """The kind whose figures a trace has."""
    media = [bool(one.video) for one in trace.requests]
    if all(media):
        return TrafficKind.videos
    return TrafficKind.mixed if any(media) else TrafficKind.aging


def _worst(
    figures: Sequence[Figure], stock: dict[Figure, list[float]], plugin: dict[Figure, list[float]]
) -> list[str]:
    """Of each figure the trace that is worst for the plugin, next to stock."""
    found = []
    for figure in figures:
        ratios = [b / a for a, b in zip(stock[figure], plugin[figure], strict=True)]
        worst = min(ratios) if figure.least else max(ratios)
        found.append(f"{figure.kind} {figure.name} {worst:.2f}x")
    return [f"the trace that is worst for the plugin, over stock: {'; '.join(found)}"]


def _changes(
    figures: Sequence[Figure], before: dict[Figure, list[float]], after: dict[Figure, list[float]]
) -> str:
    """By how much the medians of figures change that do."""
    changes = []
    for figure in figures:
        change = statistics.median(after[figure]) / statistics.median(before[figure]) - 1
        if abs(change) >= 0.005:
            changes.append(f"{figure.kind} {figure.name} {change:+.1%}")
    return "; ".join(changes) or "nothing changes by half a percent"


def write_traces(costs: Path = MEASURED, folder: Path = TRACES) -> None:
    """Write the trace of each kind that is in the repository."""
    prices = StepCosts.read(costs)
    for kind, make in KINDS.items():
        what = (make.__doc__ or "").splitlines()[0].rstrip(".")
        trace_of(kind, 0, prices).write(folder / f"{kind}.txt", f"{kind}, seed 0: {what.lower()}")
