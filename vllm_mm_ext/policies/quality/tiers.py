"""Load tiers with hysteresis: up at once, down slowly. Pure; time is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm_mm_ext.config.quality_settings import TierSettings


@dataclass(frozen=True)
class LoadSample:
    """How busy an engine is.

    Attributes:
        kv_usage: Share of its KV blocks in use, 0..1 (blocks that are only cached are free).
        running, waiting: Requests being served and queued.
        capacity: Requests it can run at once (``max_num_seqs``).
        time: Seconds on a clock all processes share.
        backlog_s: Seconds of encoder work that wait, where the engine tells.
    """

    kv_usage: float
    running: float
    waiting: float
    capacity: float
    time: float
    backlog_s: float = 0.0


def mean_of(samples: list[LoadSample], now: float, stale_s: float) -> LoadSample | None:
    """One sample for all engines of a service; requests are balanced over them.

    An engine whose sample is older than ``stale_s`` seconds counts as idle. None without samples.
    """
    if not samples:
        return None
    heard = [s for s in samples if now - s.time <= stale_s]
    count = len(samples)
    return LoadSample(
        kv_usage=sum(s.kv_usage for s in heard) / count,
        running=sum(s.running for s in heard) / count,
        waiting=sum(s.waiting for s in heard) / count,
        capacity=sum(s.capacity for s in samples) / count,
        time=now,
        backlog_s=sum(s.backlog_s for s in heard) / count,
    )


@dataclass(frozen=True)
class TierState:
    """Where a service stands.

    Attributes:
        level: Current tier.
        rest: Tier that the last sample allows to come down to.
        calm_since: Since when ``rest`` has been below ``level``, in seconds; infinite if it is not.
        seen: Time of the last sample.
    """

    level: int = 0
    rest: int = 0
    calm_since: float = math.inf
    seen: float = -math.inf


class LoadTiers:
    """Turns samples into a tier.

    A signal at or past its threshold raises the tier at once. It comes down one at a time, each
    after all signals have been below the tier's thresholds, less a margin, for ``hold_s``.

    An engine sends a sample with each step and, when it falls idle, one that says so. A sample
    stands until the next; one older than ``stale_s`` was the last of an engine that is gone, and
    from then on the service counts as idle.
    """

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
        self._steps = tuple(
            zip(settings.kv, settings.batch, settings.load, settings.backlog_s, strict=True)
        )

    def settle(self, state: TierState, now: float) -> TierState:
        """The state at ``now`` if nothing was heard since."""
        silent_from = state.seen + self._settings.stale_s
        state = self._descend(state, min(now, silent_from))
        if now > silent_from and state.level:
            calm = min(state.calm_since, silent_from)
            state = self._descend(replace(state, rest=0, calm_since=calm), now)
        return state

    def observe(self, state: TierState, sample: LoadSample) -> TierState:
        """The state once ``sample`` was heard."""
        now = max(sample.time, state.seen)
        state = self.settle(state, now)
        level = max(state.level, self._passed(sample, 1.0))
        rest = self._passed(sample, 1.0 - self._settings.margin)
        calm = min(state.calm_since, now) if rest < level else math.inf
        return TierState(level, rest, calm, now)

    def _descend(self, state: TierState, now: float) -> TierState:
        level, calm, hold = state.level, state.calm_since, self._settings.hold_s
        while level > state.rest and now - calm >= hold:
            level -= 1
            calm += hold
        return replace(state, level=level, calm_since=calm if level > state.rest else math.inf)

    def _passed(self, sample: LoadSample, share: float) -> int:
        """How many thresholds, scaled by ``share``, any signal has reached."""
        batch = sample.running + sample.waiting
        load = batch / sample.capacity if sample.capacity > 0 else 0.0
        signals = (sample.kv_usage, batch, load, sample.backlog_s)
        reached = [
            any(signal >= limit * share for signal, limit in zip(signals, limits, strict=True))
            for limits in self._steps
        ]
        return sum(reached)
