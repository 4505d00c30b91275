"""Media of a soak: some that are asked about again and again, and new ones without end."""

from __future__ import annotations

import base64
import io
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vllm_mm_ext.testing.media import Tone, make_audio, make_clip, mutate, real_clips
from vllm_mm_ext.testing.origin import Origin
from vllm_mm_ext.tools.bench.bench_clips import cached_clip, variant

# Clips that every client knows; a third of those that are made have sound.
CLIPS = 49
CLIP_S = 10.0
_DATA_TYPES = {"video": "video/mp4", "audio": "audio/wav"}


class SoakMedia:
    """Clips, sounds and pictures of a soak. Usable from any thread.

    Args:
        work_dir: Where the clips that every run uses are kept between runs.
        directory: Where the server may read; what is made for one conversation goes with it.
        origin: Serves some of the new clips over HTTP.
        clips: How many clips there are that are asked about again and again.
    """

    def __init__(self, work_dir: Path, directory: Path, origin: Origin, clips: int = CLIPS) -> None:
        self._directory = directory
        self._origin = origin
        self._lock = threading.Lock()
        self._made = 0
        footage = real_clips()[:clips]
        made = [
            cached_clip(
                work_dir,
                width=320,
                height=180,
                fps=8,
                gop=40,
                duration=CLIP_S,
                seed=100 + number,
                sound=number % 3 == 0,
            )
            for number in range(clips - len(footage))
        ]
        self.clips = [
            Path(shutil.copy(clip, directory / f"clip-{number}.mp4"))
            for number, clip in enumerate([*footage, *made])
        ]
        self._sound = make_audio(directory / "sound.wav", duration=3.0, sample_rate=16000).path

    def known(self, rng: random.Random) -> str:
        """URL of one of the clips that are asked about again and again."""
        return rng.choice(self.clips).as_uri()

    @contextmanager
    def new(self, rng: random.Random) -> Iterator[str]:
        """URL of a clip that nobody has asked about: file, http or data. Gone after the block."""
        number = self._next()
        path = self._directory / f"new-{number}.mp4"
        if rng.random() < 0.5:
            variant(rng.choice(self.clips), path, number)
        else:
            make_clip(
                path,
                width=160,
                height=96,
                fps=4,
                gop=40,
                duration=rng.uniform(2.0, CLIP_S),
                audio=[Tone(440.0, 0.0, CLIP_S)] if rng.random() < 0.2 else None,
                seed=10_000 + number,
            )
        way = rng.choice(("file", "http", "data"))
        url = path.as_uri()
        if way == "http":
            cache_control = rng.choice((None, "max-age=60", "no-store"))
            url = self._origin.serve_file(path, cache_control=cache_control)
        elif way == "data":
            url = _data_url("video", path.read_bytes())
        try:
            yield url
        finally:
            path.unlink()
            if way == "http":
                self._origin.forget(url)

    def damaged(self, rng: random.Random) -> str:
        """URL of a clip that is cut off, or has some bytes changed."""
        data = rng.choice(self.clips).read_bytes()
        if rng.random() < 0.5:
            data = data[: int(len(data) * rng.random())]
        else:
            data = mutate(data, rng.randrange(1 << 31), changes=2 ** rng.randrange(9))
        return _data_url("video", data)

    def sound(self, rng: random.Random) -> str:
        """URL of a sound: one that is asked about again and again, or a new one."""
        if rng.random() < 0.5:
            return self._sound.as_uri()
        tones = [Tone(rng.uniform(200.0, 2000.0), 0.0, 3.0)]
        path = self._directory / f"new-{self._next()}.wav"
        make_audio(path, duration=rng.uniform(0.5, 3.0), tones=tones, sample_rate=16000)
        data = path.read_bytes()
        path.unlink()
        return _data_url("audio", data)

    def picture(self, rng: random.Random) -> str:
        """Data URL of a new picture."""
        side = rng.choice((56, 112, 168))
        pixels = np.random.default_rng(rng.randrange(1 << 31)).integers(0, 255, (side, side, 3))
        out = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"

    def _next(self) -> int:
        with self._lock:
            self._made += 1
            return self._made


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{_DATA_TYPES[kind]};base64,{base64.b64encode(data).decode()}"
