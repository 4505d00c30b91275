"""The load tier of a service: the load of its engines in, one tier for all its API servers out."""

from __future__ import annotations

from vllm_mm_ext.base.shared_state import EngineLoad, SharedState
from vllm_mm_ext.config.quality_settings import TierSettings
from vllm_mm_ext.policies.quality.tiers import LoadTiers, mean_of


class ServiceTier:
    """The tier in a service's shared state.

    Any API server that looks, or hears of an engine's step, moves the tier on.

    Args:
        settings: The ``tiers`` section.
        state: Shared by the service.
        engines: Engines of the service. Engines that have published no load yet do not count.
    """

    def __init__(self, settings: TierSettings, state: SharedState, engines: int = 1) -> None:
        self._settings = settings
        self._engines = engines
        self._state = state
        self._tiers = LoadTiers(settings)

    def heard(self, engine: int, load: EngineLoad) -> None:
        """Take into account what vLLM tells this API server about a step of an engine.

        Args:
            engine: Index of the engine.
            load: How busy the engine is, as far as vLLM tells. It is published unless the engine
                publishes its load itself, which says more.
        """
        with self._state.writing() as held:
            if not held:
                return
            published = self._state.load(engine)
            if published is None or not published.by_engine:
                self._state.write_load(engine, load)
            self._observe()

    def level(self, now: float) -> int:
        """The tier at ``now``, in seconds on the clock of the loads."""
        with self._state.writing() as held:
            if held:
                self._observe()
        return self._tiers.settle(self._state.tier(), now).level

    def _observe(self) -> None:
        loads = list(self._state.loads(self._engines).values())
        # Observing the same loads again changes nothing.
        if loads:
            mean = mean_of(loads, self._settings.stale_s)
            self._state.write_tier(self._tiers.observe(self._state.tier(), mean))
