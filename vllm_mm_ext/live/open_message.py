"""The user's message that is not committed yet: what is heard and seen, and where speech is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_mm_ext.live.effects import TurnEnd
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Heard, VoiceWindow
from vllm_mm_ext.live.prompt import Part, Stretch
from vllm_mm_ext.live.session_items import COPIES, Scales, Weighed
from vllm_mm_ext.live.session_options import SemanticVad, ServerVad, TurnDetection
from vllm_mm_ext.live.turn_detector import (
    DetectorOptions,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
)
from vllm_mm_ext.live.units import UnitCutter
from vllm_mm_ext.live.watching import Sight

#: The protocol's shortest commit.
LEAST_SOUND_MS = 100
# After so much silence the turn is shown to the engine as it would be committed, and this much of
# the silence is part of it.
PAUSE_MS = 200
# While the silence goes on, the model is asked again, whether it ends the turn, this often.
ASK_AGAIN_MS = 400
# From which chance on, that the turn has ended, it has; by eagerness.
_TURN_END_CHANCE = {"low": 0.8, "medium": 0.5, "high": 0.3, "auto": 0.5}
# The longest silence within a turn, by eagerness: the protocol's.
_SEMANTIC_SILENCE_MS = {"low": 8_000, "medium": 4_000, "high": 2_000, "auto": 4_000}


@dataclass(frozen=True, slots=True)
class Started:
    """Speech began ``at_ms`` into the session's sound."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Paused:
    """Speech paused; the turn may have ended."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The turn ended ``at_ms`` into the session's sound."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Grew:
    """A unit was completed."""


Change = Started | Paused | Stopped | Grew


class OpenMessage:
    """What was heard and seen since the last commit.

    Args:
        family: What the model takes.
        scales: Weighs stretches.
        most_stretch_tokens: A stretch with more ends, so that it can go when the context is full.
        detection: How turns are detected.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        family: FamilyTraits,
        scales: Scales,
        most_stretch_tokens: int,
        detection: TurnDetection | None,
        now: float,
    ) -> None:
        self._rate = family.audio_rate
        self._scales = scales
        self._most_stretch_tokens = most_stretch_tokens
        self._cutter = UnitCutter(family, now)
        self._weighed: dict[str, Weighed] = {}
        # Judges windows while turns are detected, and remembers who spoke when they are not.
        self._detector = TurnDetector(self._rate, DetectorOptions())
        self._detection: TurnDetection | None = None
        # Where the message would be cut if the pause ends the turn; None: nobody pauses.
        self._pause_cut: int | None = None
        self._pauses = 0
        self._grown = False
        self.position = 0
        self.detect(detection)

    def detect(self, detection: TurnDetection | None) -> None:
        """Detect turns so from now on; None: not at all."""
        self._go_on()
        self._detection = detection
        if detection is None:
            self._detector.look_away()
            self._cutter.gate(None)
            return
        self._detector.options = _detector_options(detection)
        self._cutter.gate(self._padding(self._detector.options.prefix_padding_ms))

    @property
    def speaking(self) -> bool:
        """Whether the user speaks, as far as turns are detected."""
        return self._detection is not None and self._detector.speaking

    @property
    def pause(self) -> int | None:
        """The number of the user's pause in speech; None: the user has not paused."""
        return None if self._pause_cut is None else self._pauses

    @property
    def sound_ms(self) -> float:
        """Milliseconds of sound in the message."""
        return self._cutter.sound_samples * 1000 / self._rate

    @property
    def silence_ms(self) -> float:
        """Milliseconds of sound held for ``take_silence``."""
        return self._cutter.padding_samples * 1000 / self._rate

    @property
    def frames(self) -> int:
        """Frames in the message."""
        return self._cutter.frames

    @property
    def nbytes(self) -> int:
        """Bytes held for the message."""
        return COPIES * self._cutter.nbytes

    @property
    def at_ms(self) -> int:
        """How long the session's sound is."""
        return self.position * 1000 // self._rate

    def hear(self, heard: Heard, now: float) -> Iterator[Change]:
        """Take sound; each change is to be dealt with before the next one is asked for."""
        self._grown = False
        for piece in heard.pieces:
            self._grown |= self._cutter.hear(piece, heard.received, now)
            self.position = piece.position + len(piece.samples)
            if piece.window is not None and self._detection is not None:
                yield from self._judge(piece.window)
        if self._grown:
            yield Grew()

    def see(self, sight: Sight, now: float) -> Iterator[Change]:
        """Take a frame."""
        if self._cutter.see(sight, now):
            yield Grew()

    def pass_time(self, now: float) -> Iterator[Change]:
        """Complete what ends by the clock."""
        if self._cutter.pass_time(now):
            yield Grew()

    def deadline(self) -> float | None:
        """When ``pass_time`` has something to do."""
        return self._cutter.deadline()

    def parts(self) -> tuple[Weighed, ...]:
        """What is complete of the message."""
        weighed = self._weigh(self._cutter.stretches())
        if weighed and weighed[-1].tokens > self._most_stretch_tokens:
            self._cutter.split()
        return weighed

    def paused_parts(self) -> tuple[Weighed, ...]:
        """The message as it would be committed if the pause ended the turn."""
        if self._pause_cut is None:
            return self.parts()
        return self._weigh(self._cutter.preview(self._pause_cut))

    def _weigh(self, stretches: tuple[Stretch, ...]) -> tuple[Weighed, ...]:
        """Weigh stretches; those that have not changed since the last time keep their weight."""
        weighed = {}
        for stretch in stretches:
            known = self._weighed.get(stretch.stretch_id)
            if known is None or not _same(known.part, stretch):
                known = self._scales.weigh("user", stretch)
            weighed[stretch.stretch_id] = known
        self._weighed = weighed
        return tuple(weighed.values())

    def turn_ended(self, told: TurnEnd) -> Stopped | None:
        """End the turn if the model thinks so; None: it does not, or the pause is over."""
        if not isinstance(self._detection, SemanticVad) or told.pause != self.pause:
            return None
        if told.chance < _TURN_END_CHANCE[self._detection.eagerness]:
            return None
        self._detector.end(self.position)
        return self._stop(self.position)

    def take_silence(self) -> None:
        """Let the message have the padding's sound, though nobody spoke."""
        if isinstance(self._detection, ServerVad) and not self.speaking:
            padding = self._padding(self._detection.prefix_padding_ms)
            self._cutter.begin_speech(max(0, self.position - padding))
            self._cutter.end_speech(self.position)

    def commit(self) -> tuple[Weighed, ...]:
        """Close the message, and the speech in it; what follows is a new one."""
        self._end_speech()
        parts = self._weigh(self._cutter.commit())
        self._weighed = {}
        return parts

    def clear(self) -> None:
        """Drop the message, and the speech in it."""
        self._end_speech()
        self._cutter.clear()
        self._weighed = {}

    def drop_first(self, count: int) -> None:
        """Drop the oldest stretches of the message."""
        self._cutter.drop_first(count)

    def _judge(self, window: VoiceWindow) -> Iterator[Change]:
        """Take what the voice detector says of a window."""
        detector = self._detector
        match detector.step(window.start, window.end, window.probability):
            case SpeechStarted(position):
                self._grown |= self._cutter.begin_speech(position)
                yield Started(position * 1000 // self._rate)
            case SpeechStopped(position):
                yield self._stop(position)
        if not detector.speaking:
            return
        silence = detector.silence(window.end)
        if silence == 0:
            self._go_on()
        elif self._pause_cut is None and silence >= self._samples(PAUSE_MS):
            self._pause_cut = window.end - silence + self._samples(PAUSE_MS)
            self._pauses += 1
            yield self._paused()
        elif self._asks_again(window.end):
            self._pause_cut = window.end
            yield self._paused()
        # Whoever was told of the pause may have ended the turn.
        if detector.speaking and self._waited_long(silence):
            detector.end(window.end)
            yield self._stop(window.end)

    def _paused(self) -> Paused:
        # The turn that is shown to the engine now has the units that were completed.
        self._grown = False
        return Paused()

    def _asks_again(self, position: int) -> bool:
        """Whether the model is to judge the pause anew, with the silence that has come since."""
        if self._pause_cut is None or not isinstance(self._detection, SemanticVad):
            return False
        return position >= self._pause_cut + self._samples(ASK_AGAIN_MS)

    def _waited_long(self, silence: int) -> bool:
        """Whether the model may no longer wait for more speech, whatever it thinks."""
        if not isinstance(self._detection, SemanticVad):
            return False
        return silence >= self._samples(_SEMANTIC_SILENCE_MS[self._detection.eagerness])

    def _stop(self, position: int) -> Stopped:
        """Let the sound of the turn end at the pause's cut, if there was one, or here."""
        end = position if self._pause_cut is None else self._pause_cut
        self._pause_cut = None
        self._cutter.end_speech(end)
        return Stopped(position * 1000 // self._rate)

    def _end_speech(self) -> None:
        if self._detector.speaking:
            self._go_on()
            self._detector.end(self.position)
            self._cutter.end_speech(self.position)

    def _go_on(self) -> None:
        if self._pause_cut is not None:
            self._pause_cut = None
            self._grown |= self._cutter.resume()

    def _padding(self, milliseconds: int) -> int:
        """Samples that are held of sound outside speech: enough for a commit, in any case."""
        return self._samples(max(milliseconds, LEAST_SOUND_MS))

    def _samples(self, milliseconds: int) -> int:
        return milliseconds * self._rate // 1000


def _same(known: Part, stretch: Stretch) -> bool:
    # Units have no equality but their identity, which is what is asked here.
    return isinstance(known, Stretch) and known.units == stretch.units


def _detector_options(detection: TurnDetection) -> DetectorOptions:
    if isinstance(detection, SemanticVad):
        return DetectorOptions(silence_duration_ms=None)
    return DetectorOptions(
        detection.threshold, detection.prefix_padding_ms, detection.silence_duration_ms
    )
