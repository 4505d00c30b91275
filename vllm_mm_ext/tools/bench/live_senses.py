"""Part of ``bench live``: what hearing and seeing cost the API server, without an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import product

import numpy as np
from PIL import Image

from vllm_mm_ext.live.audio_format import AudioFormat
from vllm_mm_ext.live.client_events import VideoAppend
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Listener
from vllm_mm_ext.live.turn_detector import DetectorOptions, SpeechStarted, TurnDetector
from vllm_mm_ext.live.units import UnitCutter
from vllm_mm_ext.live.voice import Voice, VoicePool
from vllm_mm_ext.live.watching import Watcher
from vllm_mm_ext.media.types import SizeRule
from vllm_mm_ext.tools.bench.harness import Row
from vllm_mm_ext.tools.bench.live_feed import CHUNK_S, Feed, made_feed
from vllm_mm_ext.tools.bench.live_sides import Study

_SECONDS = 40.0
_REPEATS = 5
_MODEL_RATE = 16_000
# The frames of Qwen2.5-Omni with its default of pixels.
_SIZES = SizeRule(kind="qwen_vl", min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
_FAMILY = FamilyTraits(
    hears=True,
    sees=True,
    images=True,
    audio_rate=_MODEL_RATE,
    unit_s=2.0,
    frame_multiple=2,
    fps=1.0,
    size_rule=_SIZES,
    turn_end=False,
)
_CAMERAS = ((640, 480), (1280, 720))


def senses(study: Study) -> list[Row]:
    """CPU of a session per second of what it sends, and of stock's reading of the same files."""
    feed = made_feed(_SECONDS, 0.0, seed=0)
    read = _cpu(partial(_read_sound, feed.wav()), _SECONDS)
    voice = VoicePool(1).take()
    rows = []
    for name, listens in (("all sound kept", None), ("turns detected", voice)):
        hear = _cpu(partial(_hear, feed, listens), _SECONDS)
        rows.append(Row.of(f"CPU a second of sound, {name}", "ms", stock=read, plugin=hear))
    for (width, height), moves in product(_CAMERAS, (True, False)):
        files = [_photo(width, height, moves * number) for number in range(8)]
        rows.append(
            Row.of(
                f"CPU a frame of {width}x{height}{'' if moves else ' that stands still'}",
                "ms",
                stock=_cpu(partial(_read_frames, files), len(files)),
                plugin=_cpu(partial(_see, files), len(files)),
            )
        )
    study.notes.append(
        f"CPU: PCM of 24 kHz in appends of {CHUNK_S * 1000:g} ms, JPEG frames at the size of "
        "Qwen2.5-Omni; decoding, resampling, detection, units. Stock: vLLM's reading of the same "
        "seconds as WAV and of the same JPEG files, which it does again with every request that "
        "resends them, without the resizing, which its processor does then"
    )
    return rows


def _cpu(work: Callable[[], None], count: float) -> list[float]:
    """CPU milliseconds of this process per second or frame; the first run is for what is lazy."""
    runs = []
    for _ in range(1 + _REPEATS):
        start = time.process_time()
        work()
        runs.append((time.process_time() - start) * 1000 / count)
    return runs[1:]


def _hear(feed: Feed, voice: Voice | None) -> None:
    listener = Listener(_MODEL_RATE, AudioFormat.PCM16)
    cutter = UnitCutter(_FAMILY, 0.0)
    detector = TurnDetector(_MODEL_RATE, DetectorOptions())
    if voice is not None:
        voice.reset()
        listener.use_voice(voice)
        cutter.gate(_MODEL_RATE * detector.options.prefix_padding_ms // 1000)
    for now, chunk, _ in feed.pieces(0.0, feed.seconds):
        heard = listener.hear(chunk)
        for piece in heard.pieces:
            cutter.hear(piece, heard.received, now)
            window = piece.window
            turn = window and detector.step(window.start, window.end, window.probability)
            if isinstance(turn, SpeechStarted):
                cutter.begin_speech(turn.position)


def _see(files: Sequence[bytes]) -> None:
    watcher, cutter = Watcher(_FAMILY, 0), UnitCutter(_FAMILY, 0.0)
    for number, image in enumerate(files):
        cutter.see(watcher.see(VideoAppend(None, image, None)), float(number))


def _read_sound(wav: bytes) -> None:
    from vllm.multimodal.audio import AudioResampler
    from vllm.multimodal.media import AudioMediaIO

    samples, rate = AudioMediaIO().load_bytes(wav)
    AudioResampler(target_sr=_MODEL_RATE).resample(samples, orig_sr=rate)


def _read_frames(files: Sequence[bytes]) -> None:
    from vllm.multimodal.media import ImageMediaIO

    for image in files:
        ImageMediaIO().load_bytes(image)


def _photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG file about as large as a camera's of such a size."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    photo = coarse.resize((width, height), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    photo.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
