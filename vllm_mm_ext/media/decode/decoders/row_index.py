"""Finds the row of a packet table by a packet's timestamp, without a copy of hours of them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
from av.packet import Packet

from vllm_mm_ext.media.types import PacketTable


class RowIndex:
    """Rows of a packet table with exact timestamps, by timestamp.

    Args:
        table: The packet table.
    """

    def __init__(self, table: PacketTable) -> None:
        self.pts = np.ascontiguousarray(table.pts).data
        self._order = np.ascontiguousarray(table.order).data
        # Where recordings were joined, later pictures may have earlier timestamps.
        sorted_ = bool((np.diff(table.pts) > 0).all())
        self._row_of = None if sorted_ else {p: row for row, p in enumerate(self.pts)}

    def place_of(self, packet: Packet[Any]) -> tuple[int, int]:
        """As ``place``, of a packet.

        A packet that an edit list hides has no row, though a picture may have its timestamp: what
        is hidden behind one edit has timestamps of the next one.
        """
        return self.place(None if packet.is_discard else packet.pts)

    def place(self, timestamp: int | None) -> tuple[int, int]:
        """Row and decode position of a picture; -1 each for a timestamp that no picture has."""
        if timestamp is None:
            return -1, -1
        if self._row_of is not None:
            row = self._row_of.get(timestamp, -1)
        else:
            row = bisect_left(self.pts, timestamp)
            if row == len(self.pts) or self.pts[row] != timestamp:
                row = -1
        return row, self._order[row] if row >= 0 else -1
