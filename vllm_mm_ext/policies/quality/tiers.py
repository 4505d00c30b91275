"""Load tiers with hysteresis: up at once, down slowly. Pure; time is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from vllm_mm_ext.base.shared_state import EngineLoad, TierState
from vllm_mm_ext.config.quality_settings import TierSettings


def mean_of(loads: Sequence[EngineLoad], stale_s: float) -> EngineLoad:
    """One load for all engines of a service, over which vLLM balances requests.

    Args:
        loads: The newest load of each engine, one at least.
        stale_s: An engine whose load is by so many seconds older than the newest one counts as
            idle.

    Returns:
        The mean, at the time of the newest load.
    """
    now = max(load.time for load in loads)
    fresh = [load for load in loads if now - load.time <= stale_s]
    count = len(loads)
    return EngineLoad(
        time=now,
        kv_usage=sum(load.kv_usage for load in fresh) / count,
        running=sum(load.running for load in fresh) / count,
        waiting=sum(load.waiting for load in fresh) / count,
        slots=sum(load.slots for load in loads) / count,
        backlog_s=sum(load.backlog_s or 0.0 for load in fresh) / count,
    )


class LoadTiers:
    """Turns loads into a tier.

    A signal at or past its threshold raises the tier at once. The tier comes down one at a time,
    each after all signals have been below the tier's thresholds, less a margin, for ``hold_s``.

    An engine publishes a load with each step and, when it falls idle, one that says so. A load
    holds until the next one; a load older than ``stale_s`` was the last of an engine that is gone,
    and from then on the service counts as idle.

    Args:
        settings: The ``tiers`` section.
    """

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
        self._steps = tuple(
            zip(settings.kv, settings.batch, settings.load, settings.backlog_s, strict=True)
        )

    def settle(self, state: TierState, now: float) -> TierState:
        """The state at ``now`` if nothing was observed since."""
        silent_from = state.seen + self._settings.stale_s
        state = self._descend(state, min(now, silent_from))
        if now > silent_from and state.level:
            calm = min(state.calm_since, silent_from)
            state = self._descend(replace(state, rest=0, calm_since=calm), now)
        return state

    def observe(self, state: TierState, load: EngineLoad) -> TierState:
        """The state once ``load`` was observed."""
        now = max(load.time, state.seen)
        state = self.settle(state, now)
        level = max(state.level, self._passed(load, 1.0))
        rest = self._passed(load, 1.0 - self._settings.margin)
        calm = min(state.calm_since, now) if rest < level else math.inf
        return TierState(level, rest, calm, now)

    def _descend(self, state: TierState, now: float) -> TierState:
        level, calm, hold = state.level, state.calm_since, self._settings.hold_s
        while level > state.rest and now - calm >= hold:
            level -= 1
            calm += hold
        return replace(state, level=level, calm_since=calm if level > state.rest else math.inf)

    def _passed(self, load: EngineLoad, share: float) -> int:
        """How many thresholds, scaled by ``share``, any signal has reached."""
        batch = load.running + load.waiting
        occupancy = batch / load.slots if load.slots > 0 else 0.0
        signals = (load.kv_usage, batch, occupancy, load.backlog_s or 0.0)
        reached = [
            any(signal >= limit * share for signal, limit in zip(signals, limits, strict=True))
            for limits in self._steps
        ]
        return sum(reached)
