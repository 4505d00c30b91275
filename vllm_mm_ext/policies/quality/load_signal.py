"""The load of a service as all its API servers see it: samples in, one tier out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm_mm_ext.config.quality_settings import TierSettings
from vllm_mm_ext.policies.quality.board import Board
from vllm_mm_ext.policies.quality.tiers import LoadSample, LoadTiers, mean_of


class LoadSignal:
    """The tier on a board.

    vLLM sends the figures of an engine step to one API server only, so whichever gets them moves
    the tier on; the others read it.

    Args:
        settings: The ``tiers`` section.
        board: Shared by the service.
        published: What engines publish by themselves, by index; asked when the tier is.
        engines: Engines of the service; those never heard of do not count.
    """

    def __init__(
        self,
        settings: TierSettings,
        board: Board,
        published: Callable[[], Iterable[tuple[int, LoadSample]]] | None = None,
        engines: int = 1,
    ) -> None:
        self._settings = settings
        self._engines = range(engines)
        self._published = published
        self._heard: dict[int, float] = {}
        self._board = board
        self._tiers = LoadTiers(settings)

    def report(self, engine: int, sample: LoadSample) -> None:
        """Take an engine's newest sample into account.

        Args:
            engine: Index of the engine.
            sample: How busy it is.
        """
        board = self._board
        with board.writing() as held:
            if not held:
                return
            board.write_sample(engine, sample)
            heard = board.samples(self._engines)
            mean = mean_of(heard, sample.time, self._settings.stale_s)
            if mean is not None:
                board.write_tier(self._tiers.observe(board.tier(), mean))

    def level(self, now: float) -> int:
        """The tier at ``now``, in seconds on the clock of the samples."""
        for engine, sample in self._published() if self._published else ():
            if self._heard.get(engine) != sample.time:
                self._heard[engine] = sample.time
                self.report(engine, sample)
        return self._tiers.settle(self._board.tier(), now).level
