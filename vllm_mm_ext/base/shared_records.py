"""Records in a file that processes map: read without a lock, and known to be whole or not."""

from __future__ import annotations

import mmap
import struct
import zlib

# A reader that meets a writer finds the record whole when it looks once more: a write takes less
# time than a look.
_LOOKS = 3
_CRC = struct.Struct("<I")


class Region:
    """Consecutive records of one layout, each followed by its checksum; all zero is empty.

    Args:
        layout: Of one record.
        count: Records of the region.
        start: Byte of the file at which the region begins.

    Attributes:
        end: Byte of the file after the region.
    """

    def __init__(self, layout: struct.Struct, count: int, start: int) -> None:
        self._layout = layout
        self._stride = layout.size + _CRC.size
        self._start = start
        self.end = start + count * self._stride

    def read(self, view: mmap.mmap, place: int) -> tuple[object, ...] | None:
        """The values of a record; None if it is empty or torn."""
        begin = self._start + place * self._stride
        for _ in range(_LOOKS):
            raw = view[begin : begin + self._stride]
            body, checksum = raw[: self._layout.size], raw[self._layout.size :]
            if _CRC.unpack(checksum)[0] == _checksum(body):
                return self._layout.unpack(body)
        return None

    def write(self, view: mmap.mmap, place: int, *values: object) -> None:
        """Write a record. Nobody else writes the same record meanwhile."""
        body = self._layout.pack(*values)
        begin = self._start + place * self._stride
        view[begin : begin + self._stride] = body + _CRC.pack(_checksum(body))

    def clear(self, view: mmap.mmap, place: int) -> None:
        """Make a record empty."""
        begin = self._start + place * self._stride
        view[begin : begin + self._stride] = bytes(self._stride)


def _checksum(body: bytes) -> int:
    # Inverted, so that a record of zeros does not pass.
    return zlib.crc32(body) ^ 0xFFFFFFFF
