"""The boxes of which MP4 files are made."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """Boxes that lie side by side: type, and all bytes."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + size]))
        at += size
    return found


def with_edits(source: Path, path: Path, edits: Sequence[tuple[float, float]]) -> Path:
    """Copy a file that has its index behind its data, with another edit list in each track.

    Args:
        source: The file.
        path: The copy.
        edits: Of each edit, how many seconds it shows, and from which second of the media on.
    """
    parts = []
    for kind, data in boxes(source.read_bytes()):
        if kind == b"moov":
            inside = [
                _edited(whole, edits) if each == b"trak" else whole
                for each, whole in boxes(data[8:])
            ]
            data = _box(b"moov", b"".join(inside))
        parts.append(data)
    path.write_bytes(b"".join(parts))
    return path


def _edited(track: bytes, edits: Sequence[tuple[float, float]]) -> bytes:
    inside = boxes(track[8:])
    header = dict(boxes(dict(inside)[b"mdia"][8:]))[b"mdhd"]
    # The media's clock has so many ticks a second, that of the film has 1000.
    ticks = int.from_bytes(header[20:24], "big")
    entries = [
        struct.pack(">IiHH", round(1000 * lasts), round(begin * ticks), 1, 0)
        for lasts, begin in edits
    ]
    edit_list = _box(b"elst", struct.pack(">II", 0, len(edits)) + b"".join(entries))
    first, *others = [whole for kind, whole in inside if kind != b"edts"]
    return _box(b"trak", b"".join([first, _box(b"edts", edit_list), *others]))


def _box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(data), kind) + data
