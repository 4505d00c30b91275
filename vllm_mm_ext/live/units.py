"""Cuts what a session hears and sees into the units and stretches of its open message."""

from __future__ import annotations

from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.frame_choice import FrameSlots, PlacedSight
from vllm_mm_ext.live.growing_media import GrowingMedia
from vllm_mm_ext.live.listening import Piece
from vllm_mm_ext.live.prompt import Stretch
from vllm_mm_ext.live.resampling import Samples
from vllm_mm_ext.live.sample_queue import SampleQueue
from vllm_mm_ext.live.session_clock import SessionClock
from vllm_mm_ext.live.voice import VOICE_RATE, VOICE_WINDOW
from vllm_mm_ext.live.watching import Sight


class UnitCutter:
    """The sound and frames of one session's open message. Pure: times are arguments.

    Args:
        family: What the model takes.
        now: Monotonic seconds.
    """

    def __init__(self, family: FamilyTraits, now: float) -> None:
        self._clock = SessionClock(family.audio_rate, now)
        self._media = GrowingMedia(family)
        # Speech is told two windows of the detector late.
        self._late = 3 * VOICE_WINDOW * family.audio_rate // VOICE_RATE
        # The padding before speech, if sound outside speech is not kept.
        self._padding: int | None = None
        self._ring = SampleQueue()
        self._speaks = False
        # The message as it is if it ends in the present pause, and what came since.
        self._cut: int | None = None
        self._previewed: tuple[Stretch, ...] = ()
        self._waiting_sound = SampleQueue()
        self._waiting_sights = FrameSlots(family.unit_s / family.frame_slots)
        self._sound_samples = 0
        self._frames = 0

    @property
    def sound_samples(self) -> int:
        """Samples that came into the open message, for the protocol's least length of a commit."""
        return self._sound_samples

    @property
    def padding_samples(self) -> int:
        """Samples that are kept for the start of the next speech."""
        return len(self._ring)

    @property
    def frames(self) -> int:
        """Frames that came into the open message, those left out too."""
        return self._frames

    @property
    def nbytes(self) -> int:
        """Bytes of sound and frames: the open message's, the padding's, and what waits."""
        waiting = self._waiting_sound.nbytes + self._waiting_sights.nbytes
        return self._media.nbytes + self._ring.nbytes + waiting

    def gate(self, padding: int | None) -> None:
        """Keep sound within speech only, or all sound.

        Args:
            padding: Samples before speech that are kept for its start; None: all sound goes into
                the message, and speech neither begins nor ends.
        """
        self.resume()
        if padding is not None and not self._speaks:
            self._media.end_stretch()
        self._padding = padding
        if padding is None:
            self._ring.clear()

    def hear(self, piece: Piece, received: int, now: float) -> bool:
        """Take sound; True: a unit was completed, so the open prompt has grown.

        Args:
            piece: The next sound.
            received: Of ``Heard``.
            now: Monotonic seconds.
        """
        self._clock.hear(received, now)
        if self._cut is not None:
            self._waiting_sound.push(piece.position, piece.samples)
        elif self._keeps_sound:
            return self._add_sound(piece.position, piece.samples)
        else:
            self._ring.push(piece.position, piece.samples)
            self._ring.keep_last((self._padding or 0) + self._late)
        return False

    def see(self, sight: Sight, now: float) -> bool:
        """Take a frame; True: a unit was completed.

        Args:
            sight: The frame.
            now: Monotonic seconds.
        """
        placed = PlacedSight(sight, self._clock.place(sight.time_s, now))
        self._frames += 1
        sounds = self._clock.sounds(now)
        if self._cut is not None and sounds:
            self._waiting_sights.add(placed)
            return False
        # Where sound ends in a pause, nothing tells how speech goes on; frames do not wait for it.
        grown = self.resume()
        keeps = self._keeps_sound and sounds
        sounds_from = self._clock.sound_end if keeps else None
        return self._media.add_sight(placed, sounds_from=sounds_from) or grown

    def begin_speech(self, position: int) -> bool:
        """Speech began; True: a unit was completed.

        Args:
            position: Sound from this sample on is kept, as far as the padding reaches.
        """
        self._speaks = True
        sound = self._ring.take_from(position)
        self._ring.clear()
        return self._add_sound(*sound)

    def preview(self, position: int) -> tuple[Stretch, ...]:
        """What ``end_speech`` at this sample and ``commit`` will return, in a pause of speech.

        What comes from now on waits for ``end_speech`` or ``resume``.

        Args:
            position: A sample that was heard.
        """
        if self._cut != position:
            self.resume()
            self._cut = position
            start, sound = self._media.sound.take_from(position)
            self._sound_samples -= len(sound)
            self._waiting_sound.push(start, sound)
            cut_s = self._clock.of_sample(position)
            self._waiting_sights.begin(cut_s)
            # Where nothing was heard since, frames are as new as the sound.
            for placed in self._media.slots.take_from(cut_s) if len(sound) else ():
                self._waiting_sights.add(placed)
            self._previewed = self._media.finished()
        return self._previewed

    def resume(self) -> bool:
        """Speech goes on after a pause that was previewed; True: a unit was completed."""
        if self._cut is None:
            return False
        self._cut = None
        for placed in self._waiting_sights.take_all():
            self._media.slots.add(placed)
        sound = self._waiting_sound.take_from(0)
        return self._add_sound(*sound)

    def end_speech(self, position: int) -> None:
        """Speech ended; ``commit`` follows.

        Args:
            position: Sound from this sample on, and frames beside it, are not of this message; a
                unit that was completed stays whole.
        """
        self.preview(position)
        self._speaks = False

    def commit(self) -> tuple[Stretch, ...]:
        """Close the open message: all its media, the last unit short; what follows is new."""
        cut, stretches = self._cut, self._previewed
        if cut is None:
            stretches = self._media.finished()
        self._media.forget()
        self._cut, self._sound_samples, self._frames = None, 0, 0
        start, sound = self._waiting_sound.take_from(0)
        for placed in self._waiting_sights.take_all():
            self._frames += 1
            self._media.add_sight(placed, sounds_from=None)
        if self._keeps_sound:
            self._add_sound(start, sound)
        else:
            self._ring.push(start, sound)
        return stretches

    def clear(self) -> None:
        """Drop the open message's media, and what was kept for the next speech."""
        self._media.forget()
        self._ring.clear()
        self._waiting_sound.clear()
        self._waiting_sights.take_all()
        self._clock.forget_client()
        self._speaks = False
        self._cut, self._sound_samples, self._frames = None, 0, 0

    def pass_time(self, now: float) -> bool:
        """Complete what ends by the clock: units of frames alone; True: one was completed.

        Args:
            now: Monotonic seconds.
        """
        return self._media.pass_time(self._clock.time(now))

    def deadline(self) -> float | None:
        """When ``pass_time`` has something to do, in monotonic seconds."""
        unit_end = self._media.unit_end
        return None if unit_end is None else self._clock.when(unit_end)

    def stretches(self) -> tuple[Stretch, ...]:
        """The complete units of the open message."""
        return self._media.stretches()

    def split(self) -> None:
        """Let the open unit begin a new stretch."""
        self._media.split()

    def drop_first(self, count: int) -> None:
        """Forget the oldest stretches of the open message.

        Args:
            count: How many of those that do not grow any more.
        """
        before = len(self._media.stretches())
        self._media.drop_first(count)
        # They stand in the preview of a pause too.
        self._previewed = self._previewed[before - len(self._media.stretches()) :]

    @property
    def _keeps_sound(self) -> bool:
        return self._padding is None or self._speaks

    def _add_sound(self, position: int, samples: Samples) -> bool:
        if not len(samples):
            return False
        self._sound_samples += len(samples)
        return self._media.add_sound(position, samples, self._clock.of_sample(position))
