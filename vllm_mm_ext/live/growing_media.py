"""The media of a message that still goes on: its stretches, and its open unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from vllm_mm_ext.live.family import MAX_STRETCH_S, FamilyTraits
from vllm_mm_ext.live.frame_choice import FrameSlots, PlacedSight
from vllm_mm_ext.live.prompt import Stretch, Unit
from vllm_mm_ext.live.resampling import Samples
from vllm_mm_ext.live.sample_queue import SampleQueue

# Of a camera that is slower than units, the last frame is shown again beside sound for so long.
_FRAME_LASTS_S = 10.0
# Frames of a unit come before its end by at least this, in seconds.
_MOMENT_S = 1e-4

Shape = tuple[int, ...]


@dataclass(slots=True)
class _Growing:
    """The stretch that grows.

    Attributes:
        stretch_id: Its name.
        start_s: When it begins, in seconds of the session.
        sounding: Its units have sound.
        units: Those that are complete.
        shape: Of the frames of its units; empty: they have none.
    """

    stretch_id: str
    start_s: float
    sounding: bool
    units: list[Unit] = field(default_factory=list)
    shape: Shape = ()


@dataclass(frozen=True, slots=True)
class _NewUnit:
    """A unit that may be added.

    Attributes:
        unit: The unit.
        shape: Of its frames; empty: it has none.
        begins: It begins a new stretch, being of another kind than those before.
        sights: Its frames.
    """

    unit: Unit
    shape: Shape
    begins: bool
    sights: tuple[PlacedSight, ...]


class GrowingMedia:
    """What came in since the last commit, as stretches of units.

    A stretch ends where sound begins or ends, where frames begin, end or change their size (at the
    border of a unit), and after ``MAX_STRETCH_S``.

    Args:
        family: What the model takes.
    """

    def __init__(self, family: FamilyTraits) -> None:
        self._family = family
        self._named = 0
        self._slot_s = family.unit_s / family.frame_slots
        self._closed: list[Stretch] = []
        self._growing: _Growing | None = None
        # The sound of the open unit, and frames from its start on.
        self.sound = SampleQueue()
        self.slots = FrameSlots(self._slot_s)
        # The last frame that a unit got.
        self._last: PlacedSight | None = None
        self._unit_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of sound and frames."""
        return self._unit_bytes + self.sound.nbytes + self.slots.nbytes

    @property
    def sounding(self) -> bool:
        """Whether the stretch that grows has sound, or awaits it."""
        return self._growing is not None and self._growing.sounding

    @property
    def unit_end(self) -> float | None:
        """When a unit of frames alone ends, in seconds of the session; None: there is none."""
        if self._growing is None or self._growing.sounding:
            return None
        end = self._unit_start + self._family.unit_s
        return end if self.slots.holds_before(end) else None

    def add_sound(self, position: int, samples: Samples, time_s: float) -> bool:
        """Add sound that follows the last sound.

        Args:
            position: Of its first sample.
            samples: At the model's rate.
            time_s: The time of its first sample, in seconds of the session.

        Returns:
            Whether a unit was completed.
        """
        growing = self._growing
        if growing is None or not growing.sounding:
            self._begin(time_s, sounding=True)
        elif not growing.units and not self.sound:
            # A frame came first.
            growing.start_s = time_s
            self.slots.begin(time_s)
        self.sound.push(position, samples)
        unit, grown = self._family.unit_samples, False
        while len(self.sound) >= unit:
            self._complete(self.sound.take(unit))
            grown = True
        return grown

    def add_sight(self, placed: PlacedSight, *, sounds_from: float | None) -> bool:
        """Add a frame.

        Args:
            placed: The frame, no earlier than the last one.
            sounds_from: When the sound that is coming in goes on; None: none comes in.

        Returns:
            Whether a unit was completed.
        """
        grown = False
        if self.sounding and sounds_from is None:
            grown = self.end_stretch()
        growing = self._growing
        if growing is not None and not growing.sounding:
            grown = self.pass_time(placed.time_s)
            if (
                self._growing is not None
                and placed.time_s >= self._unit_start + self._family.unit_s
            ):
                # A unit without frames.
                self._close()
        if self._growing is None:
            start_s = placed.time_s if sounds_from is None else min(placed.time_s, sounds_from)
            self._begin(start_s, sounding=sounds_from is not None)
        self.slots.add(placed)
        return grown

    def pass_time(self, time_s: float) -> bool:
        """Complete the units of frames alone that end by this time; True: there was one.

        Args:
            time_s: Seconds of the session.
        """
        grown = False
        # A timer that is set to the end may see a time that is rounded down.
        while (end := self.unit_end) is not None and end <= time_s + _MOMENT_S:
            self._complete(self.sound.take(0))
            grown = True
        return grown

    def end_stretch(self) -> bool:
        """Close the stretch, with what the open unit has; True: it has something."""
        last = self._last_unit()
        if last is not None:
            self._add(last)
            self.sound.clear()
            self.slots.take_before(inf, self._family.frame_slots)
        self._close()
        return last is not None

    def split(self) -> None:
        """Let the open unit begin a new stretch."""
        growing = self._growing
        if growing is not None and growing.units:
            self._begin(self._unit_start, sounding=growing.sounding)

    def drop_first(self, count: int) -> None:
        """Forget the oldest stretches.

        Args:
            count: How many of those that do not grow any more.
        """
        dropped, self._closed = self._closed[:count], self._closed[count:]
        self._unit_bytes -= sum(unit_bytes(unit) for stretch in dropped for unit in stretch.units)

    def stretches(self) -> tuple[Stretch, ...]:
        """The complete units."""
        growing = self._growing
        if growing is None or not growing.units:
            return tuple(self._closed)
        return *self._closed, Stretch(growing.stretch_id, tuple(growing.units))

    def finished(self) -> tuple[Stretch, ...]:
        """The message as it is if it ends here, the last unit short. Changes nothing."""
        growing, last = self._growing, self._last_unit()
        if growing is None or last is None:
            return self.stretches()
        if last.begins:
            return *self.stretches(), Stretch(self._name(self._named + 1), (last.unit,))
        return *self._closed, Stretch(growing.stretch_id, (*growing.units, last.unit))

    def forget(self) -> None:
        """The next message begins."""
        sights = self.slots.take_before(inf, self._family.frame_slots)
        self._last = sights[-1] if sights else self._last
        self._growing = None
        self._closed = []
        # ``finished`` may have given the next name.
        self._named += 1
        self.sound.clear()
        self._unit_bytes = 0

    @property
    def _unit_start(self) -> float:
        """When the open unit begins, in seconds of the session."""
        growing = self._growing
        assert growing is not None
        return growing.start_s + len(growing.units) * self._family.unit_s

    def _name(self, number: int) -> str:
        return f"stretch_{number}"

    def _begin(self, start_s: float, *, sounding: bool) -> None:
        self._close()
        self._named += 1
        self._growing = _Growing(self._name(self._named), start_s, sounding)
        self.slots.begin(start_s)

    def _close(self) -> None:
        self._closed = list(self.stretches())
        self._growing = None

    def _complete(self, samples: Samples) -> None:
        """The open unit has all its sound."""
        unit_s = self._family.unit_s
        sights = self.slots.take_before(self._unit_start + unit_s, self._family.frame_slots)
        self._add(self._new_unit(samples, sights, unit_s))
        growing = self._growing
        if growing is not None and len(growing.units) * unit_s >= MAX_STRETCH_S:
            self.split()

    def _add(self, new: _NewUnit) -> None:
        if new.begins:
            self._begin(self._unit_start, sounding=self.sounding)
        growing = self._growing
        assert growing is not None
        growing.units.append(new.unit)
        growing.shape = new.shape
        self._unit_bytes += unit_bytes(new.unit)
        self._last = new.sights[-1] if new.sights else None

    def _last_unit(self) -> _NewUnit | None:
        """The open unit as it is; None: it has nothing."""
        if self._growing is None:
            return None
        samples, sights = self.sound.copy(), self.slots.shown_before(inf, self._family.frame_slots)
        if len(samples):
            duration = len(samples) / self._family.audio_rate
        elif sights:
            duration = sights[-1].time_s - self._unit_start + self._slot_s
            duration = min(max(duration, self._slot_s), self._family.unit_s)
        else:
            return None
        return self._new_unit(samples, sights, duration)

    def _new_unit(
        self, samples: Samples, sights: Sequence[PlacedSight], duration_s: float
    ) -> _NewUnit:
        """The open unit with this sound and these frames."""
        growing = self._growing
        assert growing is not None
        family, unit_start, last = self._family, self._unit_start, self._last
        sights = tuple(sights)
        if not sights and last is not None and unit_start - last.time_s <= _FRAME_LASTS_S:
            sights = (last,)
        shape = sights[0].shape if sights else ()
        begins = bool(growing.units) and shape != growing.shape
        stretch_start = unit_start if begins else growing.start_s
        start_s = len(growing.units) * family.unit_s if not begins else 0.0
        # The sound of a unit may be shorter than a moment.
        last_s = max(start_s, start_s + duration_s - _MOMENT_S)
        frames = [
            sight.frame(min(max(sight.time_s - stretch_start, start_s), last_s)) for sight in sights
        ]
        frames += frames[-1:] * (-len(frames) % family.frame_multiple)
        unit = Unit(samples, tuple(frames))
        return _NewUnit(unit, shape, begins, sights)


def unit_bytes(unit: Unit) -> int:
    """Bytes of a unit's sound and of its frames, one that is repeated counted once.

    Args:
        unit: Any unit.
    """
    frames: dict[int, int] = {id(frame.pixels): frame.pixels.nbytes for frame in unit.frames}
    return unit.samples.nbytes + sum(frames.values())
