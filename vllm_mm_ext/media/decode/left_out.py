"""Which pictures of a stream can be left out, and what a decoder makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from av.packet import Packet

from vllm_mm_ext.media.decode.references import (
    Held,
    Picture,
    References,
    UnusualError,
    lists_of,
    mark,
)


class LostReferencesError(Exception):
    """A picture that was left out has changed what others refer to."""


class FFmpegReferences:
    """What FFmpeg's decoder keeps for reference when pictures are left out.

    In place of a missing picture it puts a copy of the one decoded before, right behind that in
    presentation order, and lets go of the oldest one where there is no room.
    """

    def __init__(self) -> None:
        self._held: list[Held] = []

    def follow(self, picture: Picture, *, given: bool, right: bool) -> None:
        """Follow the decoder by a picture.

        Args:
            picture: The next picture.
            given: The decoder gets it.
            right: It must be decoded right.

        Raises:
            LostReferencesError: It would not be.
        """
        if not picture.slices:
            return
        header, order = picture.slices[0], picture.order
        if right:
            try:
                lists = [ls for each in picture.slices for ls in lists_of(self._held, each, order)]
            except UnusualError as error:
                raise LostReferencesError from error
            if tuple(lists) != picture.lists:
                raise LostReferencesError
        if not header.is_ref:
            return
        most = max(1, header.sps.num_refs)
        number = picture.number
        if given:
            mark(self._held, header)
        else:
            number, order = -1, self._held[-1].order + 2 if self._held else 0
            if len(self._held) >= most:
                del self._held[0]
        self._held.append(Held(number, header.frame_num, order))
        if len(self._held) > most:
            del self._held[0]


def needed_pictures(
    pictures: Sequence[Picture | None], wanted: Sequence[bool], held: frozenset[int]
) -> list[tuple[bool, bool]]:
    """Which pictures in a row must be decoded, so that the wanted ones are right.

    A missing picture changes the lists of B pictures, which are sorted by presentation order, but
    hardly those of P pictures. So a B picture also needs that all pictures are there that are kept
    for reference, right or not.

    Args:
        pictures: What ``References.read`` said of each.
        wanted: Whether each is wanted for itself.
        held: Numbers of pictures to which pictures after these may refer.

    Returns:
        For each, whether it must be decoded, and whether it must be right.
    """
    marks = [(False, False)] * len(pictures)
    right, there = set(held), set[int]()
    everything = False
    for at in reversed(range(len(pictures))):
        picture = pictures[at]
        if picture is None:
            everything = True
            marks[at] = (True, False)
        elif everything or wanted[at] or not picture.is_b or picture.number in right:
            right.update(number for numbers in picture.lists for number in numbers)
            if picture.is_b:
                there |= picture.held
            marks[at] = (True, True)
        elif picture.number in there:
            marks[at] = (True, False)
    return marks


class LeftOut:
    """Tells packet by packet what a decoder need not get, for packets in decoding order.

    Args:
        references: Reads the stream's packets.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self.restart()

    def restart(self) -> None:
        """Begin anew: the next packet is the first that the decoder gets."""
        self._references.restart()
        self._decoder = FFmpegReferences()

    def marks(self, batch: Sequence[tuple[Packet[Any], bool]]) -> list[tuple[bool, bool]]:
        """What becomes of the next packets.

        Pictures to which later packets may refer are among those that are decoded right.

        Args:
            batch: Packets, and whether each is wanted for itself.

        Returns:
            For each, whether the decoder must get it, and whether its picture is right then.

        Raises:
            LostReferencesError: What was left out would make pictures wrong.
        """
        wanted = [needed for _, needed in batch]
        pictures = [self._picture(packet, needed) for packet, needed in batch]
        marks = needed_pictures(pictures, wanted, self._references.held)
        for picture, (given, right) in zip(pictures, marks, strict=True):
            if picture is not None:
                self._decoder.follow(picture, given=given, right=right)
        return [
            # What is not understood is decoded with all that comes before it.
            (given, right or picture is None)
            for picture, (given, right) in zip(pictures, marks, strict=True)
        ]

    def _picture(self, packet: Packet[Any], needed: bool) -> Picture | None:
        # Where recordings were joined, the container has other parameter sets from a packet on.
        if packet.has_sidedata("new_extradata"):
            self._references.learn(bytes(packet.get_sidedata("new_extradata")))
        return self._references.read(memoryview(packet), wanted=needed)
