"""Packet tables of videos that were never made."""

from __future__ import annotations

import numpy as np

from vllm_mm_ext.media.types import PacketTable


def regular_table(packets: int, gop: int) -> PacketTable:
    """A video of 25 frames a second with a keyframe every ``gop`` frames."""
    return PacketTable(
        pts=np.arange(packets, dtype=np.int64),
        time=np.arange(packets) / 25,
        size=np.full(packets, 1000, np.int32),
        is_key=np.arange(packets) % gop == 0,
        time_base=1 / 25,
    )
