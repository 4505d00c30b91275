"""Which packets to decode for the wanted frames: pure functions of the packet table.

A decoder can start at the last keyframe at or before a wanted frame. So the decoder gets every
group of pictures (GOP) that holds a wanted frame, from the GOP's keyframe up to the last wanted
frame in the GOP, and no other packets. There are two ways over a gap between such runs: to read its
packets without decoding them, or to seek in the file.

Open GOPs: pictures that follow a keyframe in the file but are shown before the keyframe need the
previous GOP too. Such pictures come before the keyframe in presentation order, so this module
counts them to the previous GOP, whose run then reaches past the next keyframe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.types import PacketTable

# A gap of more bytes or packets than this is crossed by a seek. To read past a packet costs 2-4 us
# plus the copy of its bytes (about 1 GB/s through PyAV's demuxer); a seek costs some 0.3 ms in a
# container with an index and several ms in one without.
SEEK_OVER_BYTES = 4 << 20
SEEK_OVER_PACKETS = 1000


class Run(NamedTuple):
    """Packets that are decoded one after the other, without a gap.

    Attributes:
        key: Row of the keyframe to begin at, or -1 for the first packet of the file.
        start: Decode position of the first packet.
        stop: Decode position of the last packet, inclusive.
        wanted: Rows of the frames wanted from this run, increasing.
        seek: Whether to seek to ``key``; otherwise the reader reads on from the previous run's end.
    """

    key: int
    start: int
    stop: int
    wanted: tuple[int, ...]
    seek: bool

    @property
    def num_packets(self) -> int:
        """Number of packets that the decoder gets, with those of hidden frames."""
        return self.stop - self.start + 1


def plan_runs(table: PacketTable, rows: npt.NDArray[np.int64], position: int = -1) -> list[Run]:
    """Find the cheapest set of runs that covers the wanted frames.

    Args:
        table: Packet table with exact timestamps.
        rows: int64 ``[n]`` wanted rows of ``table``, strictly increasing.
        position: Decode position of the last packet that was read.

    Returns:
        Runs in file order that do not overlap: together they never hold more packets than
        decoding from the start of the file up to the last wanted frame. Empty for no rows.
    """
    if not len(rows):
        return []
    keys = keys_of(table, rows)
    runs: list[Run] = []
    for begin, end in _groups(keys):
        key = int(keys[begin])
        wanted = tuple(int(row) for row in rows[begin:end])
        start = 0 if key < 0 else int(table.order[key])
        stop = int(table.order[rows[begin:end]].max())
        if runs and start <= runs[-1].stop + 1:
            last = runs[-1]
            runs[-1] = last._replace(stop=max(last.stop, stop), wanted=last.wanted + wanted)
        else:
            previous = runs[-1].stop if runs else position
            runs.append(Run(key, start, stop, wanted, _seek_wins(table, previous, start)))
    return runs


def split_lanes(
    table: PacketTable, rows: npt.NDArray[np.int64], lanes: int
) -> list[npt.NDArray[np.int64]]:
    """Cut the wanted rows at keyframes into parts of about equal decoding work.

    Threads decode the parts in parallel. A cut costs a seek and, in an open GOP, decoding the
    pictures between two keyframes' runs twice.

    Args:
        table: Packet table with exact timestamps.
        rows: int64 ``[n]`` wanted rows, strictly increasing.
        lanes: Most parts.

    Returns:
        At most ``lanes`` non-empty parts whose concatenation is ``rows``.
    """
    keys = keys_of(table, rows)
    groups = _groups(keys)
    work = [
        int(table.order[rows[begin:end]].max()) - (int(table.order[key]) if key >= 0 else -1) + 1
        for begin, end in groups
        for key in (keys[begin],)
    ]
    total, done, first = sum(work), 0, 0
    parts: list[npt.NDArray[np.int64]] = []
    for (_, end), cost in zip(groups, work, strict=True):
        done += cost
        if end == len(rows) or done * lanes >= total * (len(parts) + 1):
            parts.append(rows[first:end])
            first = end
    return parts


def keys_of(table: PacketTable, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Row of the keyframe at which decoding starts, for each wanted row; -1: start of the file."""
    key_rows = np.flatnonzero(table.is_key)
    if not len(key_rows):
        return np.full(len(rows), -1, np.int64)
    nearest = np.searchsorted(key_rows, rows, side="right") - 1
    found = np.where(nearest >= 0, key_rows[np.maximum(nearest, 0)], -1)
    # A keyframe shown before the frame yet decoded after it is no help: begin earlier.
    late = (found >= 0) & (table.order[found] > table.order[rows])
    for i in np.flatnonzero(late):
        earlier = key_rows[: nearest[i]]
        fit = earlier[table.order[earlier] <= table.order[rows[i]]]
        found[i] = fit[-1] if len(fit) else -1
    # Runs must be in file order, whatever a broken file claims.
    return np.minimum.accumulate(found[::-1])[::-1].astype(np.int64)


def _groups(keys: npt.NDArray[np.int64]) -> Sequence[tuple[int, int]]:
    """Begin and end of each range of positions with the same keyframe."""
    cuts = np.flatnonzero(np.diff(keys)) + 1
    edges = [0, *cuts.tolist(), len(keys)]
    return list(itertools.pairwise(edges))


def _seek_wins(table: PacketTable, previous: int, start: int) -> bool:
    """Whether to seek over the packets between two decode positions instead of reading them."""
    if not table.seekable:
        return False
    gap = start - previous - 1
    if gap > SEEK_OVER_PACKETS:
        return True
    between = (table.order > previous) & (table.order < start)
    return int(table.size[between].sum()) > SEEK_OVER_BYTES
