"""What was measured of a server, and the rates that explain it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vllm_mm_ext.planner.host_work import PICTURE, MediumWork, host_work
from vllm_mm_ext.planner.rates import HostCosts, Rates, RatesRange
from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.step_contents import (
    EncoderWork,
    RequestPart,
    StepContents,
    encoder_work,
    inputs_of,
    step_contents,
)
from vllm_mm_ext.planner.step_costs import StepCosts, StepFit, fit, non_negative
from vllm_mm_ext.planner.workload import Workload
from vllm_mm_ext.tools.calibration.asker import Asked

# The range is never narrower: a machine is not the same twice.
_LEAST_SPREAD = 0.1
_TAILS = (0.1, 0.9)
# Of equal steps, the share that nothing else held up.
_QUIET = 0.25

TokensOf = Callable[[Workload], RequestTokens]


class LoggedStep(NamedTuple):
    """A step from the log of ``timed_scheduler``.

    Attributes:
        began, ended: On the monotonic clock.
        work: Of each request its id, tokens, tokens before them, prompt tokens, items encoded.
    """

    began: float
    ended: float
    work: list[tuple[str, int, int, int, list[int]]]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


@dataclass(frozen=True)
class Observations:
    """What was measured.

    Attributes:
        alone: Requests that had the server to themselves.
        follow_ups: The same, each about media of the one before it.
        groups: Requests of several clients at a time.
        steps: Steps of all of these.
        busy_steps: Steps of texts beside ``busy_threads``, and by themselves.
        token_s: CPU seconds of the API server for a token of an answer.
        decode_threads: Cores that a decode keeps busy.
        cores: Cores of the server.
    """

    alone: Sequence[Asked]
    follow_ups: Sequence[Asked]
    groups: Sequence[Asked]
    steps: Sequence[LoggedStep]
    busy_steps: tuple[Sequence[LoggedStep], Sequence[LoggedStep]]
    token_s: float
    decode_threads: float
    cores: int


@dataclass(frozen=True)
class Fitted:
    """Rates that explain what was measured, with their range, and how well the steps fit."""

    rates: RatesRange
    steps: StepFit


def fitted(seen: Observations, tokens_of: TokensOf) -> Fitted:
    """Find the rates that explain observations.

    Args:
        seen: What was measured.
        tokens_of: What a request of a workload becomes in the engine.

    Raises:
        ValueError: Too little was measured.
    """
    step_fit = fit(_steps(seen, tokens_of))
    host, ratios = _host(seen, tokens_of, step_fit.costs)
    middle = Rates(step_fit.costs, host)
    return Fitted(
        RatesRange.around(
            middle, step=_spread(step_fit.low, step_fit.high), host=_spread(*_tails(ratios))
        ),
        step_fit,
    )


def _steps(seen: Observations, tokens_of: TokensOf) -> list[tuple[StepContents, float]]:
    works = {
        asked.key: encoder_work(tokens_of(asked.workload))
        for asked in (*seen.alone, *seen.follow_ups, *seen.groups)
    }
    found = []
    begun = set[str]()
    for step in seen.steps:
        parts = []
        for name, tokens, before, prompt, items in step.work:
            key = key_of(name)
            work: tuple[EncoderWork, ...] = works[key]
            encoded = [work[index] for index in items]
            inputs = 0 if key in begun else inputs_of(work)
            begun.add(key)
            parts.append(RequestPart(tokens, before, prompt, encoded, inputs))
        found.append((step_contents(parts), step.seconds))
    return found


def _texts(step: LoggedStep) -> StepContents:
    """What a step holds whose requests have no media."""
    return step_contents(RequestPart(*part[1:4], ()) for part in step.work)


def key_of(name: str) -> str:
    """The key of a request, from the engine's name for it."""
    begin = name.index("ask-")
    return name[begin : name.index("-", begin + 4) + 1]


@dataclass(frozen=True)
class _Row:
    """Equal requests, each alone: the work for their media, and what their stages took."""

    media: tuple[MediumWork, ...]
    main_s: float
    probe_s: float
    decode_s: float
    preprocess_s: float


def _host(
    seen: Observations, tokens_of: TokensOf, steps: StepCosts
) -> tuple[HostCosts, list[float]]:
    """Costs of the host, and what requests took over what the costs add up to."""
    rows = _rows(seen.alone, seen.steps, tokens_of)
    # What the server says of its stages, it says of requests with a video or a sound.
    told = [row for row in rows if all(medium.in_worker for medium in row.media)]
    main = _solve(
        [(1.0, len(row.media), _sum(row, "sent")) for row in told], [row.main_s for row in told]
    )
    decoded = [row for row in told if row.media]
    codecs = sorted({medium.codec for row in decoded for medium in row.media} - {""})
    decode = _solve(
        [
            (
                1.0,
                _sum(row, "frame_megapixels"),
                _sum(row, "sound_s"),
                *(_megapixels(row, codec) for codec in codecs),
            )
            for row in decoded
        ],
        [row.decode_s for row in decoded],
    )
    prepared = [_with_preprocessing(row, main) for row in rows if row.media]
    preprocess = _solve(
        [
            (len(row.media), _sum(row, "inputs"), _sum(row, "sound_s"), _megapixels(row, PICTURE))
            for row in prepared
        ],
        [row.preprocess_s for row in prepared],
    )
    probes = [row.probe_s for row in decoded if row.probe_s]
    cached = _cached(_rows(seen.follow_ups, seen.steps, tokens_of), main[0])
    costs = HostCosts(
        request=main[0],
        medium=main[1],
        sent_input=main[2],
        token=seen.token_s,
        probe=float(np.median(probes)) if probes else 0.0,
        decode=decode[0],
        megapixel={PICTURE: preprocess[3], **dict(zip(codecs, decode[3:], strict=False))},
        frame_megapixel=decode[1],
        sound_second=decode[2],
        preprocess=preprocess[0],
        preprocess_input=preprocess[1],
        preprocess_sound_second=preprocess[2],
        decode_threads=min(seen.cores, max(0.1, seen.decode_threads)),
        engine_threads=_engine_threads(seen, steps),
        cached_medium=cached[0] if cached else None,
        cached_input=cached[1] if cached else 0.0,
    )
    return costs, [_total(row) / max(1e-9, _expected(row, costs)) for row in rows]


def _cached(rows: Sequence[_Row], request_s: float) -> list[float]:
    """Costs of media that caches hold: of a medium and of an input of it; none if none was asked.

    Args:
        rows: The follow-ups.
        request_s: What a request takes without media.
    """
    if not rows:
        return []
    # What no cost explains is never nothing: an error counts as a share of it.
    took = [max(_total(row) - request_s, 0.01 * _total(row)) for row in rows]
    return _solve([(len(row.media), _sum(row, "sent")) for row in rows], took)


def _with_preprocessing(row: _Row, main: Sequence[float]) -> _Row:
    """Of a request with pictures, what its main thread does not explain is preprocessing."""
    if all(medium.in_worker for medium in row.media):
        return row
    main_s = main[0] + main[1] * len(row.media) + main[2] * _sum(row, "sent")
    return replace(row, main_s=main_s, preprocess_s=max(0.0, row.main_s - main_s))


def busy_threads(cores: int) -> int:
    """Threads that keep a server's cores busy while its steps are measured beside them."""
    return max(1, cores - 1)


def _engine_threads(seen: Observations, costs: StepCosts) -> float:
    """Cores that steps take: as many as explain how much slower they are beside other threads.

    With ``n`` threads on its cores, a step that takes ``e`` of them has the speed
    ``cores / (n + e)``. It takes no more of them than there are: what a step costs was measured on
    these cores, so by itself it is not slowed down, however much slower it is beside others.
    """
    if not all(seen.busy_steps):
        raise ValueError("no step of the requests beside busy cores was logged by itself: repeat")
    # What else the machine had to do held up some of both.
    busy, quiet = (
        float(np.quantile([step.seconds / costs.seconds(_texts(step)) for step in steps], _QUIET))
        for steps in seen.busy_steps
    )
    slower = max(1.0, busy / quiet)
    return min(seen.cores, max(0.1, seen.cores * slower - busy_threads(seen.cores)))


def _rows(alone: Sequence[Asked], steps: Sequence[LoggedStep], tokens_of: TokensOf) -> list[_Row]:
    """A row for each workload that was asked alone."""
    first: dict[str, float] = {}
    prefilled: dict[str, float] = {}
    for step in steps:
        for name, _, before, prompt, _ in step.work:
            first.setdefault(key_of(name), step.began)
            if before < prompt:
                prefilled[key_of(name)] = step.ended
    rows: dict[Workload, list[_Row]] = {}
    for asked in alone:
        if asked.key not in first:
            continue
        stages = asked.stages
        media = host_work(asked.workload, tokens_of(asked.workload))
        used = max(stages.get("video", 0.0), stages.get("audio", 0.0))
        probe_s = stages.get("probe", 0.0)
        decode_s = max(0.0, used - stages.get("fetch", 0.0))
        preprocess_s = stages.get("preprocess", 0.0) if media else 0.0
        ready = first[asked.key] - asked.timing.sent
        after = asked.timing.first - prefilled[asked.key]
        main_s = max(0.0, ready - probe_s - decode_s - preprocess_s) + max(0.0, after)
        row = _Row(media, main_s, probe_s, decode_s, preprocess_s)
        rows.setdefault(asked.workload, []).append(row)
    return [_quickest(equal) for equal in rows.values()]


def _quickest(rows: Sequence[_Row]) -> _Row:
    """Of equal requests, the shortest time of each stage: whatever else goes on only adds to it."""
    return _Row(
        rows[0].media,
        *(
            min(getattr(row, name) for row in rows)
            for name in ("main_s", "probe_s", "decode_s", "preprocess_s")
        ),
    )


def _sum(row: _Row, name: str) -> float:
    return float(sum(getattr(medium, name) for medium in row.media))


def _megapixels(row: _Row, codec: str) -> float:
    return sum(medium.megapixels for medium in row.media if medium.codec == codec)


def _total(row: _Row) -> float:
    return row.main_s + row.probe_s + row.decode_s + row.preprocess_s


def _expected(row: _Row, costs: HostCosts) -> float:
    media = sum(
        one.main_s(costs) + one.probe_s(costs) + one.decode_s(costs) + one.preprocess_s(costs)
        for one in row.media
    )
    return costs.request + media


def _solve(rows: Sequence[Sequence[float]], took: Sequence[float]) -> list[float]:
    """Non-negative costs for what some requests took, an error counted as a share of that."""
    if not rows:
        return [0.0] * 4
    held = np.array(rows, float) / np.maximum(np.array(took), 1e-6)[:, None]
    scale = np.maximum(held.max(axis=0), 1e-12)
    return [float(value) for value in non_negative(held / scale, np.ones(len(rows))) / scale]


def _tails(ratios: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(ratios, _TAILS)
    return float(low), float(high)


def _spread(low: float, high: float) -> tuple[float, float]:
    """Factors around 1, at least as wide as the least spread."""
    return min(low, 1 - _LEAST_SPREAD), max(high, 1 + _LEAST_SPREAD)
