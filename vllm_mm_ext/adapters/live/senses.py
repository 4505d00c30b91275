"""The hearing and seeing of one session, done in threads that all sessions share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager

from blake3 import blake3

from vllm_mm_ext.adapters.live.lane import Lane
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.live.client_events import AudioContent, ImageContent, VideoAppend
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Heard, Listener, whole_sound
from vllm_mm_ext.live.new_items import Media
from vllm_mm_ext.live.session_options import SessionOptions
from vllm_mm_ext.live.voice import VoicePool
from vllm_mm_ext.live.watching import Sight, Watcher, read_image
from vllm_mm_ext.live.wire_error import WireError
from vllm_mm_ext.sight.ended_sessions import first_halves

# Bytes of sound that are dealt with in one go: 1.4 s of PCM16.
_PIECE_BYTES = 1 << 16
# Of sound that no detector looks at, so much is dealt with on the event loop: 170 ms of PCM16.
_LITTLE_BYTES = 1 << 13
# A session may send one file for so many of its bytes, and remembers half the digest of each, which
# takes about 100 bytes. With 256 MiB that is enough for 30 new frames a second for 3 hours.
_BYTES_PER_FILE = 800


class Senses:
    """Decodes what one client sends. All methods raise ``WireError`` for media that are bad.

    Args:
        traits: What the model takes in.
        options: The session's, at its start.
        voices: Where a speech detector comes from while turns are detected.
        lane: Where the work is done.
        max_pixels: Most pixels of an image.
        max_bytes: Of the session: most of the decoded pictures and sounds of one event, and what
            bounds the number of different files.

    Attributes:
        lane: As given.
    """

    def __init__(
        self,
        traits: FamilyTraits,
        options: SessionOptions,
        voices: VoicePool,
        lane: Lane,
        max_pixels: int,
        max_bytes: int,
    ) -> None:
        self._traits = traits
        self._voices = voices
        self.lane = lane
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._format = options.audio_format
        self._detects = options.turn_detection is not None
        self._listener = Listener(traits.audio_rate, self._format)
        self._watcher = Watcher(traits, max_pixels)
        # Half a digest each: a session of two hours has thousands of frames.
        self._seen: set[bytes] = set()
        self._most_seen = max_bytes // _BYTES_PER_FILE

    @property
    def files_seen(self) -> int:
        """Number of different pictures, frames and sound files that the client sent."""
        return len(self._seen)

    @property
    def files(self) -> frozenset[bytes]:
        """The first halves of the digests of those files."""
        return frozenset(self._seen)

    def has_seen(self, digests: Collection[str]) -> bool:
        """Whether the client sent one of the files of these digests (hex BLAKE3)."""
        return not self._seen.isdisjoint(first_halves(digests))

    @contextmanager
    def _noted(self, file: bytes) -> Iterator[None]:
        """Remember a file from before it is read, as a takedown may come meanwhile; forget it if it
        cannot be read.
        """
        digest = blake3(file).digest(16)
        known = digest in self._seen
        if not known and len(self._seen) >= self._most_seen:
            raise WireError(
                f"The session has had {self._most_seen} different pictures and sounds, the most "
                "that it may have (mm_ext.live.session_mb).",
                code="session_too_large",
            )
        self._seen.add(digest)
        try:
            yield
        except MediaError:
            if not known:
                self._seen.discard(digest)
            raise

    async def hear(self, audio: bytes) -> AsyncIterator[Heard]:
        """The sound of an append, of which others' work may come between two pieces."""
        if len(audio) <= _LITTLE_BYTES and not self._detects:
            # To hand it to a thread takes longer than the work.
            with _wire_errors():
                heard = self._hear(audio)
            yield heard
            return
        for start in range(0, len(audio), _PIECE_BYTES) or (0,):
            with _wire_errors():
                heard = await self.lane.run(self._hear, audio[start : start + _PIECE_BYTES])
            yield heard

    def _hear(self, audio: bytes) -> Heard:
        if self._detects and self._listener.voice is None:
            self._listener.use_voice(self._voices.take())
        return self._listener.hear(audio)

    async def flush(self) -> Heard:
        """The last of the sound, which the resampler holds until more comes."""
        return await self.lane.run(self._listener.flush)

    async def see(self, event: VideoAppend) -> Sight:
        """The frame of an append."""
        with _wire_errors():
            return await self.lane.run(self._see, event)

    def _see(self, event: VideoAppend) -> Sight:
        with self._noted(event.image):
            return self._watcher.see(event)

    async def read(
        self, contents: Sequence[tuple[str, ImageContent | AudioContent]]
    ) -> list[Media]:
        """The pictures and the samples, at the model's rate, of items of a conversation.

        Args:
            contents: Each with the name of its field.

        Raises:
            WireError: One cannot be read, or all take more than a session holds.
        """
        # A file of a few hundred bytes can hold a picture of as many megabytes as are allowed.
        media: list[Media] = []
        left = self._max_bytes
        for name, content in contents:
            with _wire_errors(name):
                medium = await self.lane.run(self._read, content)
            left -= (medium.pixels if isinstance(medium, Sight) else medium).nbytes
            if left < 0:
                raise WireError(
                    f"The pictures and sounds of the event take more than {self._max_bytes >> 20} "
                    "MiB, which is what a session holds (mm_ext.live.session_mb).",
                    code="session_too_large",
                    param=name,
                )
            media.append(medium)
        return media

    def _read(self, content: ImageContent | AudioContent) -> Media:
        if isinstance(content, AudioContent):
            with self._noted(content.audio):
                return whole_sound(content.audio, self._format, self._traits.audio_rate)
        with self._noted(content.image):
            if self._traits.images:
                return read_image(content.image, self._max_pixels)
            # A model without pictures takes a video of one frame.
            frame = VideoAppend(None, content.image, None)
            return Watcher(self._traits, self._max_pixels).see(frame)

    def clear(self) -> None:
        """Forget sound that has not been told yet; the times of frames may begin anew."""
        self._listener.clear()
        self._watcher.clear()

    def follow(self, options: SessionOptions) -> None:
        """Take sound in the session's format, and detect speech if the session wants that."""
        audio_format = options.audio_format
        if audio_format is not self._format:
            self._format = audio_format
            self._listener.use_format(audio_format)
        # A detector is taken with the first sound: many sessions never send any.
        self._detects = options.turn_detection is not None
        if not self._detects:
            self._give_back_voice()

    async def close(self) -> None:
        """Wait for what still runs, and give back what was taken."""
        await self.lane.end()
        self._give_back_voice()

    def _give_back_voice(self) -> None:
        voice = self._listener.use_voice(None)
        if voice is not None:
            self._voices.give_back(voice)


@contextmanager
def _wire_errors(name: str | None = None) -> Iterator[None]:
    """Make errors of media those of a client's field, by its name if it is of an item."""
    try:
        yield
    except MediaError as error:
        raise WireError(error.message, code=error.code, param=name or error.parameter) from None
