"""How long complete units wait until the engine has computed them. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Punctuality:
    """Counts of the appends of many sessions.

    Attributes:
        appends: Appends that the engine has ended.
        late: Those that ended later than one unit's time after their unit was complete.
        worst_s: The most seconds from a complete unit to the end of its append.
        computed: Prompt tokens that appends computed, those in KV not counted.
    """

    appends: int = 0
    late: int = 0
    worst_s: float = 0.0
    computed: int = 0


class AppendClock:
    """Follows the appends of one session, of which one runs while the newest of the others waits.

    Args:
        counts: Where appends are counted.
        unit_s: Seconds of a unit.
    """

    def __init__(self, counts: Punctuality, unit_s: float) -> None:
        self._counts = counts
        self._unit_s = unit_s
        self._running: list[float] = []
        self._waiting: list[float] = []

    def asked(self, now: float) -> None:
        """An append has been handed to the engine."""
        (self._waiting if self._running else self._running).append(now)

    def overtaken(self) -> None:
        """A response has taken the place of the append that waited."""
        self._waiting.clear()

    def ended(self, now: float, computed: int) -> None:
        """The append that ran has ended; one that waited runs now."""
        self._counts.computed += computed
        for begun in self._running:
            waited = now - begun
            self._counts.appends += 1
            self._counts.late += waited > self._unit_s
            self._counts.worst_s = max(self._counts.worst_s, waited)
        self._running, self._waiting = self._waiting, []
