"""What the sessions of ``bench live`` are shown: sound and pictures, and how they are sent."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vllm_mm_ext.testing.voices import made_speech
from vllm_mm_ext.tools.cli.live_client import RATE, LiveSession
from vllm_mm_ext.tools.cli.live_media import jpeg, pictures_of, sound_of
from vllm_mm_ext.tools.cli.pcm import pcm16, write_wav

CHUNK_S = 0.1
_EDGE = 224


@dataclass(frozen=True)
class Feed:
    """Sound and pictures of the same time.

    Attributes:
        sound: PCM of 16 bits, mono, ``RATE``.
        pictures: Times in seconds, ascending, and JPEG files.
    """

    sound: bytes
    pictures: tuple[tuple[float, bytes], ...]

    @property
    def seconds(self) -> float:
        """Seconds of sound."""
        return len(self.sound) / 2 / RATE

    def pieces(self, start: float, end: float) -> Iterator[tuple[float, bytes, bytes]]:
        """What is sent when: seconds, PCM (or nothing), a picture (or nothing).

        Args:
            start, end: Seconds; what lies before and from there on is left out.
        """
        size = 2 * round(CHUNK_S * RATE)
        first, last = (2 * round(second * RATE) for second in (start, end))
        chunks = [
            ((offset + len(chunk)) / 2 / RATE, chunk, b"")
            for offset in range(first, min(last, len(self.sound)), size)
            if (chunk := self.sound[offset : min(offset + size, last)])
        ]
        pictures = [(at, b"", image) for at, image in self.pictures if start <= at < end]
        # A picture of the very moment comes before sound that ends with it.
        yield from sorted([*pictures, *chunks], key=lambda piece: piece[0])

    def wav(self) -> bytes:
        """The sound as a WAV file."""
        buffer = io.BytesIO()
        write_wav(buffer, self.sound, RATE)
        return buffer.getvalue()


def made_feed(seconds: float, fps: float, seed: int, silence_s: float = 0.0) -> Feed:
    """Babble that detectors take for speech, and pictures that differ from each other.

    Args:
        seconds: Of speech.
        fps: Pictures per second; 0: none.
        seed: Other seeds share no picture and no second of sound.
        silence_s: Seconds of silence behind the speech, without pictures.
    """
    rng = np.random.default_rng(seed)
    samples = np.pad(made_speech(seconds, seed, RATE), (0, round(silence_s * RATE)))
    pictures = tuple(
        (number / fps, _picture(rng)) for number in range(int(np.ceil(seconds * fps)) if fps else 0)
    )
    return Feed(pcm16(samples), pictures)


def _picture(rng: np.random.Generator) -> bytes:
    coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((_EDGE, _EDGE), Image.Resampling.BILINEAR)
    return jpeg(np.asarray(image))


def feed_of(path: Path, fps: float) -> Feed:
    """The sound and the pictures of a file with both."""
    return Feed(sound_of(path), tuple(pictures_of(path, fps, _EDGE)))


async def play(
    session: LiveSession,
    feed: Feed,
    start: float = 0.0,
    end: float | None = None,
    *,
    speed: float = 1.0,
    offset: float = 0.0,
    sent: list[float] | None = None,
) -> None:
    """Send a part of a feed.

    Args:
        session: Who is shown it.
        feed: The whole.
        start, end: Seconds of the feed; None: to its end.
        speed: Times real time.
        offset: Seconds on the session's clock at which the feed begins.
        sent: Its first element is kept at the time of ``perf_counter`` of the last sound sent.
    """
    end = feed.seconds if end is None else end
    began = time.perf_counter()
    for at, chunk, picture in feed.pieces(start, end):
        await asyncio.sleep(max(0.0, began + (at - start) / speed - time.perf_counter()))
        if chunk:
            if sent is not None:
                sent[0] = time.perf_counter()
            await session.sound(chunk)
        else:
            await session.picture(picture, offset + at)
