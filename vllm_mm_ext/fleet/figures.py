"""The figures of a simulated fleet, as an operator reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_mm_ext.fleet.tally import Tally, Waits


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: What it is.
        value: Its value; nan where there is nothing to count.
        unit: ``share``, ``s``, ``h``, ``count``, or "" of a plain number.
    """

    name: str
    value: float
    unit: str = ""


def figures(tally: Tally, gpus: int, price_per_hour: float | None = None) -> list[Figure]:
    """What a simulated fleet did; ``docs/fleet-simulation.md`` says what each figure counts.

    Args:
        tally: What was counted.
        gpus: GPUs of a replica, and of an encoder instance; on CPUs 1.
        price_per_hour: Price of one of these for an hour.
    """
    servers = tally.replicas + tally.encoders
    hours = gpus * servers * tally.seconds / 3600
    busy = gpus * (sum(tally.busy_s) + sum(tally.encoder_busy_s)) / 3600
    fullest, most = tally.fullest
    found = [
        Figure("answered", tally.answered, "count"),
        Figure("refused, too long", tally.refused, "count"),
        Figure("sent again", tally.sent_again, "count"),
        Figure("KV hits", _share(tally.found_tokens, tally.prompt_tokens), "share"),
        Figure("KV hits, later turns", _share(tally.later_found, tally.later_tokens), "share"),
        Figure("encoder hits", 1 - _share(tally.encoded_tokens, tally.media_tokens), "share"),
        Figure("tokens encoded", tally.encoded_tokens, "count"),
        Figure("media decoded", tally.decodes, "count"),
        *_waits("first token", tally.all),
        *_waits("first turns", tally.first),
        *_waits("later turns", tally.later),
        *_waits("live answers", tally.live),
        Figure("busy", _share(sum(tally.busy_s), tally.replicas * tally.seconds), "share"),
        Figure("busy, busiest", _share(max(tally.busy_s), tally.seconds), "share"),
        Figure(
            "busy, encoders",
            _share(sum(tally.encoder_busy_s), tally.encoders * tally.seconds),
            "share",
        ),
        Figure("load over mean, p99", fullest),
        Figure("load over mean, most", most),
        Figure("hours", hours, "h"),
        Figure("hours busy", busy, "h"),
        Figure("busy, a request", _share(3600 * busy, tally.answered), "s"),
    ]
    if price_per_hour is not None:
        found.append(Figure("price of 1,000", _share(1e3 * hours * price_per_hour, tally.answered)))
    return [figure for figure in found if not math.isnan(figure.value)]


def keeps_up(tally: Tally) -> bool:
    """Whether a fleet answers as fast as it is asked: the rest is answered soon after."""
    return tally.seconds <= 1.05 * tally.offered_s + 60


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _waits(name: str, waits: Waits) -> list[Figure]:
    return [
        Figure(f"{name} p50", waits.p50, "s"),
        Figure(f"{name} p90", waits.p90, "s"),
        Figure(f"{name} p99", waits.p99, "s"),
    ]
