"""Which encoder instance is asked about a medium: the same one as before, unless it is down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vllm_mm_ext.fleet.rendezvous import ranked

# Seconds for which an encoder that failed is not asked.
DOWN_S = 10.0


class EncoderChoice:
    """Encoders by preference, without those that failed of late.

    Args:
        encoders: Their URLs.
        clock: Seconds.
    """

    def __init__(
        self, encoders: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._encoders = tuple(encoders)
        self._clock = clock
        self._down_until: dict[str, float] = {}

    def candidates(self, key: str) -> list[str]:
        """Encoders to ask about a medium, one after the other; none if all are down."""
        now = self._clock()
        up = [one for one in self._encoders if self._down_until.get(one, now) <= now]
        return ranked(key, up)

    def failed(self, encoder: str) -> None:
        """Note that an encoder did not answer, or could not serve."""
        self._down_until[encoder] = self._clock() + DOWN_S
