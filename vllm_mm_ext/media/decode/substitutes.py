"""Decodes chosen frames, and others in place of those that turn out not to decode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Frames = npt.NDArray[np.uint8]
# Decodes rows (increasing) into an array of as many frames, adds the rows that are known to decode
# to a set, and returns the positions that were decoded, increasing.
Decode = Callable[[Rows, Frames, set[int]], Rows]

# Passes that look for substitutes. The first takes frames that probably decode, from all of the
# clip; the later ones prefer frames that the decoder has shown already.
_MOST_PASSES = 3


def decode_chosen(
    decode: Decode,
    time: npt.NDArray[np.float64],
    rows: Rows,
    out: Frames,
    *,
    substitute: bool,
) -> Rows:
    """Decode ``rows`` into ``out``.

    Args:
        decode: Decodes frames.
        time: float64 ``[n]`` seconds of all frames of the clip, non-decreasing.
        rows: int64 ``[k]`` the chosen frames, non-decreasing positions in ``time``.
        out: uint8 ``[k, height, width, 3]``, written in place.
        substitute: Decode other frames in place of those that do not decode, as long as the clip
            has any. They lie where the gaps in time between the others are widest.

    Returns:
        int64 ``[m]`` non-decreasing rows; ``out[:m]`` are their pictures, the rest of ``out`` is
        undefined.
    """
    seen: set[int] = set()
    have = _decode_front(decode, rows, out, seen)
    failed = set(rows.tolist()).difference(have.tolist())
    for number in range(_MOST_PASSES if substitute else 0):
        missing = len(rows) - len(have)
        others = _substitutes(time, have, failed, seen, missing, sure_first=number > 0)
        if not len(others):
            break
        found = _decode_front(decode, others, out[len(have) : len(have) + len(others)], seen)
        failed.update(set(others.tolist()).difference(found.tolist()))
        have = np.concatenate([have, found])
    order = np.argsort(have, kind="stable")
    _reorder(out, order)
    return have[order]


def _decode_front(decode: Decode, rows: Rows, out: Frames, seen: set[int]) -> Rows:
    """Decode rows and move the pictures of those that decoded to the front."""
    positions = decode(rows, out, seen)
    if len(positions) < len(rows):
        for place, position in enumerate(positions.tolist()):
            out[place] = out[position]
    return rows[positions]


def _substitutes(
    time: npt.NDArray[np.float64],
    have: Rows,
    failed: set[int],
    seen: set[int],
    count: int,
    *,
    sure_first: bool,
) -> Rows:
    """At most ``count`` rows to try next, increasing.

    Args:
        time: As for ``decode_chosen``.
        have: Rows that were decoded.
        failed: Rows that were tried in vain.
        seen: Rows that are known to decode.
        count: How many rows are missing.
        sure_first: Take rows that may not decode only if there are too few that do.
    """
    sure = np.zeros(len(time), np.bool_)
    sure[sorted(seen)] = True
    tried = np.zeros(len(time), np.bool_)
    tried[have] = tried[sorted(failed)] = True
    sure[have] = True
    # What lies between two failures, without a frame that decodes in between, is probably damaged.
    marks = np.flatnonzero(sure | tried)
    bad = ~sure[marks]
    before = np.searchsorted(marks, np.arange(len(time)), side="right") - 1
    after = np.minimum(before + 1, len(marks) - 1)
    doubtful = bad[np.maximum(before, 0)] & bad[after]
    if sure_first:
        # Next to a failure damage may reach further; between two frames that decode it hardly does.
        likely = ~bad[np.maximum(before, 0)] & ~bad[after]
        groups = [sure, ~sure & likely, ~(sure | likely | doubtful), doubtful]
    else:
        groups = [sure | ~doubtful, doubtful & ~sure]
    taken = have.tolist()
    found: list[int] = []
    for group in groups:
        candidates = np.flatnonzero(group & ~tried)
        picked = _widest_gaps(time, taken or sorted(failed), candidates, count - len(found))
        found += picked
        taken += picked
    return np.array(sorted(found), np.int64)


def _widest_gaps(
    time: npt.NDArray[np.float64], taken: list[int], candidates: Rows, count: int
) -> list[int]:
    """``count`` of ``candidates``, one after the other the one farthest from all frames taken."""
    count = min(count, len(candidates))
    if count <= 0:
        return []
    moments = time[candidates]
    known = np.sort(time[taken])
    after = np.searchsorted(known, moments)
    distance = np.minimum(
        np.abs(moments - known[np.maximum(after - 1, 0)]),
        np.abs(known[np.minimum(after, len(known) - 1)] - moments),
    )
    picked: list[int] = []
    for _ in range(count):
        best = int(distance.argmax())
        picked.append(int(candidates[best]))
        distance = np.minimum(distance, np.abs(moments - moments[best]))
        distance[best] = -1.0
    return picked


def _reorder(frames: Frames, order: Rows) -> None:
    """Move ``frames[order[i]]`` to ``frames[i]``, with room for one frame besides."""
    done = np.zeros(len(order), np.bool_)
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        first, place = frames[start].copy(), start
        while (source := int(order[place])) != start:
            frames[place] = frames[source]
            done[place] = True
            place = source
        frames[place] = first
        done[place] = True
