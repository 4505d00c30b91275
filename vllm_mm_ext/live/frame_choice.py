"""Chooses among the camera frames of a unit those that the model is shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_mm_ext.live.prompt import Frame
from vllm_mm_ext.live.thumbnails import NOISE, Thumbnail, change
from vllm_mm_ext.live.watching import Sight

# Seconds after which a frame is shown though it is like the last one.
_STILL_S = 2.0
# From which part of a slot on a frame may be an early one of the next slot.
_EARLY = 0.75
# Seconds by which times are rounded at most.
_MOMENT_S = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class PlacedSight:
    """A camera frame on the session's clock."""

    sight: Sight
    time_s: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its pixels."""
        return self.sight.pixels.shape

    @property
    def thumbnail(self) -> Thumbnail:
        """Of its pixels."""
        return self.sight.thumbnail

    def frame(self, time_s: float) -> Frame:
        """The frame that the model is shown, at this time."""
        return Frame(self.sight.pixels, time_s)


class FrameSlots:
    """The frames that came in and are in no unit yet: of each slot the one that differs most.

    The frames of a camera that sends one a slot may come a little early or late: one that comes
    long after that of its slot, and shortly before the next slot, is of the next slot.

    Args:
        slot_s: Seconds for which the model is shown one frame.
    """

    def __init__(self, slot_s: float) -> None:
        self._slot_s = slot_s
        self._start_s = 0.0
        self._slots: dict[int, PlacedSight] = {}
        # Of the last frame that the model was shown.
        self._shown: Thumbnail | None = None
        self._shown_s = 0.0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return sum(placed.sight.pixels.nbytes for placed in self._slots.values())

    def begin(self, start_s: float) -> None:
        """Count slots anew; frames from before this time are taken to be from then.

        Args:
            start_s: Seconds of the session.
        """
        waiting = self.take_all()
        self._start_s = start_s
        for placed in waiting:
            self.add(placed)

    def add(self, placed: PlacedSight) -> None:
        """Take a frame, if it differs more from the slot before than the one that its slot has.

        Args:
            placed: The frame. If its size is new, it takes the place of all frames.
        """
        if self._slots and next(iter(self._slots.values())).shape != placed.shape:
            self._slots.clear()
        time_s = max(placed.time_s, self._start_s)
        at = (time_s - self._start_s) / self._slot_s
        # Frames come in order, and so do their slots.
        slot = max(int(at), next(reversed(self._slots), 0))
        known = self._slots.get(slot)
        if known is not None and at - slot > _EARLY and time_s - known.time_s > self._slot_s / 2:
            slot += 1
            known = self._slots.get(slot)
        before = next((number for number in reversed(self._slots) if number < slot), None)
        reference = self._shown if before is None else self._slots[before].thumbnail
        if known is None or change(reference, placed.thumbnail) > change(
            reference, known.thumbnail
        ):
            self._slots[slot] = replace(placed, time_s=time_s)

    def holds_before(self, end_s: float) -> bool:
        """Whether there are frames of slots before this time."""
        return any(self._is_before(slot, end_s) for slot in self._slots)

    def take_all(self) -> list[PlacedSight]:
        """All frames, in order; none is left."""
        waiting = list(self._slots.values())
        self._slots.clear()
        return waiting

    def take_from(self, start_s: float) -> list[PlacedSight]:
        """The frames from this time on, in order; they are left out here then.

        Args:
            start_s: Seconds of the session.
        """
        later = {slot: one for slot, one in self._slots.items() if one.time_s >= start_s}
        self._slots = {slot: one for slot, one in self._slots.items() if slot not in later}
        return list(later.values())

    def _is_before(self, slot: int, end_s: float) -> bool:
        return self._start_s + slot * self._slot_s < end_s - _MOMENT_S

    def shown_before(self, end_s: float, most: int) -> list[PlacedSight]:
        """Of the slots before this time, frames that show something new, or else the last one.

        Where nothing is new, one in ``_STILL_S`` seconds shows that.

        Args:
            end_s: Seconds of the session.
            most: At most so many, at least one: those that differ most from the one before.
        """
        waiting = [one for slot, one in self._slots.items() if self._is_before(slot, end_s)]
        shown: list[PlacedSight] = []
        changes: list[int] = []
        reference, shown_s = self._shown, self._shown_s
        still_s = _STILL_S - self._slot_s / 2
        for placed in waiting:
            changed = change(reference, placed.thumbnail)
            if changed > NOISE or placed.time_s >= shown_s + still_s:
                shown.append(placed)
                changes.append(changed)
                reference, shown_s = placed.thumbnail, placed.time_s
        while len(shown) > most:
            least = changes.index(min(changes))
            del shown[least], changes[least]
            if least < len(shown):
                before = shown[least - 1].thumbnail if least else self._shown
                changes[least] = change(before, shown[least].thumbnail)
        return shown or waiting[-1:]

    def take_before(self, end_s: float, most: int) -> list[PlacedSight]:
        """Like ``shown_before``; all slots before this time are gone then.

        Args:
            end_s: Seconds of the session.
            most: At most so many.
        """
        shown = self.shown_before(end_s, most)
        if shown:
            self._shown, self._shown_s = shown[-1].thumbnail, shown[-1].time_s
        kept = [slot for slot in self._slots if not self._is_before(slot, end_s)]
        self._slots = {slot: self._slots[slot] for slot in kept}
        return shown
